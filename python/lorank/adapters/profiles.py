"""Three ways to write an adapter for PEFT and the serving engines.

What they share is that every scaling ends in the factors, so that each runtime's own formula gives
the same update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.adapters import carried
from lorank.adapters.content import AdapterContent, Profile
from lorank.adapters.formats.expert_layout import FIRST_VERSION, held_order, is_earlier
from lorank.adapters.formats.peft import PREFIX
from lorank.adapters.module import LoraModule
from lorank.modules import naming
from lorank.peft_format.lora_config import accidental_matches, either, guard, only, rank_keys
from lorank.peft_format.rank_groups import rank_groups, rank_owner, separate_experts
from lorank.peft_format.settings import ONLY_FOR_TRAINING

Array = npt.NDArray[Any]

PROFILES: tuple[Profile, ...] = ("compact", "portable", "tensor-rank")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a module is written.

    Attributes
    ----------
    rank
        Of the written factors: its own, or the one that it is padded to.
    b_factor
        What ``scaling * B`` is multiplied with.
    """

    rank: int
    b_factor: float


def layouts(adapter: AdapterContent, profile: Profile) -> dict[str, Layout]:
    """Every written module's layout by name.

    Raises
    ------
    ValueError
        If no module has any rank left, or there is no such profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(map(repr, PROFILES))}, not {profile!r}")
    if reason := nothing_left(adapter):
        raise ValueError(reason)
    modules = adapter.modules
    largest = max(module.rank for module in adapter.adapted)
    if profile == "portable":
        return {name: Layout(largest, 1.0) for name in modules}
    more = carried.owners(adapter)
    # PEFT has no rank 0: a module that is needed for something else gets a rank of zeros.
    ranks = {name: max(m.rank, 1) for name, m in modules.items() if m.rank or name in more}
    for group in rank_groups(modules.values(), adapter.config):
        if largest_of_group := max(ranks.get(name, 0) for name in group):
            ranks |= dict.fromkeys(group, largest_of_group)
    if experts := separate_experts(ranks):
        ranks |= dict.fromkeys(experts, max(ranks[name] for name in experts))
    ranks = {name: ranks[name] for name in modules if name in ranks}
    if profile == "compact":
        return {name: Layout(rank, 1.0) for name, rank in ranks.items()}
    common = _common_rank(ranks)
    return {name: Layout(rank, rank / common) for name, rank in ranks.items()}


def _common_rank(ranks: Mapping[str, int]) -> int:
    """Return the settings' `r`: the rank of experts one by one, as PEFT looks up no other for them."""
    return max(ranks[name] for name in separate_experts(ranks) or ranks)


def nothing_left(adapter: AdapterContent) -> str | None:
    """Why there is nothing to write, if there is nothing."""
    if adapter.adapted:
        return None
    if adapter.certificate is not None and adapter.certificate.norm == 0:
        return "every update is zero: the adapter is untrained, or what was merged cancels out"
    return "no module has any rank left: ask for a larger share, rank or budget"


def settings(adapter: AdapterContent, profile: Profile) -> dict[str, Any]:
    """The `adapter_config.json` that gives every module its rank and the scale 1 (of `Layout`)."""
    written = {name: layout.rank for name, layout in layouts(adapter, profile).items()}
    common = _common_rank(written)
    modules = [adapter.modules[name] for name in written]
    dropped = [name for name in adapter.modules if name not in written]
    linear = [m.name for m in modules if m.kind != "expert" and rank_owner(m.name) == m.name]
    stacks = [module.name for module in modules if module.kind == "expert"]
    looked_up = {name: rank for name, rank in written.items() if rank_owner(name) == name}
    ranks = {key: rank for rank, key in rank_keys(looked_up).items() if rank != common}
    before = adapter.config
    kept = None if dropped else _kept_targets(before, linear)
    has_biases = any(key.endswith(".bias") for key in adapter.carried)
    return {
        **{key: value for key, value in before.items() if key not in ONLY_FOR_TRAINING},
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks) if profile == "compact" else {},
        "use_rslora": False,
        # Biases are loaded by name, whatever is said here; but an engine that cannot must hear of them.
        "bias": (before.get("bias") if has_biases else None) or "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": kept or linear,
        "exclude_modules": before.get("exclude_modules") if kept else _excluded(before, linear, dropped),
        "target_parameters": stacks or None,
        # PEFT refuses dropout beside adapted parameters, which experts one by one become on loading.
        **({"lora_dropout": 0.0} if any(naming.is_in_experts(m.name) for m in modules) else {}),
        # Stacks are written as PEFT lays them out today, whoever wrote them before.
        **({"peft_version": FIRST_VERSION} if stacks and is_earlier(before) else {}),
    }


def _kept_targets(before: Mapping[str, Any], names: Sequence[str]) -> list[str] | None:
    """The target modules of earlier settings, if they still select what is written."""
    targets, excluded = before.get("target_modules"), before.get("exclude_modules")
    # A choice of layers is not written again: suffixes alone would select more.
    if not isinstance(targets, (list, tuple)) or before.get("layers_to_transform") is not None:
        return None
    selects, excludes = naming.matcher(targets), naming.matcher(excluded or [])
    # A merge may adapt more than its first adapter did.
    return sorted(targets) if all(selects(name) and not excludes(name) for name in names) else None


def _excluded(before: Mapping[str, Any], names: Sequence[str], dropped: Sequence[str]) -> str | None:
    """Return an expression for modules that end with a full name of the list, but were not adapted.

    Other modules than the adapted ones are not known. Earlier settings that exclude them are written again,
    unless they match one of the names. A plain list of targets never left out a module that ends with a full
    name.
    """
    targets, earlier = before.get("target_modules"), _expression(before.get("exclude_modules"))
    if targets is None:
        return either(accidental_matches(names, dropped), guard(names))
    is_plain = isinstance(targets, (list, tuple)) and before.get("layers_to_transform") is None
    if not is_plain or (earlier and any(map(naming.matcher(earlier), names))):
        return only(names)
    selects = naming.matcher(targets)
    # A merge may adapt what its first adapter did not select.
    return either(accidental_matches(names, dropped), earlier) if all(map(selects, names)) else only(names)


def _expression(names: Any) -> str | None:
    """Return names as one expression; PEFT reads them as a list of suffixes or a regular expression."""
    if not names or isinstance(names, str):
        return names or None
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def factors(module: LoraModule, layout: Layout) -> tuple[Array, Array]:
    """``B`` and ``A`` as PEFT stores them: padded, scaled, experts interleaved, kernels unflattened."""
    return unscaled(module, layout.rank, module.scaling * layout.b_factor)


def unscaled(module: LoraModule, rank: int, factor: float = 1.0) -> tuple[Array, Array]:
    """Return ``B``, times a factor, and ``A`` in PEFT's shapes at a rank that is not below the module's."""
    pairs = [(b.to_array(), a.to_array()) for b, a in module.factors()] if module.rank else []
    pairs = (
        pairs
        or [(np.zeros((module.shape[0], 0), np.float32), np.zeros((0, module.shape[1]), np.float32))]
        * module.copies
    )
    bs, as_ = zip(*[_padded(b, a, rank, factor) for b, a in pairs], strict=True)
    if module.kind == "expert":
        # A: expert slowest; B: expert fastest.
        return np.stack(bs, axis=2).reshape(module.shape[0], -1), np.concatenate(as_)
    b_shape, a_shape = shapes(module, rank)
    return bs[0].reshape(b_shape), as_[0].reshape(a_shape)


def shapes(module: LoraModule, rank: int) -> tuple[list[int], list[int]]:
    """The stored shapes of B and A of a module that is no stack."""
    return [module.shape[0], rank, *module.b_tail], [rank, *(module.a_tail or module.shape[1:])]


def is_written_as_it_is(module: LoraModule, layout: Layout) -> bool:
    """Whether no padding, no scaling and no interleaving is needed."""
    unscaled = module.scaling * layout.b_factor == 1.0
    return unscaled and module.rank == layout.rank and module.kind != "expert"


def _padded(b: Array, a: Array, rank: int, factor: float) -> tuple[Array, Array]:
    missing = rank - a.shape[0]
    if factor != 1.0:
        b = (b.astype(np.float64) * factor).astype(b.dtype)
    if missing:
        b, a = np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))
    return np.ascontiguousarray(b), np.ascontiguousarray(a)


def keys(adapter: AdapterContent, names: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Every written module's keys of B and of A."""
    depth = _depths(adapter, names)
    found = {}
    for name in names:
        module = adapter.modules[name]
        if module.kind == "embedding":
            found[name] = (f"{PREFIX}{name}.lora_embedding_B", f"{PREFIX}{name}.lora_embedding_A")
            continue
        path = name.rpartition(".")[0] + ".base_layer" * depth[name] if module.kind == "expert" else name
        found[name] = (f"{PREFIX}{path}.lora_B.weight", f"{PREFIX}{path}.lora_A.weight")
    return found


def _depths(adapter: AdapterContent, names: Mapping[str, Any]) -> dict[str, int]:
    """How many wrappers lie around a stacked parameter's own: as many as its module has later ones."""
    by_module: dict[str, list[str]] = {}
    for name in names:
        if adapter.modules[name].kind == "expert":
            module, _, parameter = name.rpartition(".")
            by_module.setdefault(module, []).append(parameter)
    return {
        f"{module}.{parameter}": depth
        for module, parameters in by_module.items()
        for depth, parameter in enumerate(reversed(held_order(parameters)))
    }


def bias_key(name: str) -> str:
    """The key of a module's `lora_bias`."""
    return f"{PREFIX}{name}.lora_B.bias"
