"""The scale of an update in PEFT: alpha divided by the rank, or by its root ([RSLORA])."""

from __future__ import annotations

import math


def divisor(rank: float, rank_stabilized: bool) -> float:
    """Return the number by which PEFT divides alpha."""
    return math.sqrt(rank) if rank_stabilized else float(rank)


def alpha_of(scaling: float, rank: int, rank_stabilized: bool) -> float:
    """Return an alpha from which PEFT computes a scaling exactly; else the nearest alpha."""
    by = divisor(rank, rank_stabilized)
    product = scaling * by
    candidates = [
        float(round(product)),
        product,
        math.nextafter(product, math.inf),
        math.nextafter(product, 0),
    ]
    alpha = next((alpha for alpha in candidates if alpha / by == scaling), product)
    return int(alpha) if alpha.is_integer() else alpha
