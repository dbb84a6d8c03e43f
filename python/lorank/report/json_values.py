"""The parts of reports as JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorank.sources.base import Skipped


def plain(value: Any) -> Any:
    """Convert a value for JSON: NaN to None, infinity to ``"inf"`` or ``"-inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    return value


def number(value: Any) -> float:
    """Convert a result of `plain` or a cell of a table to a float; None and an empty cell become NaN."""
    return math.nan if value in (None, "") else float(value)


def skipped_to_json(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """Return skipped tensors as JSON values."""
    return [{"name": entry.name, "shape": entry.shape, "reason": entry.reason} for entry in skipped]


def skipped_from_json(content: Sequence[Mapping[str, Any]]) -> list[Skipped]:
    """Build skipped tensors from the result of `skipped_to_json`."""
    return [Skipped(entry["name"], tuple(entry["shape"]), entry["reason"]) for entry in content]
