"""Factors as files store them: padded, scaled, experts interleaved, kernels unflattened."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import NumericalError
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank

Array = npt.NDArray[Any]


def stored_factors(module: LoraModule, written: WrittenRank) -> tuple[Array, Array]:
    """Return B and A of a module as a file stores them."""
    return padded_factors(module, written.rank, written.factor(module))


def padded_factors(module: LoraModule, rank: int, factor: float = 1.0) -> tuple[Array, Array]:
    """Return ``factor * B`` and A in their stored shapes, padded to a rank that is at least the module's."""
    pairs = [(b.to_array(), a.to_array()) for b, a in module.factors()] if module.rank else []
    pairs = (
        pairs
        or [(np.zeros((module.shape[0], 0), np.float32), np.zeros((0, module.shape[1]), np.float32))]
        * module.copies
    )
    bs, as_ = zip(*[_padded(_scaled(module, b, factor), a, rank) for b, a in pairs], strict=True)
    if module.kind == "expert":
        # The index of the expert is the slowest in A and the fastest in B.
        return np.stack(bs, axis=2).reshape(module.shape[0], -1), np.concatenate(as_)
    b_shape, a_shape = stored_shapes(module, rank)
    return bs[0].reshape(b_shape), as_[0].reshape(a_shape)


def stored_shapes(module: LoraModule, rank: int) -> tuple[list[int], list[int]]:
    """Return the stored shapes of B and A of a module that is not a stack."""
    return [module.shape[0], rank, *module.b_tail], [rank, *(module.a_tail or module.shape[1:])]


def is_stored_unchanged(module: LoraModule, written: WrittenRank) -> bool:
    """Return True if factors are written without padding, scaling or interleaving."""
    is_unscaled = written.factor(module) == 1.0
    return is_unscaled and module.rank == written.rank and module.kind != "expert"


def _scaled(module: LoraModule, b: Array, factor: float) -> Array:
    """Return ``factor * B`` in the type of B.

    Raises
    ------
    NumericalError
        If the product leaves the range of the type, so that the update would be lost.
    """
    if factor == 1.0 or not b.size:
        return b
    with np.errstate(over="ignore", under="ignore"):
        scaled = b.astype(np.float64) * factor
        found: Array = scaled.astype(b.dtype)
        largest, before = float(np.abs(found).max()), float(np.abs(b).max())
    is_lost = before > 0 and factor != 0 and largest < np.finfo(b.dtype).tiny
    if math.isfinite(before) and (is_lost or not math.isfinite(largest)):
        raise NumericalError(
            f"module {module.name!r}: its scaling {module.scaling:g} times B leaves the range of {b.dtype}: "
            "correct the scaling"
        )
    return found


def _padded(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    missing = rank - a.shape[0]
    if missing:
        b, a = np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))
    return np.ascontiguousarray(b), np.ascontiguousarray(a)
