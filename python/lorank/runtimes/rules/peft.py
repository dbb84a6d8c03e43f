"""The rules of PEFT, PEFT's hot-swapping, `load_adapter` of transformers, and Unsloth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lorank.adapters.formats.peft_notes import without_magnitude
from lorank.adapters.module import LoraModule
from lorank.modules import naming
from lorank.modules.peft_renames import renames_target
from lorank.peft_format.names import MAGNITUDE
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import Runtime, by_settings_or_stabilized, no_others
from lorank.runtimes.separate_experts import GATES, UPS

# Initialisations that PEFT repeats on loading with the same result.
_REPEATED = ("pissa", "olora")
# Initialisations that PEFT cannot repeat from an adapter's files.
_NEEDS_MORE = ("corda", "loftq")


def _scale(a: Found, module: LoraModule) -> float:
    return 0.0 if module.name in a.unselected or module.name in _never_stacked(a) else module.scaling


def _never_stacked(a: Found) -> list[str]:
    """Return the names of separate experts that the base model stacks and PEFT does not convert."""
    if a.base is None or a.base.skeleton is None or not a.separate_experts:
        return []
    model_type = a.base.skeleton.model_type
    names = (module.name for module in a.separate_experts.modules if module.name not in a.base.shapes)
    return [name for name in names if not renames_target(name, model_type)]


def _refuses(a: Found) -> str:
    if a.base is not None and (refusal := a.base.refused(a.modules)):
        return refusal
    experts = a.separate_experts
    if refusal := _separate_experts_refused(a) if experts else "":
        return refusal
    own = {module.name for module in experts.modules}
    if misfits := [found for found in a.misfits if found[0].name not in own]:
        module, rank = misfits[0]
        return f"sizes do not match: {module.name} has rank {module.rank}, but the settings give rank {rank}"
    if tables := a.unequal_tables():
        first, second = tables
        return (
            f"sizes do not match: {first.name} has rank {first.rank} and {second.name} rank {second.rank}, "
            "but ensure_weight_tying makes them share one update"
        )
    if swapped := _swapped_of_other_size(a):
        return (
            f"sizes do not match: {swapped} has inputs and outputs swapped, as PEFT before 0.19 wrote them"
            f"{_although(a)}"
        )
    if (a.of_kinds("expert") or experts) and (setting := _not_with_parameters(a)):
        return f"{setting} is not supported with adapted parameters"
    if (init := a.base_change) and init.lower().startswith(_NEEDS_MORE):
        return f"cannot repeat the initialisation {init!r} of the base model from the adapter's files"
    return ""


def _swapped_of_other_size(a: Found) -> str:
    """Return the name of the first stack in the layout before 0.19 that does not fit the new layout."""
    names = {parameter.name for parameter in a.swapped}
    return next((m.name for m in a.stacks if m.name in names and m.shape[0] != m.shape[1]), "")


def _although(a: Found) -> str:
    """Return a clause for a `peft_version` that contradicts the layout of experts."""
    if not any(parameter.contradicts_version for parameter in a.swapped):
        return ""
    return f", although peft_version is {a.config.get('peft_version')}"


def _not_with_parameters(a: Found) -> str:
    """Return the first setting that PEFT refuses with `target_parameters`; empty if there is none."""
    settings = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
    return next((f"{key}={a.config[key]}" for key in settings if a.config.get(key)), "")


def _separate_experts_refused(a: Found) -> str:
    """Return the reason why separate experts do not fit in stacks; empty if they fit."""
    experts = a.separate_experts
    if problem := experts.unequal() or experts.without_partner() or experts.missing():
        return f"stacks the experts, which must all be adapted with one rank: {problem}"
    targets = a.config.get("target_modules")
    selects = None
    if isinstance(targets, str) and targets != naming.ALL_LINEAR:
        selects = naming.matcher(targets, f"{a.adapter.label}: the settings' target_modules")
    for stack, kinds in experts.by_stack.items():
        for kind, modules in kinds.items():
            name = f"{stack}.{kind}"
            if selects is not None and not selects(name):
                return f"finds no module for target_modules {targets!r}, because it stacks the experts"
            # Gate and up become one parameter, whose rank is twice the global one.
            fused = kind in (*GATES, *UPS)
            rank = int(a.rank) if fused else a.settings.rank_and_scaling(name)[0]
            for module in modules.values():
                if module.rank != rank:
                    return (
                        f"sizes do not match: {module.name} has rank {module.rank}, but it is stacked, and "
                        f"the settings give rank {rank} to each expert of the stack"
                    )
    return ""


def _loses(a: Found) -> Iterable[str]:
    if unselected := a.unselected:
        yield (
            f"adapts {len(a.modules) - len(unselected)} of {len(a.modules)} modules: target_modules leaves "
            f"out {unselected[0]}"
        )
    if lost := _never_stacked(a):
        yield f"leaves out {len(lost)} experts' modules without an error: it does not stack {lost[0]}"
    if without := without_magnitude(a.config, a.adapter.carried, a.adapter.modules):
        yield f"initialises the DoRA magnitudes of {len(without)} modules anew: the file lacks them"
    if a.swapped:
        yield (
            f"reads {a.swapped[0].name} with inputs and outputs swapped, as PEFT before 0.19 wrote "
            f"them{_although(a)}"
        )
    if (init := a.base_change) and init.lower() not in _REPEATED:
        yield f"initialises the base model by {init!r} again, and gets other weights than in training"


def _remark(a: Found) -> str:
    if a.base_change:
        return f"only if the base model has its original weights, because {a.base_change!r} is applied again"
    if a.separate_experts:
        return "stacks the experts on loading if the model's code does"
    return ""


def _transformers_loses(a: Found) -> Iterable[str]:
    yield from _loses(a)
    magnitudes = [key for key in a.adapter.carried if MAGNITUDE in key]
    if magnitudes:
        yield f"initialises the DoRA magnitudes of {len(magnitudes)} modules anew"


def _hotswap_refuses(a: Found) -> str:
    if a.adalora:
        return "AdaLoRA cannot be swapped in"
    if a.config.get("alpha_pattern"):
        return "alpha_pattern must equal that of the replaced adapter: only the portable profile is safe"
    if embeddings := a.of_kinds("embedding"):
        return f"{embeddings[0].name} is an embedding"
    if a.dora:
        return "DoRA magnitudes are not swapped"
    if a.base_change:
        return f"{a.base_change!r} changes the base model, which is not swapped"
    if a.separate_experts:
        return "separate experts are not stacked on swapping"
    if a.swapped:
        return f"{a.swapped[0].name} has inputs and outputs swapped, as PEFT before 0.19 wrote them"
    return no_others(a)


def _hotswap_remark(a: Found) -> str:
    return (
        "only if the replaced adapter adapts the same modules with "
        f"use_rslora={a.rank_stabilized}, use_dora=False and lora_dropout="
        f"{a.config.get('lora_dropout') or 0.0}"
    )


PEFT = Runtime("PEFT", "0.21.2", _scale, _refuses, _loses, _remark, ("compact", "portable", "tensor-rank"))

HOTSWAP = Runtime(
    "PEFT hotswap_adapter",
    "0.21.2",
    by_settings_or_stabilized,
    _hotswap_refuses,
    remark=_hotswap_remark,
    unknown="refuses",
)

TRANSFORMERS = replace(
    PEFT, name="transformers load_adapter", version="5.24", loses=_transformers_loses, needs_prefix=False
)

UNSLOTH = replace(PEFT, name="Unsloth (through PEFT)", version="November 2026")
