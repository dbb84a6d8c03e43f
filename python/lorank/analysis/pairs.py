"""The matrices that two models have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank.modules import naming
from lorank.sources import MatrixInfo, Skipped, Source, SourceMatrix
from lorank.sources.shared_weights import by_name


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix of one model, or its first rows.

    Attributes
    ----------
    matrix
        The matrix.
    rows
        Number of rows of ``(out, in)`` that are compared; None for all.
    """

    matrix: SourceMatrix
    rows: int | None = None

    def load(self) -> _core.Matrix:
        """Return the matrix for the core, as it is stored."""
        if self.rows is None:
            return self.matrix.load()
        array = self.matrix.load().to_array()
        return _core.Matrix.from_array(array[:, : self.rows] if self._is_turned else array[: self.rows])

    def oriented(self, loaded: _core.Matrix) -> npt.NDArray[Any]:
        """Return the values of the loaded matrix with shape ``(out, in)``."""
        array: npt.NDArray[Any] = loaded.to_array()
        return array.T if self._is_turned else array

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the whole matrix."""
        # The shape of an expert is the stored one.
        is_stored = self.matrix.info.kind == "expert"
        shape = self.matrix.info.shape
        return shape[::-1] if is_stored and self.matrix.transposed else shape

    @property
    def _is_turned(self) -> bool:
        return self.matrix.transposed


@dataclass(frozen=True, slots=True)
class ComparedPair:
    """A matrix of model A, the same matrix of model B, the identity of the row, and remarks."""

    a: Operand
    b: Operand
    info: MatrixInfo
    flags: tuple[str, ...] = ()


class Pairing(NamedTuple):
    """The pairs of two models, the matrices without a pair, and the prefixes of one model's names."""

    pairs: list[ComparedPair]
    skipped: list[Skipped]
    prefix_a: str
    prefix_b: str


def paired(a: Source, b: Source, include: naming.Targets, exclude: naming.Targets) -> Pairing:
    """Pair the matrices of two models by name.

    A matrix that only one model shares between modules is paired once for each module. If no name is equal,
    and most names of one model are those of the other after a prefix, the prefix is dropped.

    Parameters
    ----------
    a, b
        The models.
    include, exclude
        Modules to select and to leave out, by their names in A.

    Raises
    ------
    ValueError
        If two matrices of one name have different shapes (except for the rows of embeddings and output
        heads), or the models have no selected matrix in common.
    """
    old, new = by_name(a), by_name(b)
    prefix_a, prefix_b = _prefix(new, old), _prefix(old, new)
    old, new = _without(prefix_a, old), _without(prefix_b, new)
    own = [
        {name.removeprefix(prefix) for name in (matrix.info.name for matrix in source.matrices)}
        for source, prefix in ((a, prefix_a), (b, prefix_b))
    ]
    chosen = _selected([*old.values(), *new.values()], include, exclude)
    common = [name for name in old if name in new and (name in own[0] or name in own[1])]
    pairs = [_pair(old[name], new[name], a.label, b.label) for name in common if chosen(old[name])]
    if not pairs:
        raise ValueError(f"{a.label} and {b.label} have no selected matrix in common")
    skipped = [
        Skipped(matrix.info.name, matrix.info.shape, f"only in {source.label}")
        for matrices, others, source, mine in ((old, new, a, own[0]), (new, old, b, own[1]))
        for name, matrix in matrices.items()
        if name in mine and name not in others and chosen(matrix)
    ]
    return Pairing(pairs, skipped, prefix_a, prefix_b)


def _prefix(short: Collection[str], long: Collection[str]) -> str:
    """Return the prefix before most names of `long` that are names of `short` otherwise; or nothing."""
    if not set(short).isdisjoint(long):
        return ""
    found = Counter(
        name.removesuffix(suffix)
        for name in long
        for suffix in naming.suffixes(name)
        if suffix != name and suffix in short
    )
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    return prefix if 2 * count > min(len(short), len(long)) else ""


def _without(prefix: str, matrices: dict[str, SourceMatrix]) -> dict[str, SourceMatrix]:
    return {name.removeprefix(prefix): matrix for name, matrix in matrices.items()}


def _selected(
    matrices: Iterable[SourceMatrix], include: naming.Targets, exclude: naming.Targets
) -> Callable[[SourceMatrix], bool]:
    """Return a function that returns True for selected matrices."""
    modules = {matrix.info.module for matrix in matrices}
    spelled = {name for module in modules for name in naming.spellings(module)}
    included = set(naming.filtered(spelled, include, None))
    excluded = spelled - set(naming.filtered(spelled, None, exclude))

    def is_selected(matrix: SourceMatrix) -> bool:
        names = set(naming.spellings(matrix.info.module))
        return bool(names & included) and not names & excluded

    return is_selected


def _pair(old: SourceMatrix, new: SourceMatrix, label_a: str, label_b: str) -> ComparedPair:
    name = old.info.name
    shapes = Operand(old).shape, Operand(new).shape
    if shapes[0] == shapes[1]:
        return ComparedPair(Operand(old), Operand(new), old.info)
    has_vocabulary = old.info.kind == new.info.kind == "embedding" or naming.is_output_head(name)
    if not has_vocabulary or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"{name}: {shapes[0]} in {label_a}, {shapes[1]} in {label_b}: "
            "exclude this module to compare the others"
        )
    rows = min(shapes[0][0], shapes[1][0])
    extra, label = abs(shapes[0][0] - shapes[1][0]), label_a if shapes[0][0] > rows else label_b
    info = replace(old.info, shape=(rows, shapes[0][1]))
    one, other = (
        Operand(matrix, rows if shape[0] > rows else None)
        for matrix, shape in zip((old, new), shapes, strict=True)
    )
    return ComparedPair(
        one, other, info, (f"{label} has {extra:,} more rows: the first {rows:,} are compared",)
    )


def skipped_tensors(a: Source, b: Source, prefix_a: str, prefix_b: str) -> list[Skipped]:
    """Return the tensors of both models that have no matrix; those in both are marked as equal or changed.

    The prefixes are those of `paired`.
    """
    old = {entry.name.removeprefix(prefix_a): entry for entry in a.skipped}
    new = {entry.name.removeprefix(prefix_b): entry for entry in b.skipped}
    found = []
    for name, entry in old.items():
        other = new.get(name)
        if other is None:
            found.append(_alone(entry, a.label))
        elif entry.name in a.skipped_values and other.name in b.skipped_values:
            one, two = a.skipped_values[entry.name](), b.skipped_values[other.name]()
            is_same = entry.shape == other.shape and np.array_equal(
                one.to_array(), two.to_array(), equal_nan=True
            )
            found.append(replace(entry, reason=f"{entry.reason}, {'equal' if is_same else 'changed'}"))
        else:
            found.append(entry)
    return found + [_alone(entry, b.label) for name, entry in new.items() if name not in old]


def _alone(entry: Skipped, label: str) -> Skipped:
    """Return a skipped tensor of one model, with the model in its reason."""
    return entry if entry.is_tied else replace(entry, reason=f"{entry.reason}, only in {label}")
