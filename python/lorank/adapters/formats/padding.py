"""Padding of ranks with zeros: true ranks in the file's metadata, and removal of the padding on reading.

Padding belongs to the file, not to the adapter: if the zeros counted as ranks, a rank ratio would keep too
many values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorank._core import FormatError
from lorank._internal.json_files import parse_json
from lorank.adapters.content import AdapterContent
from lorank.adapters.factors import Factors, Pair, in_memory
from lorank.adapters.metadata import RANKS_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank


@dataclass(frozen=True, slots=True)
class CutFactors:
    """Factors without the zeros that pad their rank.

    Attributes
    ----------
    padded
        The padded factors.
    rank
        The true rank.
    name
        Name of the module, for messages.
    """

    padded: Factors
    rank: int
    name: str

    def __call__(self) -> Sequence[Pair]:
        """Return the factors of the true rank.

        Raises
        ------
        FormatError
            If the factors have a larger rank.
        """
        pairs = [(b.to_array(), a.to_array()) for b, a in self.padded()]
        if any(b[:, self.rank :].any() and a[self.rank :].any() for b, a in pairs):
            raise FormatError(
                f"module {self.name!r}: {RANKS_KEY} in the metadata states rank {self.rank}, but the factors "
                "have a higher rank: save the adapter again from its source"
            )
        return [in_memory(b[:, : self.rank], a[: self.rank]) for b, a in pairs]


def metadata(adapter: AdapterContent, written: Mapping[str, WrittenRank]) -> dict[str, str]:
    """Return the metadata with the true ranks; empty if no rank is padded."""
    ranks = {name: adapter.modules[name].rank for name in written}
    is_padded = any(ranks[name] != entry.rank for name, entry in written.items())
    return {RANKS_KEY: json.dumps(ranks)} if is_padded else {}


def removed(adapter: AdapterContent, found: Mapping[str, str]) -> AdapterContent:
    """Return an adapter without padding, if a file's metadata record the true ranks."""
    if RANKS_KEY not in found:
        return adapter
    ranks = _ranks(found[RANKS_KEY])
    if ranks is None or any(not 0 <= ranks.get(m.name, -1) <= m.rank for m in adapter.modules.values()):
        return replace(
            adapter, notes=[*adapter.notes, f"metadata {RANKS_KEY} do not fit the factors and were ignored"]
        )
    padded = sum(ranks[module.name] < module.rank for module in adapter.modules.values())
    return replace(
        adapter,
        modules={name: _cut(module, ranks[name]) for name, module in adapter.modules.items()},
        notes=[*adapter.notes, f"zeros that padded the ranks of {padded} modules were removed"],
    )


def _ranks(text: str) -> dict[str, int] | None:
    """Return the recorded ranks; None if the text holds none."""
    try:
        ranks = parse_json(text)
    except ValueError:
        return None
    is_table = isinstance(ranks, dict) and all(type(rank) is int for rank in ranks.values())
    return ranks if is_table else None


def _cut(module: LoraModule, rank: int) -> LoraModule:
    if rank == module.rank:
        return module
    return replace(module, rank=rank, factors=CutFactors(module.factors, rank, module.name))
