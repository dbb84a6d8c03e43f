r"""Rank patterns: PEFT's regular expressions that give modules their ranks and alphas.

PEFT matches the keys of `rank_pattern` and `alpha_pattern` as ``(.*\.)?(KEY)$`` against a module's full name,
in order; the first match wins. Saving sorts the keys, so the keys written here never overlap. There is one
key for each rank: a key for each module would overflow Python's cache of compiled expressions (tens of
seconds for a thousand modules).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lorank.peft_format.name_matching import proper_suffixes

Number = TypeVar("Number", int, float)


def rank_keys(ranks: Mapping[str, Number]) -> dict[Number, str]:
    r"""Return one regular expression for each rank (or alpha), which matches its modules and no others.

    The expressions match names under any prefix, because names in a model may have one.

    Parameters
    ----------
    ranks
        Rank of each module by name.

    Examples
    --------
    >>> rank_keys({"layers.0.q": 4, "layers.1.q": 8, "head": 4})
    {4: '(?:layers\\.0\\.q|head)', 8: '(?:layers\\.1\\.q)'}
    """
    shadowed = _shadowed(ranks)
    by_rank: dict[Number, list[str]] = defaultdict(list)
    for name, rank in ranks.items():
        # `^` forbids a prefix: needed where another module's name ends with this one's.
        by_rank[rank].append(("^" if name in shadowed else "") + re.escape(name))
    return {rank: f"(?:{'|'.join(members)})" for rank, members in sorted(by_rank.items())}


def _shadowed(names: Iterable[str]) -> set[str]:
    """Return the names that are a dotted suffix of another name."""
    known = set(names)
    return {suffix for name in known for suffix in proper_suffixes(name) if suffix in known}
