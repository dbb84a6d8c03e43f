"""Notes on an adapter in PEFT's format: settings changed on reading, and tensors that are kept unchanged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lorank.adapters import carried as carried_tensors
from lorank.adapters.formats.expert_layout import Parameter


def dora_note(count: int) -> str:
    """Return the remark on an adapter with magnitude vectors."""
    return (
        f"DoRA: {count} magnitude vectors are kept as they are; the certificate covers B A before DoRA "
        "normalises its columns"
    )


def without_magnitude(
    config: Mapping[str, Any], carried: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    """Return the modules of a DoRA adapter that lack magnitudes in the file: PEFT initialises new ones."""
    if not config.get("use_dora"):
        return []
    names = list(names)
    found = set(carried_tensors.magnitudes(carried, set(names)).values())
    return [name for name in names if name not in found]


def of_settings(
    config: Mapping[str, Any], carried: Mapping[str, Any], kind: str, names: Collection[str]
) -> list[str]:
    """Return the remarks on settings, and on tensors that are not factors.

    Parameters
    ----------
    config, carried
        The settings, and the tensors that are not factors.
    kind
        The kind of adapter, ``"LORA"`` or ``"ADALORA"``.
    names
        Paths of the layers with factors.
    """
    notes = []
    if kind == "ADALORA":
        notes.append("AdaLoRA: lora_E was multiplied into B; the result is a plain LoRA adapter")
    if config.get("monteclora_config"):
        notes.append("MonteCLoRA: the sampler, only for training, was removed; the result is a plain LoRA")
    if config.get("alora_invocation_tokens"):
        notes.append("aLoRA: the adapter acts from its invocation tokens on; the settings keep the tokens")
    if config.get("use_rslora"):
        notes.append("rsLoRA: the scaling lora_alpha / sqrt(r) was kept")
    magnitudes = carried_tensors.magnitudes(carried, ())
    if config.get("use_dora") or magnitudes:
        notes.append(dora_note(len(magnitudes)))
    if without := without_magnitude(config, carried, names):
        notes.append(f"DoRA: {len(without)} modules have no magnitude vector; the first is {without[0]}")
    if others := len(carried) - len(magnitudes):
        notes.append(f"{others} tensors that are not factors are kept as they are")
    return notes


def of_experts(config: Mapping[str, Any], stacks: Sequence[Parameter]) -> list[str]:
    """Return the remark on stacks of experts in the layout of PEFT before 0.19."""
    if not stacks:
        return []
    note = f"{len(stacks)} stacks of experts have inputs and outputs swapped, as PEFT before 0.19 wrote them"
    if any(stack.contradicts_version for stack in stacks):
        note += f": their shapes show this layout, although peft_version is {config.get('peft_version')}"
    return [note]
