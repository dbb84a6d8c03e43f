"""Equality of rows and reports: arrays are compared by value, and NaN equals NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np


class ByValue:
    """Base of dataclasses (with ``eq=False``) whose objects are equal if all their fields are."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        own: Any = self
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in fields(own))

    __hash__ = None  # type: ignore[assignment]  # Arrays cannot be hashed.


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=True)
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if _is_sequence(one) and _is_sequence(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
