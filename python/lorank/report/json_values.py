"""The parts of reports as JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lorank._internal.json_fields import Fields
from lorank.sources.base import Skipped


def plain(value: Any) -> Any:
    """Convert a value for JSON: NaN to None, infinity to ``"inf"`` or ``"-inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else repr(value)
    return value


def skipped_to_json(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """Return skipped tensors as JSON values."""
    return [{"name": entry.name, "shape": entry.shape, "reason": entry.reason} for entry in skipped]


def skipped_from_json(content: Fields) -> list[Skipped]:
    """Build skipped tensors from the result of `skipped_to_json` in the field "skipped".

    Raises
    ------
    ValueError
        If the field is malformed.
    """
    return [
        Skipped(entry.text("name"), entry.integers("shape"), entry.text("reason"))
        for entry in content.objects("skipped")
    ]
