"""The entropies of a spectrum."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def spectral_entropy(values: npt.NDArray[np.float64]) -> float:
    """Return ``-sum p ln p`` with ``p = values / sum(values)``, in nats; nan if all values are zero.

    Examples
    --------
    >>> import numpy as np
    >>> round(spectral_entropy(np.ones(4)), 4)
    1.3863
    """
    total = float(values.sum())
    if not total > 0:
        return math.nan
    shares = values[values > 0] / total
    # A share of a subnormal value may be 0.
    shares = shares[shares > 0]
    return max(0.0, -float((shares * np.log(shares)).sum()))
