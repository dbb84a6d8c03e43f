"""The parts of reports as JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorank.sources.base import Skipped


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: None for nan, ``"inf"`` or ``"-inf"`` for infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    return value


def number(value: Any) -> float:
    """Return the number that `plain` made a value of; an empty cell of a table is nan, too."""
    return math.nan if value in (None, "") else float(value)


def skipped_to_json(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """Return skipped tensors as JSON values."""
    return [{"name": entry.name, "shape": entry.shape, "reason": entry.reason} for entry in skipped]


def skipped_from_json(content: Sequence[Mapping[str, Any]]) -> list[Skipped]:
    """Return the skipped tensors that `skipped_to_json` made values of."""
    return [Skipped(entry["name"], tuple(entry["shape"]), entry["reason"]) for entry in content]
