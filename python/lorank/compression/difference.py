"""The leading singular values and vectors of the differences of two models' matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorank import _core
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar
from lorank.adapters.factors import MatrixFactors
from lorank.adapters.module import LoraModule
from lorank.compression.spectral_form import SpectralForm, Triplets
from lorank.modules import naming
from lorank.sources import SourceMatrix


@dataclass(frozen=True, slots=True)
class MatrixPair:
    """A matrix of the base model, and the same matrix of the tuned model."""

    base: SourceMatrix
    tuned: SourceMatrix


@dataclass(frozen=True, slots=True)
class _Leading:
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
    found: dict[int, _Leading] = {}
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
) -> list[_Leading]:
    """Return the leading triplets of each pair's difference."""
    loaded = [(pair.tuned.load(), pair.base.load()) for pair in pairs]
    infos = [pair.base.info for pair in pairs]
    most = min(max_rank, max((side for info in infos for side in info.shape), default=0))
    results = core_calls.collect(
        lambda receive: _core.subtract(loaded, most, threads, receive),
        lambda index: infos[index].name,
        lambda index: advance(math.prod(infos[index].shape), infos[index].name),
    )
    return [
        _Leading(
            Triplets(a, values, b) if _is_swapped(pair.base) else Triplets(b, values, a), energy, following
        )
        for pair, ((b, values, a), energy, following) in zip(pairs, results, strict=True)
    ]


def _is_swapped(matrix: SourceMatrix) -> bool:
    """Return True if the loaded matrix is the transpose of PEFT's update, as for an embedding."""
    return matrix.transposed != (matrix.info.kind == "embedding")


def _form(matrix: SourceMatrix, results: Sequence[_Leading]) -> SpectralForm:
    parts = [result.part for result in results]
    shape = (parts[0].b_columns.shape[1], parts[0].a_rows.shape[1])
    energy = math.fsum(result.energy for result in results)
    kept = math.fsum(float(np.square(part.singular_values).sum()) for part in parts)
    info = matrix.info
    module = LoraModule(
        info.module,
        "expert" if naming.is_parameter(info.module) else info.kind,
        shape,
        rank=min(shape),
        scaling=1.0,
        dtype="float32",
        factors=MatrixFactors(()),
        copies=len(parts),
        a_tail=matrix.kernel or shape[1:],
        b_tail=(1,) * (len(matrix.kernel) - 1),
    )
    # If all values were computed, the two energies differ only by rounding.
    unseen = energy - kept if len(parts[0].singular_values) < min(shape) else 0.0
    following = max(result.following for result in results)
    return SpectralForm(module, parts, max(unseen, 0.0), following, is_dense=True)
