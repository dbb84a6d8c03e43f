"""The registry of methods: functions that compute a `Signal`, registered under their names.

A method depends neither on budgets nor on PEFT. It returns a score for each module, and ranks if its
source defines a formula for ranks.
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
    """The result of a method.

    Attributes
    ----------
    scores
        Score of each module, finite and >= 0: ranks under a budget grow in proportion to it.
    ranks
        Rank of each module by the method's own formula, for use without a budget; None if the method
        defines no ranks.
    flags
        Remarks by module name, including modules that get no rank.
    """

    scores: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.int64] | None
    flags: Mapping[str, str] = field(default_factory=dict)


Method = Callable[..., Signal]
"""A function ``(report, modules, r_min, r_max, **options)``."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered method.

    Attributes
    ----------
    function
        The function that computes the signal; its keyword-only parameters are the method's options.
    needs
        Kind of the report that the method reads; ``"shapes"`` if the shapes of modules are enough.
    check
        Function that raises ValueError for option values that the method cannot use.
    """

    function: Method
    needs: Needs
    check: Callable[..., object]

    @property
    def summary(self) -> str:
        """The first line of the method's documentation, as plain text."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0].replace("`", "")

    @property
    def options(self) -> list[str]:
        """The names of the method's own options."""
        parameters = inspect.signature(self.function).parameters.values()
        return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Check options before any work is done.

        Parameters
        ----------
        name
            Name of the method, for messages.
        options
            Value of each option by its name.

        Raises
        ------
        ValueError
            If the method lacks an option or cannot use its value.
        """
        known = self.options
        if unknown := [option for option in options if option not in known]:
            choice = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"method {name!r} has no option {unknown[0]!r}: {choice}")
        self.check(**options)

    def check_evidence(self, name: str, evidence: object) -> None:
        """Check that a report is of the kind that the method reads.

        Raises
        ------
        ValueError
            If the report is of another kind; the message names the function that makes the right kind.
        """
        if self.needs != "shapes" and getattr(evidence, "provides", None) != self.needs:
            raise ValueError(f"method {name!r} needs {self.needs}: pass the result of {_MAKERS[self.needs]}")


_MAKERS: Mapping[Evidence, str] = {
    "spectra": "lorank.analyze(model)",
    "gradients": "lorank.profile_gradients(model, batches)",
    "tasks": "lorank.profile_tasks(model, batches)",
    "changes": "lorank.compare(a, b)",
}

METHODS: dict[str, Registered] = {}


def register(name: str, *, needs: Needs, check: Callable[..., object] = dict) -> Callable[[Method], Method]:
    """Register the decorated function as ``allocate(..., method=name)``.

    Parameters
    ----------
    name
        Name of the method.
    needs
        Kind of the report that the method reads.
    check
        Function of the method's options that raises ValueError for values that the method cannot use.
    """

    def decorate(function: Method) -> Method:
        METHODS[name] = Registered(function, needs, check)
        return function

    return decorate


def flags_of_skipped(report: Report[Any]) -> dict[str, str]:
    """Return a flag for every module that could not be profiled, and so gets no rank."""
    return {skipped.name: f"not adapted: {skipped.reason}" for skipped in report.skipped}


def linear_ranks(position: npt.NDArray[np.float64], r_min: int, r_max: int) -> npt.NDArray[np.int64]:
    """Return ``r_min + (r_max - r_min) * position``, rounded half up, for positions in [0, 1]."""
    return np.clip(np.floor(r_min + (r_max - r_min) * position + 0.5), r_min, r_max).astype(np.int64)
