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
    """Return the number of a value that `plain` returned; nan for None and for an empty cell of a table."""
    return math.nan if value in (None, "") else float(value)


def skipped_to_json(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """Return skipped tensors as JSON values."""
    return [{"name": entry.name, "shape": entry.shape, "reason": entry.reason} for entry in skipped]


def skipped_from_json(content: Sequence[Mapping[str, Any]]) -> list[Skipped]:
    """Return the skipped tensors of values that `skipped_to_json` returned."""
    return [Skipped(entry["name"], tuple(entry["shape"]), entry["reason"]) for entry in content]
