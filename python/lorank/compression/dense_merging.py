"""Dense updates that a method merges element by element, decomposed module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal.progress import progress_bar
from lorank.adapters.module import LoraModule
from lorank.compression.difference import Leading, dense_form, leading
from lorank.compression.merge_methods import MergeMethod
from lorank.compression.spectral_form import SpectralForm
from lorank.sources import arrays

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sources:
    """The modules of all adapters that update one weight.

    Attributes
    ----------
    module
        The merged module.
    parts
        The module of each adapter that has it, with the adapter's weight.
    """

    module: LoraModule
    parts: Sequence[tuple[LoraModule, float]]


def merged_forms(
    sources: Sequence[Sources], method: MergeMethod, max_rank: int, threads: int, progress: bool
) -> list[SpectralForm]:
    """Merge the updates of every module and decompose the results.

    At most `threads` dense results are in memory, and one further update.

    Parameters
    ----------
    sources
        The modules to merge.
    method
        The method.
    max_rank
        Largest number of singular values to compute for each module.
    threads
        Number of threads.
    progress
        True to draw a progress bar.
    """
    jobs = [(source, copy) for source in sources for copy in range(source.module.copies)]
    work = sum(math.prod(source.module.shape) for source, _ in jobs)
    found: list[Leading] = []
    with progress_bar("merging", work, enabled=progress) as advance:
        for start in range(0, len(jobs), threads):
            batch = jobs[start : start + threads]
            pairs = [_with_zero(_merged(source, copy, method)) for source, copy in batch]
            names = [source.module.name for source, _ in batch]
            found += leading(pairs, names, max_rank, threads, advance)
    results: Iterator[Leading] = iter(found)
    return [
        dense_form(
            replace(source.module, rank=min(source.module.shape)),
            [next(results) for _ in range(source.module.copies)],
        )
        for source in sources
    ]


def _merged(source: Sources, copy: int, method: MergeMethod) -> Array:
    """Return the merged dense update of one copy."""
    updates: list[Callable[[], Array]] = [partial(_dense, module, copy) for module, _ in source.parts]
    name = source.module.name
    label = name if source.module.copies == 1 else f"{name}[{copy}]"
    # Values that are not finite are refused by the decomposition, which names the module.
    with np.errstate(all="ignore"):
        return method.merged(updates, [weight for _, weight in source.parts], label)


def _dense(module: LoraModule, copy: int) -> Array:
    b, a = module.factors()[copy]
    product: Array = (b.to_array().astype(np.float64) * module.scaling) @ a.to_array().astype(np.float64)
    return product


def _with_zero(update: Array) -> tuple[_core.Matrix, _core.Matrix]:
    return arrays.matrix(update), arrays.matrix(np.broadcast_to(np.zeros(1), update.shape))
