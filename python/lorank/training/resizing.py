r"""Change the ranks of a live PEFT model in place.

Growing appends ranks whose product is exactly zero, so that the model's outputs stay the same. Shrinking
drops the smallest singular directions of the update ``dW = scaling * B @ A``. They follow from the QR
decompositions of both factors and the SVD of the small core; ``dW`` itself is never formed. The scaling of
a module stays the same: its alpha follows its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorank._core import NumericalError
from lorank._internal.equality import ByValue
from lorank.adapters.live.config import write_config
from lorank.adapters.live.layers import AdaptedLayer
from lorank.allocation.budget import is_integer
from lorank.peft_format.initialization import check_config
from lorank.training import optimizer_state
from lorank.training.data_parallel import broadcast_factor, rebuild_reducer
from lorank.training.layers import by_layer, check_layer, check_ties, lora_layers
from lorank.training.optimizer_state import FactorChange
from lorank.training.truncation import new_ranks, truncated
from lorank.training.wrappers import check_not_compiled, data_parallel_wrappers


@dataclass(frozen=True, slots=True, eq=False)
class RankChange(ByValue):
    """The change of one module's rank by `resize_lora`.

    Attributes
    ----------
    name
        Name of the module in the base model.
    old_rank, new_rank
        Ranks before and after the change.
    dropped
        Dropped singular values of the update ``scaling * B @ A``, float64, descending; empty if the module
        did not shrink.

    Examples
    --------
    >>> import numpy as np
    >>> change = RankChange("layers.0.q_proj", 4, 2, np.array([0.4, 0.3]))
    >>> change.error, change.spectral_error
    (0.5, 0.4)
    """

    name: str
    old_rank: int
    new_rank: int
    dropped: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """Frobenius norm of the dropped part of the update, before the factors are rounded to their type."""
        return float(np.linalg.norm(self.dropped))

    @property
    def spectral_error(self) -> float:
        """Spectral norm of the dropped part of the update."""
        return float(self.dropped[0]) if len(self.dropped) else 0.0


def resize_lora(
    model: Any,
    ranks: Mapping[str, int],
    *,
    optimizer: Any = None,
    adapter_name: str = "default",
    seed: int = 0,
    directions: Mapping[str, Any] | None = None,
) -> dict[str, RankChange]:
    """Change ranks of a live PEFT model in place.

    Call this function between steps, never between a forward pass and its backward pass.

    A module that grows keeps its outputs. New columns of B are zero; new rows of A are `directions`, or
    random as PEFT initialises them. (In an embedding, as in PEFT, new rows of A are zero and new columns of
    B random.) A module that shrinks gets the best approximation of its update at the new rank. Scalings
    stay the same.

    Parameters stay the same objects with new values. Their pending gradients and the optimizer's state are
    resized too. Entries for new ranks are zero; in averages of squared gradients, the mean of the others.
    When a module shrinks, gradients and state follow the change of basis; second moments do so approximately,
    as if the gradients of different ranks were uncorrelated. The adapter's config is updated, so that saving
    and loading the model keeps its ranks.

    Under DistributedDataParallel, call this function in every process with the same arguments, and with the
    model inside the wrapper. The wrapper gets a new reducer.

    Parameters
    ----------
    model
        The PEFT model with a LoRA adapter, without wrappers.
    ranks
        New rank, at least 1, of each module to change. Names are those of the base model, or dotted suffixes
        that match one module only.
    optimizer
        The optimizer that trains the model, or Accelerate's wrapper of it; None before the optimizer exists.
    adapter_name
        Name of the adapter.
    seed
        Seed of random rows, combined with the module's name and its old rank. If a module may grow twice from
        the same rank, use different seeds, such as the step.
    directions
        Arrays or tensors ``(n, in)`` by module, whose first rows become the new rows of A unchanged; `n` is
        at least the number of new ranks. PEFT's random rows have a norm of about 0.58.

    Returns
    -------
    dict
        `RankChange` of each module of `ranks`, by name in the model.

    Raises
    ------
    TypeError
        If `model` is not a module, `ranks` not a mapping, or `optimizer` not an optimizer.
    ValueError
        If a name matches no module or several, a rank is not a positive integer, an adapter is merged, or the
        optimizer does not hold the factors.
    NotImplementedError
        If a module or the optimizer's state cannot be resized: DoRA and other variants, stacked experts,
        initialisations that change the base model, sharded or compiled models, state that is not elementwise.
    NumericalError
        If the factors of a module to shrink have NaN or infinite values.

    Notes
    -----
    After an error, model and optimizer are unchanged. Dynamic rank allocation [GARD] requires changes of rank
    that keep the function.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from lorank.training import resize_lora
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> x = torch.randn(3, 8)
    >>> before = model(x)
    >>> changes = resize_lora(model, {"0": 2, "2": 6}, optimizer=optimizer)
    >>> changes["0"].old_rank, changes["0"].new_rank
    (4, 2)
    >>> bool(torch.allclose(model(x), before))  # B is still zero, so that shrinking drops nothing.
    True
    """
    layers = lora_layers(model, adapter_name)
    check_not_compiled(model)
    config = model.peft_config[adapter_name]
    targets = by_layer(ranks, layers, "ranks")
    rows = by_layer(directions or {}, layers, "directions")
    sizes = {name: _checked_rank(name, rank) for name, rank in targets.items()}
    changed = [name for name, rank in sizes.items() if rank != layers[name].rank]
    check_resizable(config, layers, {name: sizes[name] for name in changed})
    inner = None if optimizer is None else optimizer_state.unwrapped(optimizer)
    if inner is not None:
        optimizer_state.check(inner, {name: layers[name].factors for name in changed})

    gaussian = config.init_lora_weights == "gaussian"
    plans = {name: _plan(layers[name], sizes[name], rows.get(name), seed, gaussian) for name in changed}
    wrappers = data_parallel_wrappers(model)
    for name, (_, factors) in plans.items():
        for factor in factors:
            broadcast_factor(factor, wrappers)
            if inner is not None:
                optimizer_state.carry(inner, factor)
            factor.apply()
        layers[name].set_rank(sizes[name])
    if changed:
        write_config(config, layers.values())
        for wrapper in wrappers:
            rebuild_reducer(wrapper)
    unchanged = np.empty(0)
    return {
        name: plans[name][0] if name in plans else RankChange(name, rank, rank, unchanged)
        for name, rank in sizes.items()
    }


def check_resizable(config: Any, layers: Mapping[str, AdaptedLayer], ranks: Mapping[str, int]) -> None:
    """Check that layers can be resized.

    Parameters
    ----------
    config
        PEFT's config of the adapter.
    layers
        All layers of the adapter, by name.
    ranks
        New rank of each layer to resize.

    Raises
    ------
    ValueError, NotImplementedError
        In the cases of `resize_lora`.
    """
    check_config(config, list(ranks.values()))
    for name in ranks:
        check_layer(layers[name])
    check_ties(list(ranks), layers)


def _checked_rank(name: str, rank: Any) -> int:
    """Return a rank as an int; raise ValueError if it is not an integer of at least 1."""
    if not is_integer(rank):
        raise ValueError(f"module {name!r}: its rank must be an integer, not {rank!r}")
    if rank < 1:
        raise ValueError(f"module {name!r}: rank {rank} is below 1, the smallest rank in PEFT")
    return int(rank)


def _plan(
    adapted: AdaptedLayer, rank: int, rows: Any, seed: int, gaussian: bool
) -> tuple[RankChange, tuple[FactorChange, FactorChange]]:
    """Return the change of a layer, and its factors at the new rank."""
    if rank < adapted.rank:
        return _shrunk(adapted, rank, seed, gaussian)
    a, b = (factor.detach() for factor in adapted.factors)
    new_rows, new_columns = new_ranks(adapted, rank - adapted.rank, rows, seed, gaussian)
    grown = torch.cat([a, like(a, 0, new_rows)]), torch.cat([b, like(b, 1, new_columns)], 1)
    change = RankChange(adapted.name, adapted.rank, rank, np.empty(0))
    return change, (
        FactorChange(adapted.factors[0], 0, rank, grown[0]),
        FactorChange(adapted.factors[1], 1, rank, grown[1]),
    )


def _shrunk(
    adapted: AdaptedLayer, rank: int, seed: int, gaussian: bool
) -> tuple[RankChange, tuple[FactorChange, FactorChange]]:
    """Return the change of a layer that loses ranks, and its factors at the new rank."""
    a, b = adapted.factors
    exact = torch.float32 if a.device.type == "mps" else torch.float64
    A, B = a.detach().flatten(1).to(exact), b.detach().flatten(1).to(exact)
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NumericalError(f"module {adapted.name!r}: its factors hold NaN or infinite values")
    basis = truncated(A, B, rank)
    new_a, new_b, of_a, of_b = basis.A, basis.B, basis.of_a, basis.of_b
    if missing := rank - len(new_a):
        # The new rank exceeds the smaller dimension of the module: the missing ranks are made as in growing.
        rows, columns = new_ranks(adapted, missing, None, seed, gaussian)
        new_a, new_b = torch.cat([new_a, rows.to(A)]), torch.cat([new_b, columns.to(B)], 1)
    dropped = abs(adapted.scaling) * basis.dropped.double().cpu().numpy()
    return RankChange(adapted.name, adapted.rank, rank, dropped), (
        FactorChange(a, 0, rank, like(a, 0, new_a), of_a, of_b),
        FactorChange(b, 1, rank, like(b, 1, new_b), of_b, of_a),
    )


def like(factor: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    """Convert a matrix ``(r, in)`` or ``(out, r)`` to the element type and dimensions of a factor."""
    tail = factor.shape[1:] if axis == 0 else (-1, *factor.shape[2:])
    return matrix.to(factor).reshape(matrix.shape[0], *tail).contiguous()
