"""Truncation of a trained adapter's updates by their singular values.

Source: [PARA].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lorank._internal.threads import thread_count
from lorank.adapters.certificate import Certificate, ModuleCertificate
from lorank.adapters.content import Adapter, AdapterContent
from lorank.adapters.module import LoraModule
from lorank.compression.energies import check_energies
from lorank.compression.knobs import Knobs
from lorank.compression.selection import Mask, notes, select
from lorank.compression.spectral_form import SpectralForm, Update, spectral_form, truncate
from lorank.peft_format.rank_groups import rank_groups

Key = TypeVar("Key", bound="float | str")


def compress(
    adapter: Adapter,
    knobs: Knobs,
    threads: int | None,
    progress: bool,
    norms: Mapping[str, float] | None = None,
) -> Adapter:
    """Truncate the updates of an adapter to most of their energy; see `lorank.compress`.

    Parameters
    ----------
    adapter, knobs, threads, progress
        As in `lorank.compress`.
    norms
        The norm of each module's base weight, by which singular values are divided before they compete; None
        to compare the values themselves.
    """
    forms = decomposed(adapter, threads, progress)
    action = f"compress, {knobs}"
    if norms is not None:
        knobs = replace(knobs, scores={f.module.name: f.values / norms[f.module.name] for f in forms})
        action += ", values relative to the base weights' Frobenius norms"
    result = truncated(adapter, forms, knobs, action, threads)
    return replace(result, notes=[*result.notes, *_zeros(forms)])


def _zeros(forms: Sequence[SpectralForm]) -> list[str]:
    """Return a note on ranks whose singular value is zero, because `rank_ratio` counts them."""
    total = sum(form.module.rank for form in forms)
    zeros = total - sum(int(np.count_nonzero(form.values)) for form in forms)
    if not zeros:
        return []
    return [f"{zeros} of {total} ranks were zero before (padding, or untrained); rank_ratio counts them"]


def family(
    adapter: Adapter, knobs: Mapping[Key, Knobs], threads: int | None, progress: bool
) -> dict[Key, Adapter]:
    """Truncate an adapter by several knobs from one decomposition; see `lorank.family`."""
    forms = decomposed(adapter, threads, progress)
    return {
        key: truncated(adapter, forms, chosen, f"family, {chosen}", threads) for key, chosen in knobs.items()
    }


def elastic(adapter: Adapter, threads: int | None, progress: bool) -> Adapter:
    """Return an adapter in spectral form with all its non-zero values; see `lorank.elastic`."""
    forms = decomposed(adapter, threads, progress)
    return truncated(adapter, forms, Knobs(rank_ratio=1.0), "elastic parent, all singular values", threads)


def decomposed(adapter: AdapterContent, threads: int | None, progress: bool) -> list[SpectralForm]:
    """Return the spectral form of every adapted module."""
    updates = [Update.of(module, is_spectral=adapter.states_spectral_form) for module in adapter.adapted]
    return spectral_form(updates, thread_count(threads), progress)


def truncated(
    adapter: Adapter,
    forms: Sequence[SpectralForm],
    knobs: Knobs,
    action: str,
    threads: int | None = None,
) -> Adapter:
    """Return an adapter that keeps the singular values that knobs select.

    Parameters
    ----------
    adapter
        The adapter, of which everything but the factors is copied.
    forms
        Decomposed updates of the adapter's modules.
    knobs
        The number of values to keep.
    action
        Description of the operation, for the certificate.
    threads
        Number of threads; None for all that the process may use.
    """
    check_energies(forms)
    groups = rank_groups([form.module for form in forms], adapter.config)
    masks = select(forms, knobs, groups)
    modules: dict[str, LoraModule] = dict(adapter.modules)
    modules |= {module.name: module for module in truncate(forms, masks, thread_count(threads))}
    return replace(
        adapter,
        modules=modules,
        # The result must not change with a live model, as its factors do not.
        carried={key: stored.held() for key, stored in adapter.carried.items()},
        notes=[*adapter.stated_notes, *notes(forms, knobs)],
        is_spectral=True,
        certificate=Certificate(action, _certificates(forms, masks)),
    )


def _certificates(forms: Sequence[SpectralForm], masks: Sequence[Mask]) -> list[ModuleCertificate]:
    """Return the certificate of every module; NumPy sums over the values of all modules at once."""
    if not forms:
        return []
    keep = np.concatenate(masks)
    squares = np.square(np.concatenate([form.values for form in forms]))
    largest = np.concatenate([form.largest_values for form in forms])
    starts = np.cumsum([0, *(len(mask) for mask in masks[:-1])])
    ranks = np.add.reduceat(keep, starts, dtype=np.int64).tolist()
    kept = np.add.reduceat(np.where(keep, squares, 0.0), starts).tolist()
    # Dropped values are summed directly: a difference of two large sums would lose small values.
    dropped = np.add.reduceat(np.where(keep, 0.0, squares), starts).tolist()
    next_values = np.maximum.reduceat(np.where(keep, 0.0, largest), starts).tolist()
    return [
        ModuleCertificate(
            name=form.module.name,
            rank_before=form.module.rank,
            rank_after=rank,
            parameters_before=form.num_parameters,
            parameters_after=rank * form.module.cost,
            energy=kept_energy + (dropped_energy + form.unseen_energy),
            dropped_energy=dropped_energy + form.unseen_energy,
            spectral_error=max(next_value, form.unseen_norm),
        )
        for form, rank, kept_energy, dropped_energy, next_value in zip(
            forms, ranks, kept, dropped, next_values, strict=True
        )
    ]
