"""Factors that a file stores in another arrangement than PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorank.adapters.factors import Pair, in_memory
from lorank.adapters.formats.derived_factors import Array, Arrays
from lorank.adapters.tensors import Tensors


@dataclass(frozen=True, slots=True)
class ArrayFactors:
    """Two tensors, and a function that makes B and A of every copy from them.

    Attributes
    ----------
    tensors
        The tensors that hold the factors.
    b_key, a_key
        Names of the tensors.
    arrange
        A function of both tensors in their stored shapes.
    """

    tensors: Tensors = field(repr=False)
    b_key: str
    a_key: str
    arrange: Callable[[Array, Array], Arrays]

    def __call__(self) -> Sequence[Pair]:
        """Return the factors of every copy."""
        b, a = array_of(self.tensors, self.b_key), array_of(self.tensors, self.a_key)
        return [in_memory(np.ascontiguousarray(x), np.ascontiguousarray(y)) for x, y in self.arrange(b, a)]


def array_of(tensors: Tensors, key: str) -> Array:
    """Return a tensor in its stored shape; values of up to 32 bits as float32."""
    shape = tensors.shapes()[key]
    rows = shape[0] if shape else 1
    values: Array = tensors.matrix(key, rows, math.prod(shape[1:])).to_array().reshape(shape)
    return values
