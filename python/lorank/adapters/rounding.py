"""What rounding to a narrow type adds to an adapter's updates, measured on the written file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.adapters import profiles
from lorank.adapters.content import AdapterContent, Dtype
from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import FileTensors

Array = npt.NDArray[Any]


def narrow(
    adapter: AdapterContent, layouts: Mapping[str, profiles.Layout], dtype: Dtype | None
) -> dict[str, str]:
    """The modules that are written in a type narrower than float32, and which."""
    types = {name: dtype or adapter.modules[name].dtype for name in layouts}
    return {name: stored for name, stored in types.items() if stored not in ("float32", "float64")}


def added(
    adapter: AdapterContent,
    layouts: Mapping[str, profiles.Layout],
    keys: Mapping[str, tuple[str, str]],
    file: Path,
    types: Mapping[str, str],
) -> float | None:
    """``||.||_F`` between the updates in memory and in the file; None if no type is narrow.

    Parameters
    ----------
    adapter, layouts, keys
        What was written, how, and under which keys of B and A.
    file
        Where.
    types
        Of the modules that may have been rounded, as from `narrow`.
    """
    if not types:
        return None
    written = FileTensors(file)
    total = 0.0
    for name, stored in types.items():
        module, layout = adapter.modules[name], layouts[name]
        if _is_copied(module, layout, stored):
            continue
        exact = _copies(*profiles.factors(module, layout), module.copies)
        b_key, a_key = keys[name]
        rounded = _copies(_rows(written, b_key), _rows(written, a_key), module.copies)
        for (b, a), (b2, a2) in zip(exact, rounded, strict=True):
            # The file's update is the adapter's times the layout's factor.
            total += _squared_distance(b, a, b2, a2) / layout.b_factor**2
    return math.sqrt(total)


def note(adapter: AdapterContent, amount: float) -> str:
    """What to say where there is no certificate that could tell."""
    squares = [
        module.scaling**2 * _squared_norm(b.to_array(), a.to_array())
        for module in adapter.adapted
        for b, a in module.factors()
    ]
    norm = math.sqrt(math.fsum(squares))
    return f"rounding moved the updates by {amount:.3g} of {norm:.3g} (Frobenius norms)"


def _is_copied(module: LoraModule, layout: profiles.Layout, dtype: str) -> bool:
    """Whether the factors are written bit by bit."""
    as_it_is = profiles.is_written_as_it_is(module, layout)
    return as_it_is and all(factor.dtype == dtype for pair in module.factors() for factor in pair)


def _rows(tensors: FileTensors, key: str) -> Array:
    first, *rest = tensors.shapes()[key]
    return tensors.matrix(key, first, math.prod(rest)).to_array()


def _copies(b: Array, a: Array, copies: int) -> Iterator[tuple[Array, Array]]:
    """Every copy's factors from the stored ones."""
    b, rank = b.reshape(b.shape[0], -1), a.shape[0] // copies
    a = a.reshape(a.shape[0], -1)
    return ((b[:, e::copies], a[e * rank : (e + 1) * rank]) for e in range(copies))


def _squared_distance(b: Array, a: Array, b2: Array, a2: Array) -> float:
    """``||B A - B2 A2||_F^2``."""
    if np.array_equal(b, b2) and np.array_equal(a, a2):
        return 0.0
    return _squared_norm(np.hstack([b, -b2]), np.vstack([a, a2]))


def _squared_norm(b: Array, a: Array) -> float:
    """``||B A||_F^2`` from small products of the factors."""
    # A change of basis first: traces of the products alone would cancel.
    r_left: Array = np.linalg.qr(b.astype(np.float64))[1]
    r_right: Array = np.linalg.qr(a.T.astype(np.float64))[1]
    return float(np.square(r_left @ r_right.T).sum())
