"""Ranks that follow from a module's place in the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorank.signals import AdaptedModule, Signal, register


@register("uniform", needs="shapes")
def uniform(
    report: Any, modules: Sequence[AdaptedModule], r_min: int, r_max: int, *, r_base: int | None = None
) -> Signal:
    """The same for every module: plain LoRA, the baseline of every comparison.

    Parameters
    ----------
    report
        Not looked at.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        The rank without a budget (default: `r_max`), clipped to ``[r_min, r_max]``.
    """
    del report
    if r_base is not None and (not isinstance(r_base, int) or r_base < 0):
        raise ValueError(f"r_base must be a rank, not {r_base!r}")
    base = r_max if r_base is None else min(max(r_base, r_min), r_max)
    return Signal(np.ones(len(modules)), np.full(len(modules), base, dtype=np.int64))
