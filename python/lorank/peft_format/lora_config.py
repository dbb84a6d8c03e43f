r"""Ranks in PEFT's terms. The one place that knows how PEFT matches names to ranks.

PEFT looks a module's rank up by regular expressions: `rank_pattern`'s keys are matched as
``(.*\.)?(KEY)$`` against the module's full name, in order, the first wins, and saving sorts them.
So keys here never overlap, and there is one per rank: a key per module would run into Python's
limited cache of compiled expressions (tens of seconds for a thousand modules).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from lorank.modules import naming, quantized
from lorank.modules.targets import AdaptedModule

ScaleRule = Literal["constant", "rank-stabilized"]

_OURS = (
    "r",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "use_rslora",
)
_DEFAULT_LORA_ALPHA = 8  # PEFT's own


def settings(
    modules: Sequence[AdaptedModule],
    ranks: Mapping[str, int],
    other_modules: Sequence[str],
    model: Any,
    scale_rule: ScaleRule,
    extra: Mapping[str, Any],
    *,
    knows_all: bool = False,
) -> dict[str, Any]:
    """Return the arguments of a `LoraConfig`, all of them values that JSON knows.

    Parameters
    ----------
    modules, ranks
        The modules with a rank, and their ranks by name.
    other_modules
        The names of other modules, which targets must not reach.
    model
        The live model that will be adapted, or None.
    scale_rule, extra
        As in `RankAllocation.to_lora_config`.
    knows_all
        True if no module of the model is missing among the names.

    Raises
    ------
    ValueError
        If `extra` holds an argument that the ranks decide, the rule is unknown, every rank is 0, or
        a name does not resolve to exactly one module of the model.
    """
    if clash := [name for name in _OURS if name in extra]:
        raise ValueError(f"{', '.join(clash)}: decided by the allocation, cannot be passed")
    if scale_rule not in ("constant", "rank-stabilized"):
        raise ValueError(f"scale_rule must be 'constant' or 'rank-stabilized', not {scale_rule!r}")
    adapted = [module for module in modules if ranks[module.name] > 0]
    if not adapted:
        raise ValueError("every rank is 0: nothing is left to adapt")
    if model is None:
        names = {module.name: module.name for module in adapted}
        others: Iterable[str] = [*other_modules, *(m.name for m in modules if ranks[m.name] == 0)]
    else:
        names = resolve(adapted, model)
        others = [name for name, _ in model.named_modules()]
    by_name = {names[module.name]: ranks[module.name] for module in adapted}
    lora_alpha = extra.get("lora_alpha", _DEFAULT_LORA_ALPHA)
    if not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha must be a positive number, not {lora_alpha!r}")
    r = max(1, math.floor(sum(by_name.values()) / len(by_name) + 0.5))

    by_parameter = {m.name for m in adapted if m.kind == "expert" or naming.is_parameter(m.name)}
    linear = [names[module.name] for module in adapted if module.name not in by_parameter]
    parameters = [names[module.name] for module in adapted if module.name in by_parameter]
    if parameters and extra.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout must be 0: PEFT adapts {parameters[0]!r} as a parameter, without dropout"
        )
    keys = rank_keys(by_name)
    result: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {key: rank for rank, key in keys.items() if rank != r},
        "alpha_pattern": {
            key: alpha
            for rank, key in keys.items()
            if (alpha := _alpha(rank, r, lora_alpha, scale_rule)) != lora_alpha
        },
        "target_modules": linear,
        "use_rslora": False,
    }
    if parameters:
        result["target_parameters"] = parameters
    excluded = accidental_matches(linear, others)
    if model is None and not knows_all:
        excluded = either(excluded, guard(linear))
    if excluded:
        result["exclude_modules"] = excluded
    return {**extra, **result}


def _alpha(rank: int, r: int, lora_alpha: float, scale_rule: ScaleRule) -> float:
    """The module's alpha, so that ``alpha / rank`` is the scale that the rule asks for."""
    alpha = rank * lora_alpha / r if scale_rule == "constant" else lora_alpha * math.sqrt(rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def rank_keys(ranks: Mapping[str, int]) -> dict[int, str]:
    """One regular expression per rank that matches its modules, under any prefix, and no other's."""
    shadowed = _shadowed(ranks)
    by_rank: dict[int, list[str]] = defaultdict(list)
    for name, rank in ranks.items():
        # `^` forbids a prefix: needed where another module's name ends with this one's.
        by_rank[rank].append(("^" if name in shadowed else "") + re.escape(name))
    return {rank: f"(?:{'|'.join(members)})" for rank, members in sorted(by_rank.items())}


def _shadowed(names: Iterable[str]) -> set[str]:
    """The names that are a dotted suffix of another name."""
    known = set(names)
    return {suffix for name in known for suffix in _proper_suffixes(name) if suffix in known}


def _proper_suffixes(name: str) -> Iterator[str]:
    """The dotted suffixes of a name without itself, longest first."""
    return islice(naming.suffixes(name), 1, None)


def guard(targets: Sequence[str]) -> str | None:
    """Return an expression for modules in numbered blocks that end with the name of one outside of blocks.

    ``proj_out`` also selects every ``blocks.0.proj_out``, and these names need not be known. A prefix that
    only some names of a model have, such as ``bert.``, holds no number.
    """
    short = [name for name in targets if not any(part.isdigit() for part in name.split("."))]
    if not short:
        return None
    hit = rf"(?:.*\.)?\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, short))})"
    kept = [name for name in targets if not set(short).isdisjoint(_proper_suffixes(name))]
    return rf"(?!(?:.*\.)?(?:{'|'.join(map(re.escape, kept))})$){hit}" if kept else hit


def only(targets: Sequence[str]) -> str | None:
    """Return an expression for all modules that end with a target and are not targets themselves."""
    if not targets:
        return None
    kept = sorted(_extended(targets))
    unless = rf"(?!(?:{'|'.join(map(re.escape, kept))})$)" if kept else ""
    return rf"{unless}.+\.(?:{_alternatives(targets)})"


def _extended(targets: Sequence[str]) -> set[str]:
    """Return the targets that end with another target."""
    known = set(targets)
    return {name for name in targets if not known.isdisjoint(_proper_suffixes(name))}


def _alternatives(names: Sequence[str]) -> str:
    """Return names as alternatives of an expression; names that differ in the block alone share one."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        numbered = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = numbered.groups() if numbered else (name, "", "")
        kinds[before, after].append(number)
    return "|".join(
        re.escape(before) + (f"(?:{'|'.join(numbers)})" if after else "") + re.escape(after)
        for (before, after), numbers in kinds.items()
    )


def either(*expressions: str | None) -> str | None:
    """Return an expression for all that one of the given ones matches in full; None if there are none."""
    given = [expression for expression in expressions if expression]
    return given[0] if len(given) == 1 else "|".join(f"(?:{one})" for one in given) or None


def accidental_matches(targets: Sequence[str], others: Iterable[str]) -> str | None:
    """A regular expression for modules that a target selects as a suffix although nobody chose them."""
    chosen = set(targets)
    suffixes = {suffix for target in targets for suffix in _proper_suffixes(target)}
    hit = sorted(
        {other for other in others if other not in chosen and not chosen.isdisjoint(_proper_suffixes(other))}
    )
    # Prefixes of the live model may differ, but must not reach a target that ends with the name.
    patterns = [re.escape(name) if name in suffixes else rf"(?:.*\.)?{re.escape(name)}" for name in hit]
    return "|".join(patterns) or None


def resolve(modules: Sequence[AdaptedModule], model: Any) -> dict[str, str]:
    """Every module's name in a live model.

    A name fits a module of that very name, or else the only one whose name ends with it, or else
    the longest one that it ends with: prefixes like ``bert.`` come and go between files and models.

    Raises
    ------
    ValueError
        If a name fits none or several, two names fit the same, or shapes differ.
    """
    live: dict[str, Any] = dict(model.named_modules())
    live |= {name: p for name, p in model.named_parameters() if p.ndim == 3}
    ending: dict[str, list[str]] = defaultdict(list)
    for name in live:
        for suffix in _proper_suffixes(name):
            ending[suffix].append(name)
    resolved: dict[str, str] = {}
    for module in modules:
        name = module.name
        if name in live:
            found = [name]
        else:
            found = ending[name] or [s for s in _proper_suffixes(name) if s in live][:1]
        if len(found) != 1:
            what = (
                f"fits several of its modules ({', '.join(found[:3])})"
                if found
                else "fits none of its modules"
            )
            raise ValueError(
                f"{name!r} {what}: {type(model).__name__} names its modules otherwise than the source "
                "did; pass the live model itself to analyze or allocate"
            )
        _check_shape(module, found[0], live[found[0]])
        resolved[name] = found[0]
    if len(set(resolved.values())) < len(resolved):
        raise ValueError("two names of the allocation fit the same module of the model")
    return resolved


def _check_shape(module: AdaptedModule, live_name: str, target: Any) -> None:
    shape = quantized.module_shape(target)
    if shape is None:
        raise ValueError(f"{live_name!r} is a {type(target).__name__}, which has no weight to adapt")
    experts, matrix = (shape[0], shape[1:]) if module.kind == "expert" else (1, shape)
    flattened = (matrix[0], math.prod(matrix[1:]))
    if sorted(flattened) != sorted(module.shape) or experts != module.copies:
        raise ValueError(
            f"{module.name!r} has shape {module.shape} in the source, but {live_name!r} of the model "
            f"has {tuple(shape)}"
        )
