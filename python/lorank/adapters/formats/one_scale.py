"""Scales of files that hold one scale, or one alpha, for all modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lorank.adapters.content import AdapterContent
from lorank.adapters.profiles import WrittenRank


def with_one_scale(adapter: AdapterContent, ranks: Mapping[str, int]) -> dict[str, WrittenRank]:
    """Return entries for files with one scale: that of most modules; the others' scalings move into B."""
    scale = common_scale(adapter, ranks)
    return {name: _entry(adapter, name, rank, scale) for name, rank in ranks.items()}


def with_one_alpha(adapter: AdapterContent, ranks: Mapping[str, int]) -> dict[str, WrittenRank]:
    """Return entries for files with one alpha, which is divided by the rank of each module's tensors."""
    alpha = common_alpha(adapter, ranks)
    return {name: _entry(adapter, name, rank, alpha / rank) for name, rank in ranks.items()}


def common_scale(adapter: AdapterContent, ranks: Mapping[str, int]) -> float:
    """Return the scaling of most modules."""
    return Counter(adapter.modules[name].scaling for name in ranks).most_common(1)[0][0] or 1.0


def common_alpha(adapter: AdapterContent, ranks: Mapping[str, int]) -> float:
    """Return the product of scaling and rank of most modules."""
    alphas = Counter(adapter.modules[name].scaling * rank for name, rank in ranks.items())
    return alphas.most_common(1)[0][0] or 1.0


def _entry(adapter: AdapterContent, name: str, rank: int, scale: float) -> WrittenRank:
    scaling = adapter.modules[name].scaling
    return WrittenRank.unscaled(rank, scaling) if scaling == scale else WrittenRank(rank, 1 / scale)
