"""Stable rank: ranks in proportion to the number of directions over which a weight's energy is spread.

Source: Rudelson and Vershynin [STABLE-RANK], who call the quantity the numerical rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lorank.allocation.signals.registry import Signal, register
from lorank.modules.targets import AdaptedModule
from lorank.report import SpectralReport


@register("stable-rank", needs="spectra")
def stable_rank(report: SpectralReport, modules: Sequence[AdaptedModule], r_min: int, r_max: int) -> Signal:
    """Score modules by the stable rank of their weight, ``||W||_F^2 / ||W||_2^2``.

    The method needs a budget.

    Parameters
    ----------
    report
        The result of `analyze`.
    modules, r_min, r_max
        As in `lorank.allocate`.

    Notes
    -----
    The score lies between 1 and the rank of the weight, whatever the scale of the weight. The score
    of a stack of experts is the mean over the experts. A module without a stable rank (a zero matrix, or one
    without a spectrum) has the score 0 and is flagged.

    Examples
    --------
    >>> import lorank, numpy
    >>> weights = {"wide.weight": numpy.eye(8), "narrow.weight": numpy.diag([1.0] + 7 * [0.1])}
    >>> report = lorank.analyze(weights, progress=False)
    >>> lorank.allocate(report, "stable-rank", r_min=1, r_max=8, avg_rank=4).ranks
    {'wide': 6, 'narrow': 2}
    """
    del r_min, r_max
    values: dict[str, list[float]] = defaultdict(list)
    for row in report.modules:
        values[row.module].append(row.stable_rank)
    scores = np.zeros(len(modules))
    flags: dict[str, str] = {}
    for index, module in enumerate(modules):
        known = [value for value in values[module.name] if np.isfinite(value)]
        if known:
            scores[index] = np.mean(known)
        if missing := len(values[module.name]) - len(known):
            flags[module.name] = f"no stable rank for {missing} of {len(values[module.name])} matrices"
    return Signal(scores, None, flags)
