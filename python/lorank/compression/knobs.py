"""Knobs: the number of singular values to keep, and the competition of modules for values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, TypedDict, cast

import numpy.typing as npt

from lorank.allocation.budget import Budget, parse_budget

_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,15}})?)\s*({'|'.join(_BYTES)})")

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Number of bytes of an element, by the name of its type."""

Scores = Mapping[str, npt.ArrayLike]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """The number of singular values to keep, given by exactly one of the first five fields.

    Attributes
    ----------
    rank_ratio
        Share of all singular values to keep, from 0 to 1: gamma of [PARA].
    avg_rank
        Average number of values to keep per module.
    energy
        Share of the energy to keep with as few values as possible, from 0 to 1: epsilon of [PARA]. The
        total includes values that `max_rank` forbids.
    budget
        Number of parameters to keep, such as ``500_000`` or ``"1.5M"``, or the size of the factors in their
        types, such as ``"12MiB"``; values with the most energy per parameter or byte come first.
    auto
        True to keep the values above each module's own noise: a heuristic without a parameter.
    max_rank
        Largest rank of a module.
    scope
        ``"global"``: modules compete. ``"module"``: all modules keep one rank, or one share of energy.
    keep
        ``"largest"``, or ``"smallest"`` for the study of reverse pruning.
    scores
        One score per singular value, by module name, instead of the values: larger scores come first.
    """

    rank_ratio: float | None = None
    avg_rank: float | None = None
    energy: float | None = None
    budget: Budget | None = None
    auto: bool = False
    max_rank: int | None = None
    scope: Literal["global", "module"] = "global"
    keep: Literal["largest", "smallest"] = "largest"
    scores: Scores | None = None

    def __post_init__(self) -> None:
        given = [
            name for name in ("rank_ratio", "avg_rank", "energy", "budget") if getattr(self, name) is not None
        ]
        given += ["auto"] if self.auto else []
        if len(given) != 1:
            raise ValueError(
                "give exactly one of rank_ratio, avg_rank, energy, budget and auto"
                + (f", not {' and '.join(given)}" if given else "")
            )
        _check_range("rank_ratio", self.rank_ratio, 1.0)
        _check_range("energy", self.energy, 1.0)
        _check_range("avg_rank", self.avg_rank, math.inf)
        if self.budget is not None:
            amount_of(self.budget)
        if self.max_rank is not None and self.max_rank < 0:
            raise ValueError(f"max_rank={self.max_rank} cannot be negative")
        if self.scope not in ("global", "module"):
            raise ValueError(f"scope must be 'global' or 'module', not {self.scope!r}")
        if self.keep not in ("largest", "smallest"):
            raise ValueError(f"keep must be 'largest' or 'smallest', not {self.keep!r}")
        if self.budget is not None and self.scope == "module":
            raise ValueError("a parameter budget is shared by all modules: scope='module' contradicts it")
        counted = self.rank_ratio is not None or self.avg_rank is not None
        if (self.keep == "smallest" or self.scores is not None) and not counted:
            raise ValueError("keep='smallest' and scores need rank_ratio or avg_rank")

    @property
    def keep_nothing(self) -> bool:
        """True if no value of any adapter is kept."""
        parameters = None if self.budget is None else amount_of(self.budget)
        return 0 in (self.rank_ratio, self.avg_rank, self.energy, parameters, self.max_rank)

    def __str__(self) -> str:
        names = ("rank_ratio", "avg_rank", "energy", "budget")
        name = next((name for name in names if getattr(self, name) is not None), "auto")
        parts = [f"{name}={getattr(self, name)}", f"{self.scope} scope"]
        parts += [f"max_rank={self.max_rank}"] if self.max_rank is not None else []
        parts += ["smallest kept"] if self.keep == "smallest" else []
        parts += ["custom scores"] if self.scores is not None else []
        return ", ".join(parts)


class KnobArguments(TypedDict, total=False):
    """The fields of `Knobs` as keyword arguments, for functions that pass them on."""

    rank_ratio: float | None
    avg_rank: float | None
    energy: float | None
    budget: Budget | None
    auto: bool
    max_rank: int | None
    scope: Literal["global", "module"]
    keep: Literal["largest", "smallest"]
    scores: Scores | None


def _check_range(name: str, value: float | None, most: float) -> None:
    if value is not None and (not 0 <= value <= most or value == math.inf):
        limits = f"between 0 and {most:g}" if most < math.inf else "0 or a finite number above it"
        raise ValueError(f"{name}={value} is not {limits}")


def with_counted_budget(
    knobs: Mapping[str, object], num_parameters: int | None, unknown: str = ""
) -> dict[str, Any]:
    """Replace a budget that is a share of the base model by a number of parameters.

    Raises
    ------
    ValueError
        If a percentage is malformed, or the size of the base model is unknown; `unknown` is the reason.
    """
    budget = knobs.get("budget")
    if isinstance(budget, str) and budget.strip().endswith("%"):
        return {**knobs, "budget": parse_budget(budget, num_parameters, unknown)}
    return dict(knobs)


def checked_knobs(knobs: Mapping[str, object]) -> Knobs:
    """Return knobs from keyword arguments.

    Raises
    ------
    TypeError
        If an argument is not a field of `Knobs`.
    ValueError
        If not exactly one of the first five fields is given, or a value is out of range.
    """
    known = [field.name for field in fields(Knobs)]
    if unknown := [name for name in knobs if name not in known]:
        raise TypeError(f"unknown option {unknown[0]!r}: choose among {', '.join(known)}")
    return Knobs(**cast("dict[str, Any]", dict(knobs)))


def check_score(score: str, knobs: Knobs, *, has_base: bool) -> None:
    """Check the score of `lorank.compress` against its other arguments.

    Raises
    ------
    ValueError
        If the score is unknown, or contradicts the base model or a knob.
    """
    if score not in ("sigma", "relative"):
        raise ValueError(f"score must be 'sigma' or 'relative', not {score!r}")
    if (score == "relative") != has_base:
        raise ValueError("score='relative' needs base, the base model, and no other score takes it")
    if score == "relative" and knobs.scores is not None:
        raise ValueError("give scores or score='relative', not both")
    if score == "relative" and knobs.rank_ratio is None and knobs.avg_rank is None:
        raise ValueError("score='relative' needs rank_ratio or avg_rank")


def size_of(budget: Budget) -> int | None:
    """Return the number of bytes of a budget such as ``"12MiB"``; None for a number of parameters."""
    found = _SIZE.fullmatch(budget.strip()) if isinstance(budget, str) else None
    return math.floor(Fraction(found[1]) * _BYTES[found[2]]) if found else None


def in_parameters(budget: Budget, dtype: str) -> Budget:
    """Return the number of parameters of a type that fit into a size; other budgets are returned as given."""
    size = size_of(budget)
    return budget if size is None else size // ITEM_BYTES[dtype]


def amount_of(budget: Budget) -> int:
    """Return the number of parameters of a budget, or the number of bytes of a size.

    Raises
    ------
    ValueError
        If the budget is a share of the base model, or not a number.
    """
    if isinstance(budget, str) and budget.strip().endswith("%"):
        raise ValueError(
            f"budget={budget}: an adapter does not store the size of its base model: give a number"
        )
    if (size := size_of(budget)) is not None:
        return size
    try:
        return parse_budget(budget, None)
    except ValueError:
        raise ValueError(
            f"budget={budget} is not a number of parameters: give one such as 500000, 500k or 1.5M, "
            "or a size such as 12MiB"
        ) from None
