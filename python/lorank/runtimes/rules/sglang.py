"""The rules of SGLang."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorank.modules import naming
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    by_settings,
    every_token,
    no_replication,
    not_plain,
    original_base,
    others_lost,
)

_SHORTHANDS = (naming.ALL_LINEAR, "all")
_EMBEDDINGS = ("embed_tokens", "vocab_emb", "embeddings", "word_embeddings")
_NORM = re.compile(r"norm|ln_|\.ln\d?\.")


def _refuses(a: Found) -> str:
    if a.adalora:
        return "AdaLoRA is not supported"
    targets = a.config.get("target_modules")
    if isinstance(targets, str) and targets not in _SHORTHANDS:
        return "needs target_modules as a list, but they are a regular expression"
    if mixed := a.of_another_rank():
        return f"{len(mixed)} modules have another rank than r = {a.rank:g}, such as {mixed[0].name}"
    if a.dora:
        return "DoRA is not supported"
    return not_plain(a, but=("embedding",)) or _tables(a) or _pairs(a) or _norms(a) or no_replication(a)


def _tables(a: Found) -> str:
    names = [m.name for m in a.of_kinds("embedding") if m.name.rpartition(".")[2] not in _EMBEDDINGS]
    return f"{names[0]} is an embedding other than embed_tokens" if names else ""


def _pairs(a: Found) -> str:
    """Return a reason about up_proj without gate_proj; other missing partners are filled with zeros."""
    known = {module.name for module in a.modules}
    for name in known:
        parent, _, last = name.rpartition(".")
        if last == "up_proj" and f"{parent}.gate_proj" not in known:
            return f"needs gate_proj with up_proj: {parent} lacks gate_proj"
    return ""


def _norms(a: Found) -> str:
    norms = [key for key in a.others if _NORM.search(key)]
    return f"cannot place the trained norm {norms[0]}" if norms else ""


def _loses(a: Found) -> Iterable[str]:
    yield from others_lost(a)
    yield from every_token(a)
    yield from original_base(a)


SGLANG = Runtime(
    "SGLang",
    "0.5.23",
    by_settings,
    _refuses,
    _loses,
    needs_prefix=False,
)
