"""The content of `adapter_config.json` in a written adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.expert_layout import FIRST_VERSION, is_earlier
from lorank.adapters.profiles import common_rank
from lorank.modules import naming
from lorank.peft_format.fields import ONLY_FOR_TRAINING
from lorank.peft_format.rank_groups import rank_owner, separate_experts
from lorank.peft_format.rank_patterns import rank_keys
from lorank.peft_format.target_expressions import accidental_matches, as_expression, either, guard, only

_EXCLUDED = "the settings' exclude_modules"


def settings(
    adapter: AdapterContent, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Return the settings that give every module its rank, and its scale in the profile.

    Parameters
    ----------
    adapter
        The adapter.
    ranks
        Rank of each written module by name.
    alphas
        Alpha of each written module by name; empty if the largest rank is the alpha of all.
    """
    common = common_rank(ranks)
    modules = [adapter.modules[name] for name in ranks]
    dropped = [name for name in adapter.modules if name not in ranks]
    linear = [m.name for m in modules if m.kind != "expert" and rank_owner(m.name) == m.name]
    stacks = [module.name for module in modules if module.kind == "expert"]
    looked_up = {name: rank for name, rank in ranks.items() if rank_owner(name) == name}
    patterns = {key: rank for rank, key in rank_keys(looked_up).items() if rank != common}
    common_alpha = _common_alpha(ranks, alphas, common)
    own_alphas = {name: alpha for name, alpha in alphas.items() if name in looked_up}
    before = adapter.config
    kept = None if dropped else _kept_targets(before, linear)
    has_biases = any(key.endswith(".bias") for key in adapter.carried)
    return {
        **{key: value for key, value in before.items() if key not in ONLY_FOR_TRAINING},
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common_alpha,
        "rank_pattern": patterns,
        "alpha_pattern": {
            key: alpha for alpha, key in rank_keys(own_alphas).items() if alpha != common_alpha
        },
        "use_rslora": False,
        # PEFT loads biases by name and ignores `bias`. Engines that cannot load biases read `bias`.
        "bias": (before.get("bias") if has_biases else None) or "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": kept or linear,
        "exclude_modules": before.get("exclude_modules") if kept else _excluded(before, linear, dropped),
        "target_parameters": stacks or None,
        # PEFT refuses dropout with adapted parameters, and loads single experts as adapted parameters.
        **({"lora_dropout": 0.0} if any(naming.is_in_experts(m.name) for m in modules) else {}),
        # Stacks are written in PEFT's current layout.
        **({"peft_version": FIRST_VERSION} if stacks and is_earlier(before) else {}),
    }


def _common_alpha(ranks: Mapping[str, int], alphas: Mapping[str, float], common: int) -> float:
    """Return the settings' `lora_alpha`: that of separate experts, or else of modules of the common rank."""
    if not alphas:
        return common
    names = separate_experts(ranks) or [name for name, rank in ranks.items() if rank == common]
    ((alpha, _),) = Counter(alphas[name] for name in names).most_common(1)
    return alpha


def _kept_targets(before: Mapping[str, Any], names: Sequence[str]) -> list[str] | None:
    """Return the target modules of earlier settings; None if they do not select every written module."""
    targets, excluded = before.get("target_modules"), before.get("exclude_modules")
    # A choice of layers is not written again: suffixes alone would select more.
    if not isinstance(targets, (list, tuple)) or before.get("layers_to_transform") is not None:
        return None
    selects, excludes = naming.matcher(targets), naming.matcher(excluded or [], _EXCLUDED)
    # A merged adapter has its first term's settings, but may adapt more modules.
    return sorted(targets) if all(selects(name) and not excludes(name) for name in names) else None


def _excluded(before: Mapping[str, Any], names: Sequence[str], dropped: Sequence[str]) -> str | None:
    """Return an expression for unadapted modules whose names end with a name in the list.

    The base model's other modules are not known. An earlier expression that excludes some of them is kept,
    unless it matches a name in the list. Earlier targets that are a plain list also selected every module
    whose name ends with a name in the list.
    """
    targets, earlier = before.get("target_modules"), as_expression(before.get("exclude_modules"))
    if targets is None:
        return either(accidental_matches(names, dropped), guard(names))
    is_plain = isinstance(targets, (list, tuple)) and before.get("layers_to_transform") is None
    if not is_plain or (earlier and any(map(naming.matcher(earlier, _EXCLUDED), names))):
        return only(names)
    selects = naming.matcher(targets)
    # A merged adapter may adapt modules that its first term's settings do not select.
    return either(accidental_matches(names, dropped), earlier) if all(map(selects, names)) else only(names)
