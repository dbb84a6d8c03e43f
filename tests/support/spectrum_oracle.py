"""Spectra of report rows against singular values from NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.report.spectral import ModuleSpectrum


def assert_spectrum(row: ModuleSpectrum, matrix: npt.NDArray[Any], rtol: float = 1e-9) -> None:
    """Check the shape and the eigenvalues of a row against the matrix that it describes."""
    oracle = np.sort(np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)) ** 2
    assert row.shape == matrix.shape, row.name
    assert row.eigenvalues is not None, row.name
    atol = rtol * 1e-3 * oracle[-1]
    np.testing.assert_allclose(row.eigenvalues, oracle, rtol=rtol, atol=atol, err_msg=row.name)
