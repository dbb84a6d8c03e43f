"""The options that select how much of an adapter is kept."""

from __future__ import annotations

from typing import Any

from lorank.cli.errors import UsageError
from lorank.cli.spelling import spelled_as_options
from lorank.compression.knobs import Knobs, in_parameters, with_counted_budget

_AMOUNTS = ("rank_ratio", "avg_rank", "energy", "budget", "size", "auto")


def checked_knobs(base_parameters: int | None = None, **given: Any) -> dict[str, Any]:
    """Return the knobs that were given.

    Parameters
    ----------
    base_parameters
        Size of the base model, for the check of a budget that is a share; None if the command accepts no
        share.
    **given
        Value of each knob of the command; None or False for knobs that were not given.

    Raises
    ------
    UsageError
        If not exactly one amount is given, or a knob is out of range or would keep nothing.
    """
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    options = {name: f"--{name.replace('_', '-')}" for name in _AMOUNTS if name in given}
    amounts = [name for name in options if name in chosen]
    if len(amounts) != 1:
        *most, last = options.values()
        raise UsageError(f"give exactly one of {', '.join(most)} and {last}")
    option = options[amounts[0]]
    given_as = chosen[amounts[0]]
    if "size" in chosen:
        chosen["budget"] = chosen.pop("size")
    with spelled_as_options(UsageError):
        counted = chosen if base_parameters is None else with_counted_budget(chosen, base_parameters)
        knobs = Knobs(**counted)
    if knobs.keep_nothing:
        raise UsageError(f"{option} {given_as} keeps nothing: give a larger {option}")
    return chosen


def with_parameters(knobs: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Replace a budget that is a size by a number of parameters, if their written type is given."""
    if dtype is None or knobs.get("budget") is None:
        return knobs
    return {**knobs, "budget": in_parameters(knobs["budget"], dtype)}
