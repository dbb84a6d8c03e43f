"""The arguments of a `LoraConfig` that gives modules of a model their ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lorank.modules import naming
from lorank.modules.targets import AdaptedModule
from lorank.peft_format.fields import DEFAULT_ALPHA
from lorank.peft_format.live_names import resolve
from lorank.peft_format.rank_patterns import rank_keys
from lorank.peft_format.target_expressions import accidental_matches, either, guard

ScaleRule = Literal["constant", "rank-stabilized"]

_DECIDED = (
    "r",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "use_rslora",
)


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
    """Return the arguments of a `LoraConfig`, all of them JSON values.

    Parameters
    ----------
    modules, ranks
        The modules with a rank, and their ranks by name.
    other_modules
        The names of other modules, which targets must not select.
    model
        The live model that will be adapted, or None.
    scale_rule, extra
        As in `RankAllocation.to_lora_config`.
    knows_all
        True if `modules` and `other_modules` name every module of the model.

    Raises
    ------
    ValueError
        If `extra` holds an argument that the ranks decide, the rule is unknown, every rank is 0, or
        a name does not resolve to exactly one module of the model.
    """
    _check_arguments(scale_rule, extra)
    adapted = [module for module in modules if ranks[module.name] > 0]
    if not adapted:
        raise ValueError("every rank is 0: nothing is left to adapt")
    if model is None:
        names = {module.name: module.name for module in adapted}
        others: Iterable[str] = [*other_modules, *(m.name for m in modules if ranks[m.name] == 0)]
    else:
        names = resolve(adapted, model)
        others = [name for name, _ in model.named_modules()]
    by_parameter = {m.name for m in adapted if m.kind == "expert" or naming.is_parameter(m.name)}
    linear = [names[module.name] for module in adapted if module.name not in by_parameter]
    parameters = [names[module.name] for module in adapted if module.name in by_parameter]
    if parameters and extra.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout must be 0: PEFT adapts {parameters[0]!r} as a parameter, without dropout"
        )
    result = _ranks_and_alphas({names[m.name]: ranks[m.name] for m in adapted}, scale_rule, extra)
    result |= {"target_modules": linear, "use_rslora": False}
    if parameters:
        result["target_parameters"] = parameters
    excluded = accidental_matches(linear, others)
    if model is None and not knows_all:
        excluded = either(excluded, guard(linear))
    if excluded:
        result["exclude_modules"] = excluded
    return {**extra, **result}


def _check_arguments(scale_rule: str, extra: Mapping[str, Any]) -> None:
    if clash := [name for name in _DECIDED if name in extra]:
        raise ValueError(f"{', '.join(clash)}: decided by the allocation and cannot be passed")
    if scale_rule not in ("constant", "rank-stabilized"):
        raise ValueError(f"scale_rule must be 'constant' or 'rank-stabilized', not {scale_rule!r}")


def _ranks_and_alphas(
    ranks: Mapping[str, int], scale_rule: ScaleRule, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the rank, the alpha and their patterns."""
    lora_alpha = extra.get("lora_alpha", DEFAULT_ALPHA)
    if not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha must be a positive number, not {lora_alpha!r}")
    r = max(1, math.floor(sum(ranks.values()) / len(ranks) + 0.5))
    keys = rank_keys(ranks)
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {key: rank for rank, key in keys.items() if rank != r},
        "alpha_pattern": {
            key: alpha
            for rank, key in keys.items()
            if (alpha := _alpha(rank, r, lora_alpha, scale_rule)) != lora_alpha
        },
    }


def _alpha(rank: int, r: int, lora_alpha: float, scale_rule: ScaleRule) -> float:
    """Return the module's alpha; ``alpha / rank`` is the scale that the rule gives."""
    alpha = rank * lora_alpha / r if scale_rule == "constant" else lora_alpha * math.sqrt(rank)
    return int(alpha) if float(alpha).is_integer() else alpha
