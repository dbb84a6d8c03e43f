"""Factors that are computed from the factors of other modules when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.adapters.factors import Factors, Pair, in_memory

Array = npt.NDArray[Any]
Arrays = Sequence[tuple[Array, Array]]
"""B and A of every copy of a module."""


@dataclass(frozen=True, slots=True)
class DerivedFactors:
    """Factors that a function computes from those of other modules.

    Attributes
    ----------
    sources
        The factors of the other modules.
    change
        A function of the factors of every source, which returns the new factors of every copy.
    """

    sources: Sequence[Factors]
    change: Callable[[Sequence[Arrays]], Arrays]

    def __call__(self) -> Sequence[Pair]:
        """Return the factors of every copy."""
        values = [[(b.to_array(), a.to_array()) for b, a in source()] for source in self.sources]
        return [in_memory(np.ascontiguousarray(b), np.ascontiguousarray(a)) for b, a in self.change(values)]


def changed(factors: Factors, change: Callable[[Array, Array], tuple[Array, Array]]) -> DerivedFactors:
    """Return factors that a function computes from those of one module, copy by copy."""
    return DerivedFactors([factors], lambda values: [change(b, a) for b, a in values[0]])
