"""The README.md of a written adapter, with the error of its compression."""

from __future__ import annotations

from lorank._core import __version__
from lorank._internal.short_text import counted, spanned
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Profile
from lorank.adapters.formats.base import AdapterFormat
from lorank.adapters.markdown import markdown_text, yaml_string

_MARK = "Written by lorank "


def is_ours(text: str) -> bool:
    """Return True for the text of a card that lorank wrote. Other README.md files are not replaced."""
    return _MARK in text


def text(
    adapter: AdapterContent,
    form: AdapterFormat,
    profile: Profile,
    certificate: Certificate | None,
    stored: int,
) -> str:
    """Return the card as Markdown, with the front matter that the hub reads.

    Parameters
    ----------
    adapter, form, profile
        The adapter, its format, and the profile that it is written in.
    certificate
        The certificate with the rounding error; None for an adapter straight from training.
    stored
        Number of stored parameters, including padding.
    """
    base = adapter.base_model
    lines = [
        "---",
        *form.card_entries,
        *([f"base_model: {yaml_string(base)}"] if base else []),
        "tags:",
        "- lora",
        "- lorank",
        "---",
        "",
    ]
    lines += [f"# LoRA adapter{f' for {markdown_text(base)}' if base else ''}", ""]
    ranks = [module.rank for module in adapter.adapted]
    lines += [
        f"{counted(len(ranks), 'adapted module')}, {counted(adapter.num_parameters, 'parameter')}, "
        f"{spanned(ranks, 'rank')}. {_MARK}{__version__} in the profile `{profile}`, for "
        f"{form.readers(profile)}.",
        "",
    ]
    if form.carried_remark and (adapter.carried or any(m.carried for m in adapter.modules.values())):
        lines += [form.carried_remark, ""]
    if stored != adapter.num_parameters:
        lines += [f"{stored:,} parameters are stored, because ranks are padded with zeros.", ""]
    if certificate is not None:
        lines += _certified(certificate)
    if adapter.notes:
        lines += [*(f"- {markdown_text(note)}" for note in adapter.notes), ""]
    return "\n".join(lines)


def _certified(certificate: Certificate) -> list[str]:
    c = certificate
    rounding = (
        [f"| added by rounding, Frobenius norm | {c.rounding_error:.6g} |"]
        if c.rounding_error is not None
        else []
    )
    return [
        "## Operation and error",
        "",
        f"{markdown_text(c.action)}.",
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
        "The error is exact: the root of the sum of the squares of the dropped singular values.",
        "`lorank.json` holds the error of every module.",
        "",
    ]
