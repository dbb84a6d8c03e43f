"""The error that rounding to 16 bits or fewer adds to an adapter's updates, measured on the written file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import NumericalError
from lorank.adapters.content import AdapterContent, Dtype
from lorank.adapters.formats.base import AdapterFormat
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.stored_factors import is_stored_unchanged, stored_factors
from lorank.adapters.tensors import Tensors

Array = npt.NDArray[Any]


def rounded_types(
    adapter: AdapterContent, ranks: Mapping[str, WrittenRank], dtype: Dtype | None
) -> dict[str, str]:
    """Map every module that is written in fewer than 32 bits to its element type."""
    types = {name: dtype or adapter.modules[name].dtype for name in ranks}
    return {name: stored for name, stored in types.items() if stored not in ("float32", "float64")}


def added(
    adapter: AdapterContent,
    form: AdapterFormat,
    ranks: Mapping[str, WrittenRank],
    keys: Mapping[str, tuple[str, str]],
    file: Path,
    types: Mapping[str, str],
) -> float | None:
    """Return the Frobenius norm of the updates' rounding errors; None if nothing was rounded.

    Parameters
    ----------
    adapter, form, ranks, keys
        The adapter, the format of the file, the rank and scale of every written module, and the keys of
        B and A.
    file
        The written file.
    types
        Element types of the modules that may have been rounded, from `rounded_types`.
    """
    if not types:
        return None
    in_file = form.open(file)
    total = 0.0
    for name, stored in types.items():
        module, written = adapter.modules[name], ranks[name]
        if _is_copied(module, written, stored):
            continue
        exact = _copies(*stored_factors(module, written), module.copies)
        b_key, a_key = keys[name]
        rounded = _copies(
            *form.restored(module, _array(in_file, b_key), _array(in_file, a_key)), module.copies
        )
        for (b, a), (b2, a2) in zip(exact, rounded, strict=True):
            if b.any() and a.any() and not (b2.any() and a2.any()):
                raise NumericalError(
                    f"module {name!r}: all values of a factor round to zero in {stored}: keep {module.dtype}"
                )
            # The file's update is `b_factor` times the adapter's update.
            total += _squared_distance(b, a, b2, a2) / written.b_factor**2
    return math.sqrt(total)


def note(adapter: AdapterContent, amount: float) -> str:
    """Return a note on the rounding error, for an adapter without a certificate."""
    squares = [
        module.scaling**2 * _squared_norm(b.to_array(), a.to_array())
        for module in adapter.adapted
        for b, a in module.factors()
    ]
    norm = math.sqrt(math.fsum(squares))
    return f"rounding moved the updates by {amount:.3g} of {norm:.3g} (Frobenius norms)"


def _is_copied(module: LoraModule, written: WrittenRank, dtype: str) -> bool:
    """Return True if the factors are written without any change of bits."""
    is_unchanged = is_stored_unchanged(module, written)
    return is_unchanged and all(factor.dtype == dtype for pair in module.factors() for factor in pair)


def _array(tensors: Tensors, key: str) -> Array:
    first, *rest = tensors.shapes()[key]
    return tensors.matrix(key, first, math.prod(rest)).to_array().reshape(first, *rest)


def _copies(b: Array, a: Array, copies: int) -> Iterator[tuple[Array, Array]]:
    """Yield the factors of every copy, from stored factors."""
    b, rank = b.reshape(b.shape[0], -1), a.shape[0] // copies
    a = a.reshape(a.shape[0], -1)
    return ((b[:, e::copies], a[e * rank : (e + 1) * rank]) for e in range(copies))


def _squared_distance(b: Array, a: Array, b2: Array, a2: Array) -> float:
    """Return ``||B A - B2 A2||_F^2``."""
    if np.array_equal(b, b2) and np.array_equal(a, a2):
        return 0.0
    return _squared_norm(np.hstack([b, -b2]), np.vstack([a, a2]))


def _squared_norm(b: Array, a: Array) -> float:
    """Return ``||B A||_F^2``, from the triangular factors of B and A^T."""
    # The trace of B^T B A A^T would lose digits by cancellation.
    r_left: Array = np.linalg.qr(b.astype(np.float64))[1]
    r_right: Array = np.linalg.qr(a.T.astype(np.float64))[1]
    return float(np.square(r_left @ r_right.T).sum())
