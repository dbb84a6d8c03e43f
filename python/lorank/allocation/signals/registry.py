"""The registry of methods: each is a function that computes a `Signal` and is registered under its name.

A method depends on neither budgets nor PEFT. It returns a score for each module and, if its source defines
a formula for them, ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from lorank.report.base import Evidence, Report

Needs: TypeAlias = Literal["shapes"] | Evidence


@dataclass(frozen=True, slots=True)
class Signal:
    """What a method says.

    Attributes
    ----------
    scores
        One per module, finite and >= 0: ranks under a budget grow in proportion.
    ranks
        The ranks of the method's own formula, for use without a budget; None if it has none.
    flags
        What a reader should know of single modules, by name; of some that get no rank, too.
    """

    scores: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.int64] | None
    flags: Mapping[str, str] = field(default_factory=dict)


# A signal function: (report, modules, r_min, r_max, **its own options).
Method = Callable[..., Signal]


@dataclass(frozen=True, slots=True)
class Registered:
    """A method and what it needs: module shapes alone, or a report of some kind."""

    function: Method
    needs: Needs
    check: Callable[..., object]

    @property
    def summary(self) -> str:
        """What the method computes: the first line of its documentation, as plain text."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0].replace("`", "")

    @property
    def options(self) -> list[str]:
        """The names of the method's own options."""
        parameters = inspect.signature(self.function).parameters.values()
        return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Refuse options that the method does not have, or cannot use, before any work is done.

        Raises
        ------
        ValueError
            Naming those that it has, or what it can use.
        """
        known = self.options
        if unknown := [option for option in options if option not in known]:
            it_has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"method {name!r} has no option {unknown[0]!r}: {it_has}")
        self.check(**options)

    def check_evidence(self, name: str, evidence: object) -> None:
        """Refuse a report that knows nothing of what the method needs.

        Raises
        ------
        ValueError
            Naming the function that makes the right one.
        """
        if self.needs != "shapes" and getattr(evidence, "provides", None) != self.needs:
            raise ValueError(f"method {name!r} needs {self.needs}: pass the result of {_MAKERS[self.needs]}")


_MAKERS: Mapping[Evidence, str] = {
    "spectra": "lorank.analyze(model)",
    "gradients": "lorank.profile_gradients(model, batches)",
    "tasks": "lorank.profile_tasks(model, batches)",
}

METHODS: dict[str, Registered] = {}


def register(name: str, *, needs: Needs, check: Callable[..., object] = dict) -> Callable[[Method], Method]:
    """Offer a function as ``allocate(..., method=name)``.

    `check` takes any of the method's options by name, and raises ValueError for what it cannot use.
    """

    def decorate(function: Method) -> Method:
        METHODS[name] = Registered(function, needs, check)
        return function

    return decorate


def flags_of_skipped(report: Report[Any]) -> dict[str, str]:
    """Flags of the modules that were to be profiled and could not be: they get no rank."""
    return {skipped.name: f"not adapted: {skipped.reason}" for skipped in report.skipped}


def linear_ranks(position: npt.NDArray[np.float64], r_min: int, r_max: int) -> npt.NDArray[np.int64]:
    """``r_min + (r_max - r_min) * position``, rounded half up, for positions in [0, 1]."""
    return np.clip(np.floor(r_min + (r_max - r_min) * position + 0.5), r_min, r_max).astype(np.int64)
