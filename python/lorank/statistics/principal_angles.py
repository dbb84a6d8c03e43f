"""Principal angles between two subspaces."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def principal_angles(
    basis_a: npt.NDArray[np.float64], basis_b: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Compute the principal angles between the column spaces of two orthonormal bases.

    ``cos(theta_i)`` are the singular values of ``basis_a^T basis_b``. Angles below 45 degrees are computed
    from their sines, the singular values of ``basis_b - basis_a basis_a^T basis_b``, so that small angles
    are accurate.

    Parameters
    ----------
    basis_a, basis_b
        Matrices with orthonormal columns, shape ``(n, k)``.

    Returns
    -------
    numpy.ndarray
        The `k` angles in degrees, ascending, from 0 to 90.

    Notes
    -----
    Source: [ANGLES].

    Examples
    --------
    >>> import numpy as np
    >>> basis = np.eye(3)
    >>> principal_angles(basis[:, :2], basis[:, 1:]).round(6)
    array([ 0., 90.])
    """
    product = basis_a.T @ basis_b
    cosines = np.linalg.svd(product, compute_uv=False)
    sines = np.linalg.svd(basis_b - basis_a @ product, compute_uv=False)[::-1]
    small = sines <= np.sqrt(0.5)
    radians = np.where(small, np.arcsin(np.where(small, sines, 0.0)), np.arccos(np.clip(cosines, 0.0, 1.0)))
    return np.degrees(radians)
