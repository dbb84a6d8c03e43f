"""The options that `DynamicRanks` and `GardCallback` share."""

from __future__ import annotations

import inspect
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from lorank.training import DynamicRanks, GardCallback
from lorank.training.options import GardArguments, GardOptions

DEFAULTS = {field.name: field.default for field in fields(GardOptions)}


def test_every_option_has_a_type_for_keyword_arguments() -> None:
    assert {field.name: field.type for field in fields(GardOptions)} == {
        name: kind.__forward_arg__ for name, kind in GardArguments.__annotations__.items()
    }
    assert GardOptions(**GardOptions(interval=30).arguments()) == GardOptions(interval=30)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [(DynamicRanks, ["model", "optimizer"], ["scaler"]), (GardCallback, [], ["checkpoint"])],
)
def test_signatures_list_every_option_with_its_default(
    kind: Any, before: list[str], after: list[str]
) -> None:
    parameters = inspect.signature(kind).parameters
    assert list(parameters) == [*before, *DEFAULTS, *after]
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in [*DEFAULTS, *after])


def test_a_subclass_has_its_own_signature() -> None:
    class Shorter(GardCallback):
        def __init__(self, interval: int) -> None:
            super().__init__(interval=interval)

    assert list(inspect.signature(Shorter).parameters) == ["interval"]


@pytest.mark.parametrize(
    "make", [GardCallback, GardOptions, lambda **options: DynamicRanks(None, None, **options)]
)
def test_unknown_options_raise_type_error(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'period'"):
        make(period=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be an integer of at least 1, not 0"),
        ({"window": 101}, "window 101 is longer than interval 100: pass window=100 or less"),
        ({"r_min": 0}, "r_min must be an integer of at least 1, not 0"),
        ({"r_min": 65}, "r_max must be an integer of at least 65, not 64"),
        ({"smoothing": math.nan}, "smoothing must be at least 0 and below 1, not nan"),
        ({"energy": 0.0}, r"energy must be above 0 and at most 1, not 0\.0"),
        ({"sketch": 0}, "sketch must be a positive integer, or None for no sketch, not 0"),
        ({"budget": "many"}, "a budget is a number of parameters"),
        ({"budget": "-1%"}, "not a percentage"),
    ],
)
def test_options_are_checked_on_construction(options: dict[str, Any], message: str) -> None:
    for kind in (GardCallback, GardOptions):
        with pytest.raises(ValueError, match=message):
            kind(**options)


def test_options_cannot_change() -> None:
    options = GardOptions(interval=np.int64(30), budget="0.5%")  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        options.interval = 20  # type: ignore[misc]
