"""Frobenius norms of the base model's weights, by which singular values are compared between modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from lorank._internal.progress import waiting
from lorank.sources import OPENING, AnySource, SourceMatrix, open_source
from lorank.sources.shared_weights import by_name

_BLOCK_ROWS = 1024


def base_norms(base: AnySource, modules: Iterable[str], progress: bool) -> dict[str, float]:
    """Return the Frobenius norm of the base weight of every module; of the whole stack for experts.

    Parameters
    ----------
    base
        The base model, read matrix by matrix.
    modules
        Names of the modules.
    progress
        True to show that the model is being opened.

    Raises
    ------
    ValueError
        If the base model has no weight of a module's name, or the norm is zero or not finite.
    """
    with waiting(OPENING, enabled=progress):
        source = open_source(base)
    matrices: dict[str, list[SourceMatrix]] = defaultdict(list)
    for matrix in by_name(source).values():
        matrices[matrix.info.module].append(matrix)
    norms = {}
    for name in modules:
        if name not in matrices:
            raise ValueError(
                f"{source.label} has no weight of module {name!r}: give the base model of the adapter"
            )
        norms[name] = math.sqrt(math.fsum(_energy(matrix) for matrix in matrices[name]))
        if not 0 < norms[name] < math.inf:
            raise ValueError(
                f"{source.label}: module {name!r}: the norm of the weight is {norms[name]}: "
                "singular values cannot be divided by it"
            )
    return norms


def _energy(matrix: SourceMatrix) -> float:
    values = matrix.load().to_array()
    blocks = (values[k : k + _BLOCK_ROWS].astype(np.float64) for k in range(0, len(values), _BLOCK_ROWS))
    return math.fsum(float(np.square(block).sum()) for block in blocks)
