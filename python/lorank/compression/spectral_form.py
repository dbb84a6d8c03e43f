"""Updates in balanced spectral form, in which every truncation is a choice of columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar
from lorank.adapters.factors import MatrixFactors, in_memory
from lorank.adapters.module import LoraModule, combined_values
from lorank.compression.orthogonality import are_orthogonal

Array = npt.NDArray[Any]
Term = tuple[_core.Matrix, _core.Matrix, float]


@dataclass(frozen=True, slots=True)
class Update:
    """The terms of a module's new update.

    Attributes
    ----------
    module
        The module's name, kind and shape; its rank is the sum of the ranks of the terms.
    terms
        Function that returns the products ``weight * B @ A`` to add up, for every copy.
    is_spectral
        True if a flag of the file states that there is one term, in spectral form. The form is checked before
        it is used.
    """

    module: LoraModule
    terms: Callable[[], Sequence[Sequence[Term]]]
    is_spectral: bool = False

    @classmethod
    def of(cls, module: LoraModule, *, is_spectral: bool = False) -> Update:
        """Return the current update of a module."""
        return cls(module, lambda: [[(b, a, module.scaling)] for b, a in module.factors()], is_spectral)


class Part(Protocol):
    """The decomposed update of one copy: the core's decomposition, or `Triplets`."""

    @property
    def singular_values(self) -> npt.NDArray[np.float64]:
        """Singular values ``(k,)``, descending, float64."""
        ...


@dataclass(frozen=True, slots=True)
class Triplets:
    """An update in balanced spectral form in memory: ``b_columns.T @ a_rows``.

    Attributes
    ----------
    b_columns
        ``(k, out)``, ``sqrt(s_i) u_i``.
    singular_values
        ``(k,)``, descending, float64.
    a_rows
        ``(k, in)``, ``sqrt(s_i) v_i``.
    """

    b_columns: Array
    singular_values: npt.NDArray[np.float64]
    a_rows: Array


@dataclass(frozen=True)
class SpectralForm:
    """The decomposed update of a module.

    Attributes
    ----------
    module
        The module before truncation.
    parts
        The decomposed update of every copy, all with the same number of values.
    unseen_energy
        ``||dW||_F^2`` minus the squares of the values, where only the leading values were computed.
    unseen_norm
        The largest of the values that were not computed.
    is_dense
        True for a difference of dense weights, False for a product of factors.
    """

    module: LoraModule
    parts: Sequence[Part]
    unseen_energy: float = 0.0
    unseen_norm: float = 0.0
    is_dense: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the original factors or difference."""
        module = self.module
        return module.copies * math.prod(module.shape) if self.is_dense else module.num_parameters

    @cached_property
    def energy(self) -> float:
        """``||dW||_F^2``, including values that were not computed."""
        return self.unseen_energy + float(np.square(self.values).sum())

    @cached_property
    def values(self) -> npt.NDArray[np.float64]:
        """Singular values; for several copies, the root of the sum of their squares."""
        return combined_values([part.singular_values for part in self.parts])

    @property
    def largest_values(self) -> npt.NDArray[np.float64]:
        """Largest value over the copies, by index: the spectral error of dropping this value."""
        if len(self.parts) == 1:
            return self.values
        largest: npt.NDArray[np.float64] = np.max([part.singular_values for part in self.parts], axis=0)
        return largest


def truncate(
    forms: Sequence[SpectralForm], masks: Sequence[npt.NDArray[np.bool_]], threads: int
) -> list[LoraModule]:
    """Return modules of scaling 1 that keep the values that masks select.

    Parameters
    ----------
    forms, masks
        Decomposed updates, and a mask of the values to keep for each.
    threads
        Number of threads.

    Notes
    -----
    Factors of decompositions are computed when they are first read; factors of `Triplets` are in memory.
    """
    factors: list[list[tuple[_core.Matrix, _core.Matrix] | None]] = [
        [None] * len(form.parts) for form in forms
    ]
    choices: list[tuple[_core.Decomposition, Sequence[bool]]] = []
    places: list[tuple[int, int]] = []
    marks = [keep.tolist() for keep in masks]
    for i, (form, keep) in enumerate(zip(forms, masks, strict=True)):
        for e, part in enumerate(form.parts):
            if isinstance(part, _core.Decomposition):
                choices.append((part, marks[i]))
                places.append((i, e))
            elif isinstance(part, Triplets):
                factors[i][e] = in_memory(part.b_columns[keep].T, part.a_rows[keep])

    rebuilt = core_calls.collect(
        lambda receive: _core.rebuild(choices, threads, receive),
        lambda index: forms[places[index][0]].module.name,
    )
    for (i, e), pair in zip(places, rebuilt, strict=True):
        factors[i][e] = pair
    return [
        _truncated(form.module, kept.count(True), [pair for pair in pairs if pair is not None])
        for form, kept, pairs in zip(forms, marks, factors, strict=True)
    ]


def _truncated(
    module: LoraModule, rank: int, pairs: Sequence[tuple[_core.Matrix, _core.Matrix]]
) -> LoraModule:
    carried = {name: value * np.float32(module.scaling) for name, value in module.carried.items()}
    return replace(module, rank=rank, scaling=1.0, factors=MatrixFactors(pairs), carried=carried)


def spectral_form(
    updates: Sequence[Update], threads: int, progress: bool, label: str = "decomposing"
) -> list[SpectralForm]:
    """Decompose updates, in parallel.

    Parameters
    ----------
    updates
        The updates.
    threads
        Number of threads.
    progress
        True to draw a progress bar.
    label
        Label of the progress bar.

    Raises
    ------
    NumericalError
        If factors hold NaN or infinite values; the message names the module.
    MemoryError, OSError
        If memory or threads run out, or a file cannot be read.
    """
    forms: dict[int, SpectralForm] = {}
    with progress_bar(label, len(updates), enabled=progress) as advance:
        for batch in _batches(updates):
            for i, form in _decomposed(updates, batch, threads):
                forms[i] = form
                advance(1, form.module.name)
    return [forms[i] for i in range(len(updates))]


def _batches(updates: Sequence[Update]) -> Iterator[list[int]]:
    """Yield the indices of plain modules together, and indices of stacks one by one.

    Workers read factors of plain modules from disk. Factors of experts are copied to memory.
    """
    yield [i for i, update in enumerate(updates) if update.module.copies == 1]
    yield from ([i] for i, update in enumerate(updates) if update.module.copies > 1)


def _decomposed(
    updates: Sequence[Update], batch: Sequence[int], threads: int
) -> Iterator[tuple[int, SpectralForm]]:
    jobs: list[tuple[int, Sequence[Term]]] = []
    for i in batch:
        if updates[i].is_spectral and (form := _unchanged(updates[i])):
            yield i, form
        else:
            jobs += [(i, terms) for terms in updates[i].terms()]
    results: list[_core.Decomposition] = core_calls.collect(
        lambda receive: _core.decompose([list(terms) for _, terms in jobs], threads, receive),
        lambda index: updates[jobs[index][0]].module.name,
    )
    parts: dict[int, list[_core.Decomposition]] = {}
    for (i, _), result in zip(jobs, results, strict=True):
        parts.setdefault(i, []).append(result)
    for i, found in parts.items():
        yield i, SpectralForm(updates[i].module, found)


def _unchanged(update: Update) -> SpectralForm | None:
    """Return the form of factors that are already singular vectors; None for other factors.

    In balanced factors, the length of every column of B and row of A is the root of the singular value.
    """
    parts = []
    for ((b, a, scaling),) in update.terms():
        columns, rows = b.to_array().T, a.to_array()
        if not all(are_orthogonal(side, update.module.dtype) for side in (columns, rows)):
            return None
        # Profiles other than "compact" scale only B.
        length, width = (np.linalg.norm(x.astype(np.float64), axis=1) for x in (columns, rows))
        size = abs(scaling)
        balance = np.sqrt(np.divide(size * width, length, out=np.zeros_like(length), where=length > 0))
        columns = (columns * np.copysign(balance, scaling)[:, None]).astype(columns.dtype)
        inverse = np.divide(size, balance, out=np.zeros_like(length), where=balance > 0)
        rows = (rows * inverse[:, None]).astype(rows.dtype)
        values = size * length * width
        # Rounding may have changed the order of nearly equal values.
        order = np.argsort(-values, kind="stable")
        parts.append(Triplets(columns[order], values[order], rows[order]))
    return SpectralForm(update.module, parts)
