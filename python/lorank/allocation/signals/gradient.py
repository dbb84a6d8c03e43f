"""GARD: ranks from the spectra of gradients.

Source: [GARD]. The score is the effective rank of the gradients of the frozen weight over mini-batches, as a
share of the sum over all modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorank.allocation.signals.registry import Signal, flags_of_skipped, register
from lorank.modules.targets import AdaptedModule

if TYPE_CHECKING:
    from lorank.report.gradients import GradientReport


@register("gard", needs="gradients")
def gard(report: GradientReport, modules: Sequence[AdaptedModule], r_min: int, r_max: int) -> Signal:
    """Score modules by their share of the summed effective ranks, ``r_eff / sum(r_eff)``.

    The method needs a budget.

    Parameters
    ----------
    report
        The result of `profile_gradients`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    """
    del r_min, r_max
    rows = {row.module: row for row in report.modules}
    effective = np.array([rows[module.name].effective_rank for module in modules], dtype=np.float64)
    total = effective.sum()
    flags = flags_of_skipped(report)
    for module in modules:
        row = rows[module.name]
        remarks = list(row.flags)
        if 1 < report.num_batches <= row.effective_rank < min(module.shape):
            remarks.append("the number of batches limits its effective rank: more batches may raise it")
        if remarks:
            flags[module.name] = "; ".join(remarks)
    return Signal(effective / total if total > 0 else effective, None, flags)
