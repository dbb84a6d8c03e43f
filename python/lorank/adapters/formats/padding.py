"""Ranks that a profile pads with zeros: told in the file, taken off again on reading.

Padding is a matter of the file, not of the adapter: counted as ranks, its zeros would let a rank ratio
keep more than it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from lorank._core import FormatError, Matrix
from lorank.adapters.content import AdapterContent
from lorank.adapters.module import LoraModule, in_memory
from lorank.adapters.profiles import Layout

RANKS_KEY = "lorank.ranks"
"""Metadata of a file with padded ranks: the true rank of every module, as JSON."""


def metadata(adapter: AdapterContent, layouts: Mapping[str, Layout]) -> dict[str, str]:
    """What a file tells of its padding; nothing if it has none."""
    ranks = {name: adapter.modules[name].rank for name in layouts}
    is_padded = any(ranks[name] != layout.rank for name, layout in layouts.items())
    return {RANKS_KEY: json.dumps(ranks)} if is_padded else {}


def removed(adapter: AdapterContent, found: Mapping[str, str]) -> AdapterContent:
    """The adapter with its true ranks, where the file's metadata tell them."""
    if RANKS_KEY not in found:
        return adapter
    ranks = _ranks(found[RANKS_KEY])
    if ranks is None or any(not 0 <= ranks.get(m.name, -1) <= m.rank for m in adapter.modules.values()):
        return replace(adapter, notes=[*adapter.notes, f"metadata {RANKS_KEY} do not fit and were ignored"])
    padded = sum(ranks[module.name] < module.rank for module in adapter.modules.values())
    return replace(
        adapter,
        modules={name: _cut(module, ranks[name]) for name, module in adapter.modules.items()},
        notes=[*adapter.notes, f"zeros that padded the ranks of {padded} modules were left out"],
    )


def _ranks(text: str) -> dict[str, int] | None:
    try:
        ranks = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_table = isinstance(ranks, dict) and all(type(rank) is int for rank in ranks.values())
    return ranks if is_table else None


def _cut(module: LoraModule, rank: int) -> LoraModule:
    if rank == module.rank:
        return module

    def factors() -> list[tuple[Matrix, Matrix]]:
        pairs = [(b.to_array(), a.to_array()) for b, a in module.factors()]
        if any(b[:, rank:].any() and a[rank:].any() for b, a in pairs):
            raise FormatError(f"module {module.name!r}: its metadata tell of rank {rank}, but it has more")
        return [in_memory(b[:, :rank], a[:rank]) for b, a in pairs]

    return replace(module, rank=rank, factors=factors)
