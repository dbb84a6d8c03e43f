"""K*: ranks from the spectrum of the task that the data set each module.

Source: [KSTAR]. The estimate per module of a model is an open problem of that paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lorank.allocation.signals.registry import Signal, flags_of_skipped, register
from lorank.modules.targets import AdaptedModule
from lorank.report.tasks import TaskReport


def _check(estimate: str = "k_star") -> None:
    """Raise ValueError for an estimate that does not exist."""
    if estimate not in ("k_star", "predicted_rank"):
        raise ValueError(f"estimate must be 'k_star' or 'predicted_rank', not {estimate!r}")


@register("task", needs="tasks", check=_check)
def task(
    report: TaskReport,
    modules: Sequence[AdaptedModule],
    r_min: int,
    r_max: int,
    *,
    estimate: Literal["k_star", "predicted_rank"] = "k_star",
) -> Signal:
    """Give rank K*, or the smallest rank that predicts held-out tokens nearly as well as the full one.

    Ranks are clipped to the bounds. The score is ``max(rank - r_min, 0)``.

    Parameters
    ----------
    report
        The result of `profile_tasks`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    estimate
        ``"k_star"``, or ``"predicted_rank"``: the smallest rank that predicts held-out tokens nearly as well
        as the full rank.
    """
    rows = {row.module: row for row in report.modules}
    ranks = np.array([getattr(rows[module.name], estimate) for module in modules], dtype=np.int64)
    flags = flags_of_skipped(report)
    flags |= {m.name: "; ".join(rows[m.name].flags) for m in modules if rows[m.name].flags}
    return Signal(np.maximum(ranks - r_min, 0).astype(np.float64), np.clip(ranks, r_min, r_max), flags)
