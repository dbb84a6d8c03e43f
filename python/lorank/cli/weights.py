"""Adapters with weights as arguments: A:0.7 B:0.3."""

from __future__ import annotations

import math
from pathlib import Path

from lorank.cli.errors import UsageError


def weighted(arguments: list[str]) -> tuple[list[str], list[float] | None]:
    """Parse ``PATH`` or ``PATH:WEIGHT`` arguments to paths and weights; None without weights."""
    parts = [_weight(argument) for argument in arguments]
    paths, weights = [path for path, _ in parts], [weight for _, weight in parts]
    if all(weight is None for weight in weights):
        return paths, None
    if any(weight is None for weight in weights):
        raise UsageError("give a weight to every adapter or to none: A:0.7 B:0.3")
    return paths, [weight for weight in weights if weight is not None]


def _weight(argument: str) -> tuple[str, float | None]:
    path, colon, text = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return argument, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(
            f"{argument}: the path does not exist, and {text!r} is not a finite weight of {path}"
        )
    return path, weight
