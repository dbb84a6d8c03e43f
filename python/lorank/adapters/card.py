"""The README.md of a written adapter: what was done, and what it cost."""

from __future__ import annotations

from lorank._core import __version__
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Profile

_LOADS = {
    "compact": "PEFT and vLLM 0.32 or later",
    "portable": "PEFT, vLLM, SGLang, LoRAX, llama.cpp and TensorRT-LLM",
    "tensor-rank": "PEFT, vLLM 0.32 or later, llama.cpp and TensorRT-LLM",
}

_MARK = "Written by lorank "


def is_ours(text: str) -> bool:
    """Whether a README.md is a card of this program: only such a one is replaced."""
    return _MARK in text


def text(adapter: AdapterContent, profile: Profile, certificate: Certificate | None, stored: int) -> str:
    """The card's markdown, with the front matter that the hub reads; `stored` counts padding, too."""
    base = adapter.base_model
    is_peft = adapter.format == "peft"
    readers = _LOADS[profile] if is_peft else "what reads the keys of kohya's scripts or diffusers"
    lines = [
        "---",
        *(["library_name: peft"] if is_peft else []),
        *([f"base_model: {base}"] if base else []),
        "tags:",
        "- lora",
        "- lorank",
        "---",
        "",
    ]
    lines += [f"# LoRA adapter{f' for {base}' if base else ''}", ""]
    lines += [
        f"{len(adapter.adapted)} adapted modules, {adapter.num_parameters:,} parameters, ranks "
        f"{_range(adapter)}. {_MARK}{__version__} in the profile `{profile}`, for {readers}.",
        "",
    ]
    if is_peft and (adapter.carried or any(module.carried for module in adapter.modules.values())):
        lines += [
            "It holds more than factors (saved modules, biases or magnitudes), which not all of these load: "
            "`lorank check` tells which do.",
            "",
        ]
    if stored != adapter.num_parameters:
        lines += [f"{stored:,} parameters are stored, as ranks are padded with zeros.", ""]
    if certificate is not None:
        lines += _certified(certificate)
    if adapter.notes:
        lines += [*(f"- {note}" for note in adapter.notes), ""]
    return "\n".join(lines)


def _range(adapter: AdapterContent) -> str:
    ranks = [module.rank for module in adapter.adapted]
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _certified(certificate: Certificate) -> list[str]:
    c = certificate
    rounding = (
        [f"| added by rounding, Frobenius norm | {c.rounding_error:.6g} |"]
        if c.rounding_error is not None
        else []
    )
    return [
        "## What was done",
        "",
        f"{c.action}.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters before | {c.parameters_before:,} |",
        f"| parameters after | {c.parameters_after:,} |",
        f"| energy retained | {100 * c.retained_energy:.4f} % |",
        f"| error, Frobenius norm | {c.error:.6g} of {c.norm:.6g} |",
        f"| error, spectral norm | {c.spectral_error:.6g} |",
        *rounding,
        "",
        "The error is exact: the root of the sum of the squares of the singular values left out.",
        "`lorank.json` has it by module.",
        "",
    ]
