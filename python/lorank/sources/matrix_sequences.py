"""Sequences of matrices that are described on demand, so that a stack of experts takes no memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar, overload

T = TypeVar("T")
S = TypeVar("S")


class _Computed(Sequence[T]):
    """A sequence that computes its items."""

    def _item(self, index: int) -> T:
        """Return the item at an index that is not negative and within the sequence."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(map(self._item, range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} matrices")
        return self._item(index % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (_Computed, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # Items may be unhashable.

    def __repr__(self) -> str:
        return f"<{len(self)} matrices>"


class Mapped(_Computed[T], Generic[S, T]):
    """The results of a function for the items of a sequence."""

    __slots__ = ("_function", "_items")

    def __init__(self, function: Callable[[S], T], items: Sequence[S]) -> None:
        self._function = function
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return map(self._function, self._items)

    def _item(self, index: int) -> T:
        return self._function(self._items[index])


class Chained(_Computed[T]):
    """The items of several sequences.

    Attributes
    ----------
    parts
        The sequences that are not empty.
    """

    __slots__ = ("_ends", "parts")

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = tuple(part for part in parts if len(part) > 0)
        self._ends = tuple(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[T]:
        for part in self.parts:
            yield from part

    def _item(self, index: int) -> T:
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]
