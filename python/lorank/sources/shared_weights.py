"""The matrices of modules that share a weight."""

from __future__ import annotations

from dataclasses import replace

from lorank.modules.skeleton import Skeleton
from lorank.modules.weight import Weight
from lorank.sources.base import Source, SourceMatrix


def by_name(source: Source) -> dict[str, SourceMatrix]:
    """Map names to a source's matrices; a shared matrix is listed for each of its modules."""
    found = {matrix.info.name: matrix for matrix in source.matrices}
    for owner, others in source.facts.ties.items():
        for other in others:
            weight = weight_of(source.skeleton, other)
            if owner in found and weight is not None and weight.kind != "expert":
                found.setdefault(other, _renamed(found[owner], weight))
    return found


def weight_of(skeleton: Skeleton | None, module: str) -> Weight | None:
    """Return the weight of a module; None without a skeleton, or for a module without a weight."""
    weights = skeleton.weights.values() if skeleton is not None else ()
    return next((weight for weight in weights if weight.module == module and weight.kind), None)


def _renamed(matrix: SourceMatrix, weight: Weight) -> SourceMatrix:
    assert weight.kind is not None
    shape = matrix.info.shape[::-1] if weight.transposed != matrix.transposed else matrix.info.shape
    info = replace(matrix.info, name=weight.module, module=weight.module, kind=weight.kind, shape=shape)
    return replace(matrix, info=info, transposed=weight.transposed)
