"""Products of factors that are added to one matrix of a stored tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lorank._core import Matrix
from lorank.adapters.factors import Pair
from lorank.adapters.module import LoraModule
from lorank.baking.blocks import Block
from lorank.sources import arrays

Term: TypeAlias = "tuple[Matrix, Matrix, float, bool]"
"""B, A, the weight of the product, and True if the transpose of the product is added."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Addition:
    """A term of the update of a matrix. The factors are read when the matrix is computed.

    Attributes
    ----------
    module
        The name of the adapted module.
    load
        A function that returns the term.
    """

    module: str
    load: Callable[[], Term] = field(repr=False)


class RecentFactors:
    """The factors of recently used modules, because reading a stack gives the factors of all experts."""

    _MOST = 4

    def __init__(self) -> None:
        self._pairs: dict[int, Sequence[Pair]] = {}

    def pair(self, module: LoraModule, copy: int) -> Pair:
        """Return B and A of a copy of a module, which must stay alive."""
        pairs = self._pairs.pop(id(module), None) or module.factors()
        if module.copies > 1:
            self._pairs[id(module)] = pairs
        while len(self._pairs) > self._MOST:
            del self._pairs[next(iter(self._pairs))]
        return pairs[copy]


def product(
    recent: RecentFactors, module: LoraModule, copy: int, weight: float, *, transposed: bool
) -> Addition:
    """Return the update of a whole matrix by one copy of a module.

    Parameters
    ----------
    recent
        The reader of factors.
    module, copy
        The adapted module, and the index of the expert.
    weight
        The weight of the adapter.
    transposed
        True if the matrix is stored as ``(in, out)``.
    """
    return Addition(module.name, partial(_whole, recent, module, copy, weight, transposed))


def part_of_product(
    recent: RecentFactors,
    module: LoraModule,
    copy: int,
    weight: float,
    block: Block,
    shape: tuple[int, int],
    *,
    transposed: bool,
) -> Addition:
    """Return the update of a matrix that holds a block of a parameter.

    Parameters
    ----------
    recent, module, copy, weight, transposed
        As in `product`, for the parameter.
    block
        The block of the parameter, and its place in the matrix.
    shape
        The stored shape of the matrix.
    """
    return Addition(module.name, partial(_part, recent, module, copy, weight, block, shape, transposed))


def vector(module: str, values: Array, weight: float) -> Addition:
    """Return the update of a bias, which is stored as one row."""
    row = np.ascontiguousarray(values.reshape(1, -1))
    return Addition(module, lambda: (Matrix.from_array(np.ones((1, 1))), arrays.matrix(row), weight, False))


def new_rows(module: str, old: Array, new: Array, indices: Sequence[int], count: int) -> Addition:
    """Return the update that replaces rows of a matrix of `count` rows."""

    def load() -> Term:
        place = np.zeros((count, len(indices)))
        place[list(indices), range(len(indices))] = 1.0
        change = new.astype(np.float64) - old
        return Matrix.from_array(place), Matrix.from_array(np.ascontiguousarray(change)), 1.0, False

    return Addition(module, load)


def _whole(recent: RecentFactors, module: LoraModule, copy: int, weight: float, transposed: bool) -> Term:
    b, a = recent.pair(module, copy)
    return b, a, weight * module.scaling, transposed


def _part(
    recent: RecentFactors,
    module: LoraModule,
    copy: int,
    weight: float,
    block: Block,
    shape: tuple[int, int],
    transposed: bool,
) -> Term:
    b, a = (x.to_array() for x in recent.pair(module, copy))
    left, right = (a.T, b.T) if transposed else (b, a)
    left, right = left[block.target_rows.indices()], right[:, block.target_cols.indices()]
    if block.transposed:
        left, right = right.T, left.T
    rank = left.shape[1]
    placed_left, placed_right = np.zeros((shape[0], rank), left.dtype), np.zeros((rank, shape[1]), left.dtype)
    placed_left[block.source_rows.indices()] = left
    placed_right[:, block.source_cols.indices()] = right
    return (
        arrays.matrix(placed_left),
        arrays.matrix(np.ascontiguousarray(placed_right)),
        weight * module.scaling,
        False,
    )
