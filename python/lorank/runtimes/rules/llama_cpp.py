"""The rules of llama.cpp, whose converter writes GGUF files, and of Ollama, which has its own converter."""

from __future__ import annotations

from collections.abc import Iterable

from lorank.peft_format.names import BASE_WEIGHT
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    by_tensor,
    every_token,
    first_of,
    is_router,
    leaves_out,
    no_lora_biases,
    no_others,
    no_replication,
    original_base,
)

# Modules that the converter of Ollama can name.
_OLLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj")


def _refuses(a: Found) -> str:
    if a.adalora:
        return "its converter stops at AdaLoRA's tensors (lora_E)"
    if a.dora:
        return "DoRA is not supported"
    return first_of(
        _modules(a), _tables(a), _experts(a), no_replication(a), no_lora_biases(a), no_others(a, but=_known)
    )


def _modules(a: Found) -> str:
    others = [m for m in a.of_kinds("conv", "expert") if not is_router(m)]
    return f"{others[0].name} is not a plain linear layer ({others[0].kind})" if others else ""


def _tables(a: Found) -> str:
    if not a.shares_tables:
        return ""
    tables = [m.name for m in a.modules if _is_table(m.name)]
    return f"{tables[0]} is tied, and a GGUF file holds no separate table for it" if tables else ""


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] in ("embed_tokens", "lm_head")


def _experts(a: Found) -> str:
    """Return the reason why experts do not fit in the stack of a GGUF file; empty if they fit."""
    unequal = a.separate_experts.unequal() or a.separate_experts.missing()
    return f"stacks the experts, which therefore need one rank: {unequal}" if unequal else ""


def _known(key: str) -> bool:
    """Return True for tensors that the converter copies or skips and that llama.cpp does not apply."""
    return "_layernorm" in key or ".norm" in key or BASE_WEIGHT in key


def _loses(a: Found) -> Iterable[str]:
    yield from leaves_out(a.others)
    if a.alora:
        yield "applies aLoRA to every token through its C API; only llama-server reads the invocation tokens"
    yield from original_base(a)


def _remark(a: Found) -> str:
    tables = [m.name for m in a.modules if _is_table(m.name)] if a.shares_tables is None else []
    return f"only if embedding and head are not tied: {tables[0]} is adapted" if tables else ""


def _ollama_refuses(a: Found) -> str:
    if a.adalora:
        return "has no names for AdaLoRA's tensors (lora_E)"
    if a.dora:
        return "has no names for DoRA's magnitudes"
    alpha = a.config.get("lora_alpha")
    if alpha is not None and not (isinstance(alpha, int) and alpha >= 0):
        return f"needs an integer of 0 or more as lora_alpha, not {alpha!r}"
    others = [m.name for m in a.modules if m.kind != "linear" or m.name.rpartition(".")[2] not in _OLLAMA]
    if others:
        return f"has no name for {others[0]}, only for {', '.join(_OLLAMA)}"
    if wide := [m for m in a.modules if m.rank > min(m.shape)]:
        return (
            f"transposes factors of {wide[0].name}, because rank {wide[0].rank} exceeds a side of the matrix"
        )
    return first_of(no_replication(a), no_lora_biases(a), no_others(a))


def _ollama_loses(a: Found) -> Iterable[str]:
    yield from every_token(a)
    yield from original_base(a)


def _ollama_remark(a: Found) -> str:
    remark = "for Llama and Gemma 2 only"
    if any(m.name.rpartition(".")[2] in _ATTENTION for m in a.modules):
        remark += "; for Llama, its converter reorders A of q_proj and k_proj: compare the answers"
    return remark


LLAMA_CPP = Runtime(
    "llama.cpp",
    "November 2026",
    by_tensor,
    _refuses,
    _loses,
    _remark,
    profiles=("portable", "tensor-rank"),
    unknown="refuses",
    needs_prefix=False,
)

OLLAMA = Runtime(
    "Ollama",
    "November 2026",
    by_tensor,
    _ollama_refuses,
    _ollama_loses,
    _ollama_remark,
    profiles=("portable", "tensor-rank"),
    unknown="refuses",
    needs_prefix=False,
)
