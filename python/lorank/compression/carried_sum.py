"""Computes the tensors other than factors in a weighted sum of adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.registry import format_of
from lorank.adapters.module import LoraModule
from lorank.adapters.stored import Stored


def carried_sum(
    parts: Sequence[tuple[AdapterContent, float]], after: Collection[LoraModule]
) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors other than factors in a weighted sum of adapters, and notes about them.

    Full differences are added up. Other tensors hold trained values, not differences, so the sum takes each
    of them from the first adapter that holds it. Adapters with the weight 0 contribute nothing.

    Parameters
    ----------
    parts
        The adapters, all of one format, and their weights.
    after
        The adapted modules of the sum.

    Raises
    ------
    ValueError
        If adapters hold differences of unequal shapes under the same key.
    """
    form = format_of(parts[0][0])
    every: dict[str, list[tuple[AdapterContent, Stored, float]]] = {}
    for adapter, weight in parts:
        carried = form.carried_by_sum(adapter, after) if weight else {}
        for key, stored in carried.items():
            every.setdefault(key, []).append((adapter, stored, weight))
    found: dict[str, Stored] = {}
    shared = added = 0
    for key, terms in every.items():
        if form.adds_up(key):
            found[key] = _sum(key, terms)
            added += 1
        else:
            found[key] = terms[0][1]
            shared += len(terms) > 1
    notes = [f"{added} full differences (.diff, .diff_b) were added up"] if added else []
    if shared:
        notes.append(
            f"several adapters hold {shared} tensors that are not factors: the first adapter's were used"
        )
    return found, notes


def _sum(key: str, terms: Sequence[tuple[AdapterContent, Stored, float]]) -> Stored:
    first = terms[0][0]
    total: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
    for adapter, stored, weight in terms:
        values = weight * stored.to_array().astype(np.float64)
        if total is not None and total.shape != values.shape:
            raise ValueError(
                f"tensor {key!r} has shape {list(total.shape)} in {first.label} and {list(values.shape)} in "
                f"{adapter.label}: differences of unequal shapes cannot be added"
            )
        total = values if total is None else total + values
    assert total is not None
    types = {stored.dtype for _, stored, _ in terms}
    return Stored(total.astype(np.float32), dtype=types.pop() if len(types) == 1 else "float32")
