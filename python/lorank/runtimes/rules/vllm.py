"""The rules of vLLM before and since 0.32, and of Aphrodite, which is derived from it."""

from __future__ import annotations

from dataclasses import replace

from lorank.peft_format.names import BASE_WEIGHT
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    by_module,
    by_settings_or_stabilized,
    first_of,
    no_lora_biases,
    no_others,
    no_replication,
)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The allowed values of `--max-lora-rank`."""

DEFAULT_MAX_RANK = 16

_TABLES = ("embed_tokens", "lm_head")
_HEADS = ("score", "classifier")

# Base weights of adapted embeddings and heads, which are accepted and ignored.
_PASSED_OVER = tuple(f".{name}{BASE_WEIGHT}" for name in _TABLES)
_GATES = ("gate_up_proj", "w13_weight")
_DOWNS = ("down_proj", "w2_weight")


def _refuses(a: Found) -> str:
    return first_of(_features(a), _saved_modules(a), _rest(a))


def _old_refuses(a: Found) -> str:
    saved = a.config.get("modules_to_save")
    reason = f"modules_to_save is not supported: {', '.join(saved)}" if saved else ""
    return first_of(_features(a), reason, _rest(a))


def _features(a: Found) -> str:
    if a.adalora:
        return "does not recognise the names of AdaLoRA's tensors (lora_E)"
    if a.dora:
        return "DoRA is not supported"
    if a.alora:
        return "aLoRA is not supported"
    if a.base_change:
        return f"init_lora_weights={a.base_change!r} is not supported"
    if (bias := a.config.get("bias") or "none") != "none":
        return f"bias={bias!r} is not supported"
    return no_replication(a)


def _saved_modules(a: Found) -> str:
    saved = [name for name in a.config.get("modules_to_save") or () if name not in _HEADS]
    return f"modules_to_save is not supported: {', '.join(saved)}" if saved else ""


def _rest(a: Found) -> str:
    return first_of(_modules(a), _experts(a), _rank(a), no_lora_biases(a), no_others(a, but=_is_taken))


def _is_taken(key: str) -> bool:
    return key.endswith(_PASSED_OVER) or any(f".{head}." in key for head in _HEADS)


def _modules(a: Found) -> str:
    if convolutions := a.of_kinds("conv"):
        return f"{convolutions[0].name} is a convolution"
    others = [m.name for m in a.of_kinds("embedding") if m.name.rpartition(".")[2] not in _TABLES]
    return f"{others[0]} is an embedding other than embed_tokens and lm_head" if others else ""


def _experts(a: Found) -> str:
    """Return the reason why adapted experts are not loaded; empty if they are."""
    if unequal := a.separate_experts.unequal():
        return f"needs one rank for all experts of a block: {unequal}"
    owners: dict[str, set[str]] = {}
    for module in a.stacks:
        owner, _, parameter = module.name.rpartition(".")
        owners.setdefault(owner, set()).add(parameter)
    for owner, parameters in owners.items():
        gates, downs = parameters.intersection(_GATES), parameters.intersection(_DOWNS)
        if gates and not downs:
            return f"reads the factors of {owner}.{min(gates)} as down_proj, because it needs factors of both"
        if downs and not gates:
            return f"needs gate_up_proj with {owner}.{min(downs)}"
    if a.swapped:
        return f"{a.swapped[0].name} has inputs and outputs swapped, as PEFT before 0.19 wrote them"
    return ""


def _rank(a: Found) -> str:
    rank = needed_rank(a)
    return f"rank {rank} is above {RANKS[-1]}, the largest --max-lora-rank" if rank > RANKS[-1] else ""


def needed_rank(a: Found) -> int:
    """Return the rank that vLLM must support: the largest rank of a tensor, or the global rank if larger."""
    return max(a.largest_rank, int(a.rank))


def _remark(a: Found) -> str:
    remarks = []
    rank = needed_rank(a)
    if rank > DEFAULT_MAX_RANK:
        remarks.append(f"needs --max-lora-rank {next(allowed for allowed in RANKS if allowed >= rank)}")
    if a.stacks:
        remarks.append("most models with fused experts need --enable-mixed-moe-lora-format")
    return "; ".join(remarks)


VLLM = Runtime(
    "vLLM",
    "0.33",
    by_module,
    _refuses,
    remark=_remark,
    profiles=("compact", "portable", "tensor-rank"),
    needs_prefix=False,
)

VLLM_OLD = replace(
    VLLM,
    name="vLLM up to 0.31",
    version="0.31",
    scale=by_settings_or_stabilized,
    refuses=_old_refuses,
    profiles=("portable",),
)

APHRODITE = replace(VLLM_OLD, name="Aphrodite", version="0.24")
