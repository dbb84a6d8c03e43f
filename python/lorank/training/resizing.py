r"""Other ranks for a live PEFT model, in place, without a change of what it computes.

Growing appends ranks whose product is exactly zero. Shrinking drops the smallest singular directions
of the update ``dW = scaling * B @ A``, found by QR of both factors and the SVD of the small core, so
that ``dW`` itself is never formed. A module's scaling stays what it was: its alpha follows its rank.
"""

from __future__ import annotations

import gc
import hashlib
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from peft.tuners.lora.layer import LoraLayer
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorank import naming
from lorank._core import NumericalError
from lorank.lora_config import rank_keys
from lorank.training import optimizer_state
from lorank.training.optimizer_state import FactorChange

# Loading such an adapter derives the base model from the rank once more: it would be another base.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# A factor whose singular values differ by more than this is no good basis.
_ILL_CONDITIONED = 1e-3


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
    state go along: zeros for new ranks; where a module shrinks, they follow the change of basis
    (second moments approximately, as if gradients of different ranks were uncorrelated). Call it
    between steps, never between a forward pass and its backward pass. The adapter's config is written
    anew, so that the model is saved and loaded with its ranks.

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
    config = model.peft_config[adapter_name]
    targets = _by_layer(ranks, layers, "ranks")
    rows = _by_layer(directions or {}, layers, "directions")
    sizes = {name: _checked_rank(name, rank) for name, rank in targets.items()}
    changed = [name for name, rank in sizes.items() if rank != layers[name].rank]
    _check_config(config, [sizes[name] for name in changed])
    for name in changed:
        _check_layer(layers[name])
    _check_ties(changed, layers)
    inner = None if optimizer is None else optimizer_state.unwrapped(optimizer)
    if inner is not None:
        optimizer_state.check(inner, {name: layers[name].factors for name in changed})

    gaussian = config.init_lora_weights == "gaussian"
    plans = {name: _plan(layers[name], sizes[name], rows.get(name), seed, gaussian) for name in changed}
    wrappers = _data_parallel(model)
    for name, (_, factors) in plans.items():
        for factor in factors:
            _agree(factor, wrappers)
            if inner is not None:
                optimizer_state.carry(inner, factor)
            factor.apply()
        layers[name].set_rank(sizes[name])
    if changed:
        write_config(config, layers.values())
        for wrapper in wrappers:
            _rebuild_reducer(wrapper)
    unchanged = np.empty(0)
    return {
        name: plans[name][0] if name in plans else RankChange(name, rank, rank, unchanged)
        for name, rank in sizes.items()
    }


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A LoRA layer of a live model, as one adapter sees it.

    Attributes
    ----------
    name
        The module's name in the base model; of stacked experts the parameter's.
    layer
        PEFT's layer.
    adapter
        The adapter's name.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.layer.r[self.adapter])

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are bare parameters, ``(r, vocabulary)`` and ``(width, r)``."""
        return self.adapter in self.layer.lora_embedding_A

    @property
    def factors(self) -> tuple[Any, Any]:
        """The parameters A and B: ``(r, in, ...)`` and ``(out, r, ...)``."""
        if self.is_embedding:
            return self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    @property
    def is_rank_stabilized(self) -> bool:
        """Whether PEFT divides alpha by the root of the rank."""
        return bool(self.layer.use_rslora.get(self.adapter, False))

    @property
    def alpha(self) -> float:
        """The alpha."""
        return float(self.layer.lora_alpha[self.adapter])

    @property
    def nominal_scaling(self) -> float:
        """The scaling that rank and alpha give: what a saved adapter will be loaded with."""
        nominal = self.alpha / divisor(self.rank, self.is_rank_stabilized)
        # Not every scaling is a quotient of floats: what is meant is in force, unless PEFT changed it.
        return self.scaling if math.isclose(nominal, self.scaling, rel_tol=1e-12) else nominal

    @property
    def scaling(self) -> float:
        """The scaling in force; PEFT can change it for a while."""
        return float(self.layer.scaling[self.adapter])

    def set_rank(self, rank: int) -> None:
        """Tell PEFT's layer its rank; the scaling stays."""
        alpha = alpha_of(self.nominal_scaling, rank, self.is_rank_stabilized)
        self.layer.r[self.adapter] = rank
        self.layer.lora_alpha[self.adapter] = alpha
        if self.is_embedding:
            return
        a, b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        if isinstance(a, torch.nn.Linear):
            a.out_features = b.in_features = rank
        else:
            a.out_channels = b.in_channels = rank

    def set_scaling(self, scaling: float) -> None:
        """Give the layer another scaling, and the alpha that belongs to it."""
        self.layer.scaling[self.adapter] = scaling
        self.layer.lora_alpha[self.adapter] = alpha_of(scaling, self.rank, self.is_rank_stabilized)


def lora_layers(model: Any, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers that an adapter adapts, by name in the base model.

    Raises
    ------
    ValueError
        If the model has no such adapter, or is wrapped.
    NotImplementedError
        If the adapter is no LoRA, or the model is compiled or sharded.
    """
    _check_wrapping(model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"no adapter {adapter_name!r} in the model: it has {', '.join(configs) or 'none'}")
    kind = str(getattr(configs[adapter_name].peft_type, "value", configs[adapter_name].peft_type))
    if kind != "LORA":
        raise NotImplementedError(f"adapter {adapter_name!r} is {kind}: only LoRA has ranks to change")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = [
        AdaptedLayer(_base_name(path, module), module, adapter_name)
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    ]
    return {layer.name: layer for layer in found}


def _check_wrapping(model: Any) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(f"the model is wrapped in {type(model).__name__}: pass model.module")
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("OptimizedModule", "FullyShardedDataParallel", "DeepSpeedEngine"):
            raise NotImplementedError(
                f"{path or 'the model'} is wrapped in {kind}, which remembers shapes: ranks cannot be "
                "changed under it"
            )


def _base_name(path: str, module: Any) -> str:
    """PEFT's wrappers of several parameters of one module are nested, each the base layer of the next."""
    parameter = getattr(module, "parameter_name", None)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path if parameter is None else f"{path}.{parameter}"


def _by_layer(values: Mapping[str, Any], layers: Mapping[str, AdaptedLayer], argument: str) -> dict[str, Any]:
    """The values by the layers' own names.

    Raises
    ------
    ValueError
        If a name fits no layer or several, or two names fit the same.
    """
    resolved: dict[str, Any] = {}
    for name, value in values.items():
        found = [name] if name in layers else [live for live in layers if naming.is_suffix(name, live)]
        # Names of a checkpoint can be longer than those of the model, by PEFT's prefix for one.
        found = found or [suffix for suffix in naming.suffixes(name) if suffix in layers][:1]
        if len(found) != 1:
            what = (
                f"fits several adapted modules ({', '.join(found[:3])})" if found else "is no adapted module"
            )
            raise ValueError(f"{argument}: {name!r} {what}")
        if found[0] in resolved:
            raise ValueError(f"{argument}: two names fit the module {found[0]!r}")
        resolved[found[0]] = value
    return resolved


def _checked_rank(name: str, rank: Any) -> int:
    try:
        value = operator.index(rank)
    except TypeError:
        raise ValueError(f"module {name!r}: its rank must be an integer, not {rank!r}") from None
    if value < 1:
        raise ValueError(f"module {name!r}: rank {value}: PEFT has no ranks below 1")
    return value


def _check_config(config: Any, new_ranks: Sequence[int]) -> None:
    """Refuse initialisations that PEFT repeats on loading, with the new ranks."""
    init = config.init_lora_weights
    if not new_ranks or not isinstance(init, str):
        return
    if init.lower().startswith(_CHANGES_THE_BASE):
        raise NotImplementedError(
            f"the adapter was initialised by {init!r}, which derives the base model from the rank: with "
            "other ranks the saved adapter would be loaded into another base model. Save the base model as "
            "it is now, and set init_lora_weights to True in the adapter's config"
        )
    if init == "orthogonal" and any(rank % 2 for rank in new_ranks):
        raise ValueError("the adapter was initialised by 'orthogonal': PEFT loads even ranks only")


def _check_layer(adapted: AdaptedLayer) -> None:
    """Refuse a layer whose factors are not all there is, or not all here."""
    name, layer, adapter = adapted.name, adapted.layer, adapted.adapter
    if adapter in layer.merged_adapters:
        raise ValueError(f"module {name!r}: adapter {adapter!r} is merged into the weight: unmerge it first")
    if hasattr(layer, "parameter_name"):
        raise NotImplementedError(f"module {name!r} is a stack of experts (target_parameters): not supported")
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        raise NotImplementedError(f"module {name!r} is no plain LoRA but a {variant}: not supported")
    base = layer.get_base_layer()
    if getattr(base, "groups", 1) != 1:
        raise NotImplementedError(f"module {name!r} is a convolution in {base.groups} groups: not supported")
    if isinstance(base, torch.nn.MultiheadAttention) or ".base_layer." in name:
        raise NotImplementedError(
            f"module {name!r} belongs to a torch.nn.MultiheadAttention, in which PEFT has one rank for all: "
            "not supported"
        )
    if getattr(base, "_hf_device_mesh", None) is not None:
        raise NotImplementedError(
            f"module {name!r} is split over devices by tensor parallelism: not supported"
        )
    if not adapted.is_embedding:
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if not isinstance(factor, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
                raise NotImplementedError(f"module {name!r}: its factors are {type(factor).__name__} layers")
    for factor in adapted.factors:
        _check_storage(name, factor)


def _check_storage(module: str, factor: Any) -> None:
    is_sharded = hasattr(factor, "ds_id") or hasattr(factor, "_fsdp_flattened") or not factor.numel()
    if type(factor.data) is not torch.Tensor or is_sharded:
        raise NotImplementedError(
            f"module {module!r}: a factor is sharded or no plain tensor ({type(factor).__name__} of shape "
            f"{tuple(factor.shape)}): ranks cannot be changed under FSDP, DeepSpeed ZeRO-3 or tensor "
            "parallelism"
        )
    if factor.is_meta:
        raise ValueError(f"module {module!r}: its factors are on the meta device: load the adapter first")


def _check_ties(changed: Sequence[str], layers: Mapping[str, AdaptedLayer]) -> None:
    """Refuse factors that another layer uses as well (`ensure_weight_tying`)."""
    users: dict[int, list[str]] = defaultdict(list)
    for layer in layers.values():
        for storage in {factor.untyped_storage().data_ptr() for factor in layer.factors}:
            users[storage].append(layer.name)
    tied = {name: shared for shared in users.values() if len(shared) > 1 for name in shared}
    for name in changed:
        if name in tied:
            raise NotImplementedError(
                f"modules {' and '.join(tied[name])} share their factors: not supported"
            )


def _plan(
    adapted: AdaptedLayer, rank: int, rows: Any, seed: int, gaussian: bool
) -> tuple[RankChange, tuple[FactorChange, FactorChange]]:
    """What will be done to a layer, and its factors afterwards."""
    if rank < adapted.rank:
        return _shrunk(adapted, rank, seed, gaussian)
    a, b = (factor.detach() for factor in adapted.factors)
    new_rows, new_columns = _new_ranks(adapted, rank - adapted.rank, rows, seed, gaussian)
    grown = torch.cat([a, _like(a, 0, new_rows)]), torch.cat([b, _like(b, 1, new_columns)], 1)
    change = RankChange(adapted.name, adapted.rank, rank, np.empty(0))
    return change, (
        FactorChange(adapted.factors[0], 0, rank, grown[0]),
        FactorChange(adapted.factors[1], 1, rank, grown[1]),
    )


def _like(factor: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix ``(r, in)`` or ``(out, r)`` in the shape of a factor, which can be a convolution's."""
    tail = factor.shape[1:] if axis == 0 else (-1, *factor.shape[2:])
    return matrix.to(factor).reshape(matrix.shape[0], *tail).contiguous()


def _new_ranks(
    adapted: AdaptedLayer, n: int, rows: Any, seed: int, gaussian: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """New rows of A ``(n, in)`` and columns of B ``(out, n)`` whose product is zero."""
    a, b = adapted.factors
    out, fan_in = b.shape[0], math.prod(a.shape[1:])
    zeros = torch.zeros(out, n)
    if rows is not None:
        return _checked_rows(adapted.name, rows, n, fan_in), zeros
    # Drawn on the CPU: the same rows on every device.
    generator = torch.Generator().manual_seed(_module_seed(seed, adapted.name, adapted.rank))
    if adapted.is_embedding:
        return torch.zeros(n, fan_in), torch.randn(out, n, generator=generator)
    if gaussian:
        return torch.randn(n, fan_in, generator=generator) / (adapted.rank + n), zeros
    # Kaiming's uniform distribution with a = sqrt(5) has this bound.
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(n, fan_in).uniform_(-bound, bound, generator=generator), zeros


def _checked_rows(name: str, rows: Any, n: int, fan_in: int) -> torch.Tensor:
    rows = torch.as_tensor(rows).detach()
    if rows.ndim != 2 or len(rows) < n or rows.shape[1] != fan_in:
        raise ValueError(
            f"directions: module {name!r} needs an array of {n} or more rows of {fan_in}, not "
            f"{tuple(rows.shape)}"
        )
    if not torch.isfinite(rows[:n]).all():
        raise NumericalError(f"directions: module {name!r}: NaN or infinite values")
    return rows[:n]


def _module_seed(seed: int, name: str, rank: int) -> int:
    # The rank is part of it: ranks that are appended in two calls must differ, or they would train alike.
    digest = hashlib.blake2b(f"{seed}/{rank}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _shrunk(
    adapted: AdaptedLayer, rank: int, seed: int, gaussian: bool
) -> tuple[RankChange, tuple[FactorChange, FactorChange]]:
    a, b = adapted.factors
    exact = torch.float32 if a.device.type == "mps" else torch.float64
    A, B = a.detach().flatten(1).to(exact), b.detach().flatten(1).to(exact)
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NumericalError(f"module {adapted.name!r}: its factors hold NaN or infinite values")
    basis = _truncation(A, B, rank)
    new_a, new_b, of_a, of_b = basis.A, basis.B, basis.of_a, basis.of_b
    if missing := rank - len(new_a):
        # More ranks than the module has dimensions: what is left of them starts anew.
        rows, columns = _new_ranks(adapted, missing, None, seed, gaussian)
        new_a, new_b = torch.cat([new_a, rows.to(A)]), torch.cat([new_b, columns.to(B)], 1)
        of_a, of_b = (torch.cat([of, of.new_zeros(missing, of.shape[1])]) for of in (of_a, of_b))
    dropped = abs(adapted.scaling) * basis.dropped.double().cpu().numpy()
    return RankChange(adapted.name, adapted.rank, rank, dropped), (
        FactorChange(a, 0, rank, _like(a, 0, new_a), of_a, of_b),
        FactorChange(b, 1, rank, _like(b, 1, new_b), of_b, of_a),
    )


@dataclass(frozen=True, slots=True)
class _Truncation:
    """The best approximation of ``B @ A`` at rank k.

    ``A' = of_a A`` and ``B' = B of_b^T`` with coefficients ``(k, r)`` and ``of_a of_b^T = I``.
    """

    A: torch.Tensor
    B: torch.Tensor
    of_a: torch.Tensor
    of_b: torch.Tensor
    dropped: torch.Tensor


def _truncation(A: torch.Tensor, B: torch.Tensor, rank: int) -> _Truncation:
    """The truncated product of ``B (out, r)`` and ``A (r, in)``, with its change of basis.

    The rows of the new A are orthogonal and as long as the old ones on average, and B holds the
    singular values. So steps keep their size, and an update that is still zero stays trainable, which
    it would not in balanced form. Where A is no good basis (of an embedding it begins as zeros), the
    parts of A and B are exchanged.
    """
    q_a, r_a = torch.linalg.qr(A.T)
    q_b, r_b = torch.linalg.qr(B)
    U, s, Vh = torch.linalg.svd(r_b @ r_a.T)
    if _conditioning(r_a) >= min(_conditioning(r_b), _ILL_CONDITIONED):
        rows, of_a, of_b = _orthogonal(q_a, r_a, Vh[:rank])
        return _Truncation(rows, B @ of_b.T, of_a, of_b, s[rank:])
    columns, of_b, of_a = _orthogonal(q_b, r_b, U.T[:rank])
    return _Truncation(of_a @ A, columns.T, of_a, of_b, s[rank:])


def _orthogonal(
    Q: torch.Tensor, R: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A factor ``X = (Q R)^T (r, n)`` in another basis: ``c directions Q^T``.

    Returns it with the coefficients ``(k, r)`` of itself and of the other factor.
    """
    length = float(R.norm()) / math.sqrt(R.shape[1]) or 1.0
    own = length * directions @ torch.linalg.pinv(R.T)
    return length * directions @ Q.T, own, directions @ R / length


def _conditioning(R: torch.Tensor) -> float:
    """The smallest singular value over the largest; 0 for zeros."""
    values = torch.linalg.svdvals(R)
    return float(values[-1] / values[0]) if values[0] > 0 else 0.0


def _data_parallel(model: Any) -> list[Any]:
    """The wrappers by which processes share the model's gradients."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    ours = {id(parameter) for parameter in model.parameters()}
    # Nothing leads from a module to its wrapper. One that is missed would silently stop to exchange the
    # gradients of the factors that change.
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    wrappers = [found for found in wrappers if any(id(p) in ours for p in found.parameters())]
    for wrapper in wrappers:
        if wrapper._comm_hooks or wrapper.static_graph:
            raise NotImplementedError(
                "the model is wrapped in DistributedDataParallel with a communication hook or a static "
                "graph, which remember shapes: ranks cannot be changed under it"
            )
    return wrappers


def _agree(factor: FactorChange, wrappers: Sequence[Any]) -> None:
    """Take the first process's numbers: decompositions may differ in the last bits or in signs."""
    for wrapper in wrappers:
        first = dist.get_global_rank(wrapper.process_group, 0)
        for tensor in (factor.values, factor.of_values, factor.of_gradients):
            if tensor is not None:
                dist.broadcast(tensor, first, wrapper.process_group)


def _rebuild_reducer(wrapper: Any) -> None:
    """Let the wrapper see the new shapes, in the way in which it is unpickled."""
    parameters, is_sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, is_sparse, names, wrapper.static_graph)


def divisor(rank: int, rank_stabilized: bool) -> float:
    """What PEFT divides alpha by."""
    return math.sqrt(rank) if rank_stabilized else float(rank)


def alpha_of(scaling: float, rank: int, rank_stabilized: bool) -> float:
    """The alpha from which PEFT computes a scaling: to the bit, where there is such an alpha."""
    by = divisor(rank, rank_stabilized)
    product = scaling * by
    candidates = [
        float(round(product)),
        product,
        math.nextafter(product, math.inf),
        math.nextafter(product, 0),
    ]
    alpha = next((alpha for alpha in candidates if alpha / by == scaling), product)
    return int(alpha) if alpha.is_integer() else alpha


def write_config(config: Any, layers: Iterable[AdaptedLayer]) -> None:
    """Write the ranks and alphas of all layers into PEFT's config.

    `r` becomes the rounded average rank, `lora_alpha` what gives the config's own scaling with it, and
    the patterns say what differs: a key per rank and per alpha.
    """
    layers = list(layers)
    ranks = {layer.name: layer.rank for layer in layers}
    alphas = {layer.name: layer.layer.lora_alpha[layer.adapter] for layer in layers}
    stabilized = bool(config.use_rslora)
    scaling = config.lora_alpha / divisor(config.r, stabilized)
    config.r = math.floor(sum(ranks.values()) / len(ranks) + 0.5)
    config.lora_alpha = alpha_of(scaling, config.r, stabilized)
    config.rank_pattern = {key: rank for rank, key in rank_keys(ranks).items() if rank != config.r}
    distinct = sorted(set(alphas.values()))
    keys = rank_keys({name: distinct.index(alpha) for name, alpha in alphas.items()})
    config.alpha_pattern = {key: distinct[i] for i, key in keys.items() if distinct[i] != config.lora_alpha}
