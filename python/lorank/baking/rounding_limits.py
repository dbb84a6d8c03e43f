"""Finds the rows of a tensor whose values differ from an updated weight by more than rounding can.

The computation in NumPy does not depend on the core's kernel, which `bake` uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from lorank._core import Matrix
from lorank.baking.checkpoint import StoredTensor
from lorank.baking.plan import Change, Norms

Array: TypeAlias = npt.NDArray[np.float64]

# Elements in a block of rows.
_BLOCK = 1 << 18
_SAMPLE = 1 << 12
# The rounding of float32, in which products are summed up.
_SINGLE = 2.0**-24
# A row has lost its update if most of so many visible changes are missing.
_LEAST_VISIBLE = 16


class Rounding(NamedTuple):
    """An element type: the number of binary digits, and the exponent of the least normal number."""

    digits: int
    least: int

    @property
    def relative(self) -> float:
        """The largest relative error of rounding."""
        return 2.0**-self.digits

    def unit(self, values: Array) -> Array:
        """Return the distance between two numbers of the type that are next to each value."""
        exponents = np.frexp(values)[1] - 1
        unit: Array = np.ldexp(1.0, np.maximum(exponents, self.least) - self.digits + 1)
        return unit

    def rounded(self, values: Array) -> Array:
        """Round values to the type."""
        unit = self.unit(values)
        return np.rint(values / unit) * unit


ROUNDINGS = {
    "F64": Rounding(53, -1022),
    "F32": Rounding(24, -126),
    "F16": Rounding(11, -14),
    "BF16": Rounding(8, -126),
}


@dataclass(slots=True)
class WrongRows:
    """Rows that hold other values.

    Attributes
    ----------
    elements
        Number of elements beyond their limit.
    rows
        Number of rows with such elements, or whose update is missing.
    first
        The first of these rows, over all matrices of the tensor; None if there is none.
    """

    elements: int = 0
    rows: int = 0
    first: int | None = None

    def add(self, elements: int, rows: npt.NDArray[np.bool_], start: int) -> None:
        """Count the wrong rows of a block that starts at row `start`."""
        self.elements += elements
        self.rows += int(rows.sum())
        if self.first is None and rows.any():
            self.first = start + int(rows.argmax())


def wrong_rows(change: Change, found: StoredTensor, *, sample: bool = False) -> WrongRows:
    """Find the rows of a tensor that do not hold an updated weight.

    Parameters
    ----------
    change
        The base weight and its update.
    found
        The tensor to check, of the same shape.
    sample
        True to check only some rows of each matrix.

    Notes
    -----
    An element holds if its distance to the exact value is at most the rounding of a merge in the stored type:
    half a unit in the last place (ulp) of the weight for each of the ``n`` terms and for the base weight,
    and ``4 u + r 2^-24`` times ``sum |weight scaling| |B| |A|``, where ``u`` is the relative rounding of the
    stored type and ``r`` the rank. This covers factors, products and sums that are rounded to that type, and
    sums over ``r`` in float32. DoRA adds ``16 u`` times the exact value, and a packed base weight ``2 u``
    times its value. Float32 values that bfloat16 or float16 represent count as values of those types.

    A row has lost its update if at least 16 of its elements differ between the rounded base weight and the
    rounded sum, and most of them are at least as close to the base weight as to the sum.
    """
    own = ROUNDINGS[found.dtype]
    result = _wrong(change, found, own, sample=sample)
    if result.rows and (narrow := _narrower(change, found)) is not None:
        return _wrong(change, found, narrow, sample=sample)
    return result


def _wrong(change: Change, found: StoredTensor, rounding: Rounding, *, sample: bool) -> WrongRows:
    """Find the wrong rows for one rounding."""
    result = WrongRows()
    rows, cols = change.shape
    size = _divisor(rows, (_SAMPLE if sample else _BLOCK) // max(1, cols))
    for index, base in enumerate(change.bases()):
        update = _Update(change, index, base, size)
        blocks = rows // size
        for block in [blocks // 2] if sample else range(blocks):
            place = slice(block * size, (block + 1) * size)
            held = _values(found.matrix(size, cols, index * blocks + block))
            wrong, lost = update.judged(place, held, rounding)
            result.add(int(wrong.sum()), wrong.any(1) | lost, index * rows + place.start)
    return result


class _Update:
    """The exact values of an updated matrix, and the limits of their errors."""

    def __init__(self, change: Change, index: int, base: Matrix, size: int) -> None:
        self._change, self._index, self._size, self._matrix = change, index, size, base
        tensor = change.tensor
        self._is_decoded = tensor is not None and tensor.is_decoded and change.saved is None
        self._whole = _values(base) if self._is_decoded or change.saved is not None else None
        self._terms: list[tuple[Array, Array, float]] = []
        for addition in change.additions.get(index, ()):
            b, a, weight, transposed = addition.load()
            left, right = _values(b), _values(a)
            left, right = (right.T, left.T) if transposed else (left, right)
            self._terms.append((left, right, weight))
        self._norms = change.norms.get(index)
        self._columns = self._column_norms() if self._norms and self._norms.of_columns else None

    def judged(
        self, place: slice, held: Array, rounding: Rounding
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return the elements beyond their limits, and the rows that have lost their update."""
        base, exact = self._sum(place)
        factor = np.ones((1, 1)) if self._norms is None else self._factor(self._norms, place, exact)
        exact = exact * factor
        limit = self._limit(place, base, exact, factor, rounding)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(held - exact) <= limit * (1 + 1e-9))
            after, before = rounding.rounded(exact), rounding.rounded(base)
            visible = after != before
            missed = visible & (np.abs(held - after) >= np.abs(held - before))
        count = visible.sum(1)
        return wrong, (count >= _LEAST_VISIBLE) & (2 * missed.sum(1) > count)

    def _base(self, place: slice) -> Array:
        if self._whole is not None:
            return self._whole[place]
        tensor, (rows, cols) = self._change.tensor, self._change.shape
        assert tensor is not None
        return _values(tensor.matrix(self._size, cols, (self._index * rows + place.start) // self._size))

    def _sum(self, place: slice) -> tuple[Array, Array]:
        base = self._base(place)
        exact = base
        for left, right, weight in self._terms:
            exact = exact + weight * (left[place] @ right)
        return base, exact

    def _limit(self, place: slice, base: Array, exact: Array, factor: Array, rounding: Rounding) -> Array:
        product, small = np.zeros_like(exact), 0.0
        for left, right, weight in self._terms:
            share = 4 * max(rounding.relative, _SINGLE) + right.shape[0] * _SINGLE
            product += share * abs(weight) * (np.abs(left[place]) @ np.abs(right))
            small += (2 + abs(weight)) * float(rounding.unit(np.zeros(1))[0])
        size = np.maximum(np.abs(base), np.abs(exact / factor) if self._norms else np.abs(exact))
        if len(self._terms) > 1:
            size = size + product / rounding.relative
        sums = (len(self._terms) + 1) / 2 * rounding.unit(size)
        of_base = 2 * rounding.relative * np.abs(base) if self._is_decoded else 0.0
        limit: Array = np.abs(factor) * (sums + product + small + of_base)
        return limit + 16 * rounding.relative * np.abs(exact) if self._norms else limit

    def _factor(self, norms: Norms, place: slice, exact: Array) -> Array:
        values = np.array(norms.values)
        if self._columns is not None:
            return _quotient(values, self._columns)[None, :]
        return _quotient(values[place], np.sqrt((exact**2).sum(1)))[:, None]

    def _column_norms(self) -> Array:
        rows, cols = self._change.shape
        squares = np.zeros(cols)
        for start in range(0, rows, self._size):
            squares += (self._sum(slice(start, start + self._size))[1] ** 2).sum(0)
        return np.sqrt(squares)


def _quotient(values: Array, norms: Array) -> Array:
    return np.divide(values, norms, out=np.ones_like(norms), where=(norms > 0) & (values != 0))


def _values(matrix: Matrix) -> Array:
    return matrix.to_array().astype(np.float64)


def _divisor(rows: int, most: int) -> int:
    """Return the largest divisor of a number of rows that is at most `most`; at least 1."""
    return next((size for size in range(min(rows, max(1, most)), 0, -1) if rows % size == 0), 1)


def _narrower(change: Change, found: StoredTensor) -> Rounding | None:
    """Return the 16-bit type that represents all values of a wider tensor; None if there is none."""
    if found.dtype not in ("F32", "F64"):
        return None
    possible = ["BF16", "F16"]
    for values in _blocks(change, found):
        possible = [name for name in possible if np.array_equal(ROUNDINGS[name].rounded(values), values)]
        if not possible:
            return None
    return ROUNDINGS[possible[0]]


def _blocks(change: Change, found: StoredTensor) -> Iterator[Any]:
    rows, cols = change.shape
    size = _divisor(rows, _BLOCK // max(1, cols))
    for block in range(change.count * rows // size):
        yield _values(found.matrix(size, cols, block))
