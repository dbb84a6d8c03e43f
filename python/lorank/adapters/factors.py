"""Factors of a module: matrices, tensors of a file or model, or pickled values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import Matrix
from lorank.adapters.tensors import Tensors
from lorank.sources import arrays

Array = npt.NDArray[Any]
Pair = tuple[Matrix, Matrix]
"""``B (out, r)`` and ``A (r, in)``."""

Factors = Callable[[], Sequence[Pair]]
"""A function that returns the factors of every copy of a module."""


def in_memory(b: Array, a: Array) -> Pair:
    """Return factors ``B (out, r)`` and ``A (r, in)`` for the core, without a copy."""
    return arrays.matrix(b), arrays.matrix(a)


@dataclass(frozen=True, slots=True)
class MatrixFactors:
    """Factors that are given as matrices.

    Attributes
    ----------
    pairs
        The factors of every copy.
    """

    pairs: Sequence[Pair] = field(repr=False)

    def __call__(self) -> Sequence[Pair]:
        """Return the factors."""
        return self.pairs


@dataclass(frozen=True, slots=True)
class TensorFactors:
    """Factors that are two tensors.

    Attributes
    ----------
    tensors
        The tensors that hold the factors.
    b_key, a_key
        Names of the tensors B and A.
    shape
        Shape of the update, ``(out, in)``.
    rank
        Rank of both tensors.
    """

    tensors: Tensors = field(repr=False)
    b_key: str
    a_key: str
    shape: tuple[int, int]
    rank: int

    @property
    def b(self) -> Matrix:
        """``B (out, r)``."""
        return self.tensors.matrix(self.b_key, self.shape[0], self.rank)

    @property
    def a(self) -> Matrix:
        """``A (r, in)``."""
        return self.tensors.matrix(self.a_key, self.rank, self.shape[1])

    def __call__(self) -> Sequence[Pair]:
        """Return the factors."""
        return [(self.b, self.a)]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix that can be pickled, with its element type.

    Attributes
    ----------
    values
        The matrix; for bfloat16, the bits as unsigned integers.
    dtype
        Name of the element type.
    """

    values: Array = field(repr=False)
    dtype: str

    @classmethod
    def of(cls, matrix: Matrix) -> PackedMatrix:
        """Copy the values of a matrix. Types that NumPy lacks become float32, except bfloat16."""
        values = np.array(matrix.to_array())
        if matrix.dtype == "bfloat16":
            # Every bfloat16 is the upper half of a float32.
            return cls((values.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
        if matrix.dtype == "float16":
            return cls(values.astype(np.float16), "float16")
        return cls(values, str(values.dtype))

    def matrix(self) -> Matrix:
        """Return the matrix for the core, without a copy."""
        return Matrix.from_array(self.values, self.dtype if self.dtype == "bfloat16" else None)


@dataclass(frozen=True, slots=True)
class PackedFactors:
    """Factors that can be pickled.

    Attributes
    ----------
    pairs
        B and A of every copy.
    """

    pairs: tuple[tuple[PackedMatrix, PackedMatrix], ...] = field(repr=False)

    @classmethod
    def of(cls, factors: Factors) -> PackedFactors:
        """Copy the values of factors from a file or a live model."""
        return cls(tuple((PackedMatrix.of(b), PackedMatrix.of(a)) for b, a in factors()))

    def __call__(self) -> Sequence[Pair]:
        """Return the factors."""
        return [(b.matrix(), a.matrix()) for b, a in self.pairs]
