"""Checks that the energies of updates are numbers of float64, so that errors computed from them are true."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorank._core import NumericalError
from lorank.compression.spectral_form import SpectralForm

_SMALLEST = float(np.finfo(np.float64).tiny)
_SMALLEST_FACTOR = float(np.finfo(np.float32).tiny)
_LARGEST_FACTOR = float(np.finfo(np.float32).max)


def check_energies(forms: Sequence[SpectralForm]) -> None:
    """Refuse updates whose energy, or whose factors after truncation, leave the range of their type.

    Raises
    ------
    NumericalError
        If an energy or the sum of all energies overflows, or a value that is not zero has an energy or
        factors of zero. The message names the module.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for form in forms:
            _check(form)
        total = float(np.sum([form.energy for form in forms]))
    if not math.isfinite(total):
        largest = max(forms, key=lambda form: form.energy)
        raise NumericalError(
            f"module {largest.module.name!r}: the energies of all updates overflow float64 together, and "
            "this one is the largest: correct its scaling or factors"
        )


def _check(form: SpectralForm) -> None:
    module, energy = form.module, form.energy
    largest = float(form.largest_values.max(initial=0.0))
    if math.isnan(largest) or math.isnan(energy):
        raise NumericalError(f"module {module.name!r}: its singular values are not numbers")
    if largest == 0.0:
        return
    if not _SMALLEST <= energy < math.inf:
        raise NumericalError(
            f"module {module.name!r}: its largest singular value is {largest:.3g}: the energy leaves the "
            "range of float64: correct the scaling or the factors"
        )
    # The entries of balanced factors are about the root of the value, divided by the root of a side.
    root = math.sqrt(largest)
    if module.dtype != "float64" and not (
        _SMALLEST_FACTOR * math.sqrt(max(module.shape)) <= root <= _LARGEST_FACTOR
    ):
        raise NumericalError(
            f"module {module.name!r}: its largest singular value is {largest:.3g}: balanced factors leave "
            "the range of float32: correct the scaling or the factors"
        )
