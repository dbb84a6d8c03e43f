r"""Other ranks for a live PEFT model, in place, without a change of what it computes.

Growing appends ranks whose product is exactly zero. Shrinking drops the smallest singular directions
of the update ``dW = scaling * B @ A``, found by QR of both factors and the SVD of the small core, so
that ``dW`` itself is never formed. A module's scaling stays what it was: its alpha follows its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorank._core import NumericalError
from lorank.adapters.live.config import write_config
from lorank.adapters.live.layers import AdaptedLayer
from lorank.allocation.budget import is_integer
from lorank.peft_format.initialization import check_config
from lorank.training import optimizer_state
from lorank.training.data_parallel import agree, rebuild_reducer
from lorank.training.layers import by_layer, check_layer, check_ties, lora_layers
from lorank.training.optimizer_state import FactorChange
from lorank.training.truncation import new_ranks, truncated
from lorank.training.wrappers import check_not_compiled, data_parallel_wrappers


@dataclass(frozen=True, slots=True)
class RankChange:
    """What `resize_lora` did to one module.

    Attributes
    ----------
    name
        The module's name in the base model.
    old_rank, new_rank
        The ranks before and after.
    dropped
        The singular values of the update ``scaling * B @ A`` that were dropped, float64, descending;
        empty if the module did not shrink.
    """

    name: str
    old_rank: int
    new_rank: int
    dropped: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """The Frobenius norm of the update's change, before the factors are rounded to their type."""
        return float(np.linalg.norm(self.dropped))

    @property
    def spectral_error(self) -> float:
        """The spectral norm of the update's change."""
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

    A growing module computes what it computed before: new rows of A are random as PEFT initialises
    them, or given, and new columns of B are zero (of an embedding, as in PEFT, rows of A are zero and
    columns of B random). A shrinking module loses the smallest singular directions of its update,
    which is the best approximation of that rank. Every module's scaling stays what it was.

    Parameters stay the same objects with new values. Gradients that are pending and the optimizer's
    state go along: for new ranks zeros, and the mean of the others where they are averages of squares;
    where a module shrinks, they follow the change of basis (second moments approximately, as if
    gradients of different ranks were uncorrelated). Call it between steps, never between a forward pass
    and its backward pass. The adapter's config is written anew, so that the model is saved and loaded
    with its ranks.

    Under DistributedDataParallel call it in every process with the same arguments, with the model that
    is wrapped. The wrapper's reducer is built anew.

    Parameters
    ----------
    model
        A PEFT model with LoRA, unwrapped.
    ranks
        Module -> rank, at least 1. Names as in the base model; dotted suffixes will do if they fit one
        module only. Modules that are not named keep their ranks.
    optimizer
        The optimizer that trains the model, or Accelerate's wrapper of it; None if there is none yet.
    adapter_name
        Which adapter.
    seed
        New random rows depend on it, the module's name and its old rank. Take another seed, such as
        the step, where a module may grow from one rank twice.
    directions
        Module -> ``(n, in)`` array or tensor whose first rows become the new rows of A, as they are;
        `n` is at least the number of new ranks. Rows that PEFT draws have a norm of about 0.58.

    Returns
    -------
    dict
        Name in the model -> what was done, for every module of `ranks`.

    Raises
    ------
    TypeError
        If `model` is no module, `ranks` no mapping, or `optimizer` no optimizer. Nothing was changed then.
    ValueError
        If a name fits no module or several, a rank is no positive integer, an adapter is merged, or
        the optimizer does not hold the factors. Nothing was changed then.
    NotImplementedError
        If a module or the optimizer's state cannot be resized: DoRA and other variants, stacked
        experts, initialisations that change the base model, sharded or compiled models, state that is
        not by element. Nothing was changed then.
    NumericalError
        If the factors of a module to shrink hold NaN or infinite values. Nothing was changed then.

    Notes
    -----
    Dynamic ranks that keep the function are what GARD (gradient-spectral rank allocation) asks for.
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
            agree(factor, wrappers)
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
    """Refuse what cannot be resized, before anything is changed.

    Parameters
    ----------
    config
        PEFT's config of the adapter.
    layers
        All layers of the adapter.
    ranks
        The new ranks of those that are to change.

    Raises
    ------
    ValueError, NotImplementedError
        As `resize_lora`.
    """
    check_config(config, list(ranks.values()))
    for name in ranks:
        check_layer(layers[name])
    check_ties(list(ranks), layers)


def _checked_rank(name: str, rank: Any) -> int:
    if not is_integer(rank):
        raise ValueError(f"module {name!r}: its rank must be an integer, not {rank!r}")
    if rank < 1:
        raise ValueError(f"module {name!r}: rank {rank}: PEFT has no ranks below 1")
    return int(rank)


def _plan(
    adapted: AdaptedLayer, rank: int, rows: Any, seed: int, gaussian: bool
) -> tuple[RankChange, tuple[FactorChange, FactorChange]]:
    """What will be done to a layer, and its factors afterwards."""
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
    a, b = adapted.factors
    exact = torch.float32 if a.device.type == "mps" else torch.float64
    A, B = a.detach().flatten(1).to(exact), b.detach().flatten(1).to(exact)
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NumericalError(f"module {adapted.name!r}: its factors hold NaN or infinite values")
    basis = truncated(A, B, rank)
    new_a, new_b, of_a, of_b = basis.A, basis.B, basis.of_a, basis.of_b
    if missing := rank - len(new_a):
        # More ranks than the module has dimensions: what is left of them starts anew.
        rows, columns = new_ranks(adapted, missing, None, seed, gaussian)
        new_a, new_b = torch.cat([new_a, rows.to(A)]), torch.cat([new_b, columns.to(B)], 1)
    dropped = abs(adapted.scaling) * basis.dropped.double().cpu().numpy()
    return RankChange(adapted.name, adapted.rank, rank, dropped), (
        FactorChange(a, 0, rank, like(a, 0, new_a), of_a, of_b),
        FactorChange(b, 1, rank, like(b, 1, new_b), of_b, of_a),
    )


def like(factor: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix ``(r, in)`` or ``(out, r)`` in the shape of a factor, which can be a convolution's."""
    tail = factor.shape[1:] if axis == 0 else (-1, *factor.shape[2:])
    return matrix.to(factor).reshape(matrix.shape[0], *tail).contiguous()
