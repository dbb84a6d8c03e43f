"""The leading singular values and vectors of the differences of two models' matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorank import _core
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar
from lorank.adapters.factors import MatrixFactors
from lorank.adapters.module import LoraModule
from lorank.compression.spectral_form import SpectralForm, Triplets
from lorank.modules import naming
from lorank.sources import SourceMatrix

# Largest number of singular values of a dense difference that are computed, unless a knob sets it.
DEFAULT_MAX_RANK = 128


@dataclass(frozen=True, slots=True)
class MatrixPair:
    """A matrix of the base model, and the same matrix of the tuned model."""

    base: SourceMatrix
    tuned: SourceMatrix


@dataclass(frozen=True, slots=True)
class Leading:
    """The leading triplets of a difference, the energy of the difference, and the next singular value."""

    part: Triplets
    energy: float
    following: float


def difference_forms(
    pairs: Sequence[MatrixPair], max_rank: int, threads: int, progress: bool
) -> list[SpectralForm]:
    """Decompose the difference of every pair; return the form of each module.

    Matrices that are computed on loading are read in batches, one matrix per thread, to bound memory.

    Parameters
    ----------
    pairs
        The matrices of both models.
    max_rank
        Largest number of singular values to compute for each matrix.
    threads
        Number of threads.
    progress
        True to draw a progress bar.
    """
    found: dict[int, Leading] = {}
    work = sum(math.prod(pair.base.info.shape) for pair in pairs)
    with progress_bar("subtracting", work, enabled=progress) as advance:
        direct = [i for i, pair in enumerate(pairs) if not (pair.base.lazy or pair.tuned.lazy)]
        chosen = set(direct)
        lazy = [i for i in range(len(pairs)) if i not in chosen]
        for batch in [direct, *(lazy[k : k + threads] for k in range(0, len(lazy), threads))]:
            found |= zip(
                batch, _subtracted([pairs[i] for i in batch], max_rank, threads, advance), strict=True
            )
    by_module: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        by_module[pair.base.info.module].append(i)
    return [_form(pairs[group[0]].base, [found[i] for i in group]) for group in by_module.values()]


def _subtracted(
    pairs: Sequence[MatrixPair], max_rank: int, threads: int, advance: Callable[[int, str], object]
) -> list[Leading]:
    """Return the leading triplets of each pair's difference."""
    loaded = [(pair.tuned.load(), pair.base.load()) for pair in pairs]
    names = [pair.base.info.name for pair in pairs]
    results = leading(loaded, names, max_rank, threads, advance)
    return [
        replace(result, part=_transposed(result.part)) if _is_swapped(pair.base) else result
        for pair, result in zip(pairs, results, strict=True)
    ]


def leading(
    pairs: Sequence[tuple[_core.Matrix, _core.Matrix]],
    names: Sequence[str],
    max_rank: int,
    threads: int,
    advance: Callable[[int, str], object],
) -> list[Leading]:
    """Return the leading triplets of differences.

    Parameters
    ----------
    pairs
        The minuend and the subtrahend of each difference.
    names
        Names of the differences, for errors and progress.
    max_rank
        Largest number of singular values to compute for each difference.
    threads
        Number of threads.
    advance
        Function that receives the number of elements and the name of each finished difference.
    """
    most = min(max_rank, max((side for pair in pairs for side in pair[0].shape), default=0))
    results = core_calls.collect(
        lambda receive: _core.subtract(pairs, most, threads, receive),
        lambda index: names[index],
        lambda index: advance(math.prod(pairs[index][0].shape), names[index]),
    )
    return [
        Leading(Triplets(b, values, a), energy, following) for (b, values, a), energy, following in results
    ]


def _transposed(part: Triplets) -> Triplets:
    return Triplets(part.a_rows, part.singular_values, part.b_columns)


def _is_swapped(matrix: SourceMatrix) -> bool:
    """Return True if the loaded matrix is the transpose of PEFT's update, as for an embedding."""
    return matrix.transposed != (matrix.info.kind == "embedding")


def _form(matrix: SourceMatrix, results: Sequence[Leading]) -> SpectralForm:
    part = results[0].part
    shape = (part.b_columns.shape[1], part.a_rows.shape[1])
    info = matrix.info
    module = LoraModule(
        info.module,
        "expert" if naming.is_parameter(info.module) else info.kind,
        shape,
        rank=min(shape),
        scaling=1.0,
        dtype="float32",
        factors=MatrixFactors(()),
        copies=len(results),
        a_tail=matrix.kernel or shape[1:],
        b_tail=(1,) * (len(matrix.kernel) - 1),
    )
    return dense_form(module, results)


def dense_form(module: LoraModule, results: Sequence[Leading]) -> SpectralForm:
    """Return the form of a module from the leading triplets of all its copies."""
    parts = [result.part for result in results]
    energy = math.fsum(result.energy for result in results)
    kept = math.fsum(float(np.square(part.singular_values).sum()) for part in parts)
    # If all values were computed, the two energies differ only by rounding.
    unseen = energy - kept if len(parts[0].singular_values) < min(module.shape) else 0.0
    following = max(result.following for result in results)
    return SpectralForm(module, parts, max(unseen, 0.0), following, is_dense=True)
