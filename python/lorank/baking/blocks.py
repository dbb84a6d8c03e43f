"""Blocks of a parameter that tensors of a checkpoint hold, found by running transformers' conversions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Positions:
    """Rows or columns of a matrix: an arithmetic progression if `listed` is empty.

    Attributes
    ----------
    start, step, count
        The first position, the distance, and the number of positions.
    listed
        The positions, if they are no arithmetic progression.
    """

    start: int
    step: int
    count: int
    listed: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Indices) -> Positions:
        """Describe positions."""
        count = len(values)
        step = int(values[1] - values[0]) if count > 1 else 1
        if np.array_equal(values, values[0] + step * np.arange(count)):
            return cls(int(values[0]), step, count)
        return cls(int(values[0]), 0, count, tuple(int(x) for x in values))

    def indices(self) -> Indices:
        """Return the positions."""
        if self.listed:
            return np.array(self.listed, np.int64)
        return self.start + self.step * np.arange(self.count, dtype=np.int64)

    def to_json(self) -> list[Any]:
        """Return JSON values."""
        return [self.start, self.step, self.count, list(self.listed)]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> Positions:
        """Return the positions from the values of `to_json`."""
        start, step, count, listed = content
        return cls(start, step, count, tuple(listed))


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a matrix of a parameter, and its place in a matrix of a stored tensor.

    Attributes
    ----------
    target_rows, target_cols
        The rows and columns of the parameter's matrix.
    source_rows, source_cols
        The rows and columns of the stored matrix.
    transposed
        True if the rows of the parameter are the columns of the stored matrix.
    """

    target_rows: Positions
    target_cols: Positions
    source_rows: Positions
    source_cols: Positions
    transposed: bool

    def to_json(self) -> list[Any]:
        """Return JSON values."""
        four = (self.target_rows, self.target_cols, self.source_rows, self.source_cols)
        return [*(positions.to_json() for positions in four), self.transposed]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> Block:
        """Return the block from the values of `to_json`."""
        rows, cols, source_rows, source_cols = map(Positions.from_json, content[:4])
        return cls(rows, cols, source_rows, source_cols, content[4])


def block_of(numbers: Indices, first: int, shape: tuple[int, int]) -> Block | None:
    """Find the block of a parameter that a stored matrix fills.

    Parameters
    ----------
    numbers
        The parameter's matrix after a conversion of matrices whose elements are numbered.
    first, shape
        The number of the first element of the stored matrix, and its shape.

    Returns
    -------
    Block or None
        None if no element of the stored matrix is in the parameter.

    Raises
    ------
    ValueError
        If the elements form no block.
    """
    rows, cols = np.nonzero((numbers >= first) & (numbers < first + shape[0] * shape[1]))
    if not len(rows):
        return None
    of_rows, of_cols = np.unique(rows), np.unique(cols)
    inner = numbers[np.ix_(of_rows, of_cols)] - first
    if len(rows) != inner.size:
        raise ValueError("the elements of a tensor form no block of the parameter")
    source_rows, source_cols = np.divmod(inner, shape[1])
    transposed = inner.size > 1 and not np.array_equal(
        source_cols, np.broadcast_to(source_cols[0], inner.shape)
    )
    if transposed:
        source_rows, source_cols = source_rows.T, source_cols.T
    along, across = source_rows[:, 0], source_cols[0]
    if not (
        np.array_equal(source_rows, np.broadcast_to(along[:, None], source_rows.shape))
        and np.array_equal(source_cols, np.broadcast_to(across, source_cols.shape))
    ):
        raise ValueError("a conversion mixes the rows and columns of a tensor")
    return Block(
        Positions.of(of_rows), Positions.of(of_cols), Positions.of(along), Positions.of(across), transposed
    )
