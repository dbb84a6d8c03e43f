"""K*: ranks from the spectrum of each module's task.

Source: [KSTAR]. The paper leaves the estimate for single modules of a model open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lorank.allocation.signals.registry import Signal, flags_of_skipped, register
from lorank.modules.targets import AdaptedModule

if TYPE_CHECKING:
    from lorank.report.tasks import TaskReport


def _check(estimate: str = "k_star") -> None:
    """Raise ValueError for an unknown estimate."""
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
    """Give rank K*, or the smallest rank that predicts held-out tokens nearly as well as full rank.

    Ranks are clipped to the bounds. The score is ``max(rank - r_min, 0)``.

    Parameters
    ----------
    report
        The result of `profile_tasks`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    estimate
        ``"k_star"``, or ``"predicted_rank"`` for the rank that predicts held-out tokens.
    """
    rows = {row.module: row for row in report.modules}
    ranks = np.array([getattr(rows[module.name], estimate) for module in modules], dtype=np.int64)
    flags = flags_of_skipped(report)
    flags |= {m.name: "; ".join(rows[m.name].flags) for m in modules if rows[m.name].flags}
    return Signal(np.maximum(ranks - r_min, 0).astype(np.float64), np.clip(ranks, r_min, r_max), flags)
