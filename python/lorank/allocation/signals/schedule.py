"""Schedules: ranks that depend only on the place of a module in the model.

Source: [SCHEDULES], section 3.1.

Ranks are computed in rational arithmetic, rounded half up, and clipped to ``[r_min, r_max]``. `i` is the
index of a module's block among the `L` blocks of its stack; an encoder and a decoder are two stacks. All
blocks in the source or the report are counted, adapted or not. Scores are ``rank - r_min``; if all are zero,
a budget gives equal ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lorank.allocation.budget import is_integer
from lorank.allocation.signals.registry import Signal, register
from lorank.modules.blocks import Depth, depths_of
from lorank.modules.roles import Role, Roles, check_expressions, roles_of
from lorank.modules.targets import AdaptedModule
from lorank.report.base import Report
from lorank.sources.base import Source

# The empirical schedule: upper bound of the relative depth, and the factor of r_base below it.
_EMPIRICAL = (
    (Fraction(3, 10), Fraction(6, 10)),
    (Fraction(7, 10), Fraction(12, 10)),
    (Fraction(1), Fraction(1)),
)

_ATTENTION_HEAVY: Mapping[Role, Fraction] = {"attention": Fraction(1), "feed-forward": Fraction(1, 2)}


def _check(r_base: int | None = None, blocks: str | None = None, roles: Roles = None) -> None:
    """Raise ValueError for values of options that a schedule cannot use."""
    if r_base is not None and (not is_integer(r_base) or r_base < 0):
        raise ValueError(f"r_base must be a rank, not {r_base!r}")
    check_expressions(blocks, roles)


@register("uniform", needs="shapes", check=_check)
def uniform(
    report: Any, modules: Sequence[AdaptedModule], r_min: int, r_max: int, *, r_base: int | None = None
) -> Signal:
    """Give every module rank `r_base`: plain LoRA, the baseline of every comparison.

    Parameters
    ----------
    report
        Not used.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        The rank without a budget (default: `r_max`), clipped to ``[r_min, r_max]``.
    """
    del report
    base = min(max(r_max if r_base is None else int(r_base), r_min), r_max)
    return Signal(np.ones(len(modules)), np.full(len(modules), base, dtype=np.int64))


@register("linear-decay", needs="shapes", check=_check)
def linear_decay(
    report: Any,
    modules: Sequence[AdaptedModule],
    r_min: int,
    r_max: int,
    *,
    r_base: int | None = None,
    blocks: str | None = None,
) -> Signal:
    """Give rank ``r_base - (r_base - r_min) i / (L - 1)`` in block `i` of `L`, counted from 0.

    Section 3.1.1: ranks go from `r_base` in the first block to `r_min` in the last; `r_base` for ``L = 1``.

    Parameters
    ----------
    report
        Source or report whose blocks are counted; None to count the blocks of `modules`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        Rank in the first block (default: `r_max`).
    blocks
        Regular expression for the number of a block, as in `lorank.modules.blocks.numbered_block`.

    Raises
    ------
    ValueError
        If the block of a module cannot be read from its name, or no module is in a block.

    Notes
    -----
    A module outside the numbered blocks (a pooler, a head, a projector) has no depth. It gets `r_base`, as a
    stack of one block does, and is flagged.
    """
    base = r_max if r_base is None else int(r_base)

    def rank(depth: Depth) -> Fraction:
        # The formula's maximum with r_min follows from the clipping in `_signal`.
        return base - (base - r_min) * Fraction(depth.index, depth.count - 1)

    return _by_depth(report, modules, r_min, r_max, base, blocks, rank)


@register("empirical", needs="shapes", check=_check)
def empirical(
    report: Any,
    modules: Sequence[AdaptedModule],
    r_min: int,
    r_max: int,
    *,
    r_base: int | None = None,
    blocks: str | None = None,
) -> Signal:
    """Give rank ``0.6 r_base`` in the first 0.3 of the blocks, ``1.2 r_base`` up to 0.7, then `r_base`.

    Section 3.1.3: in block `i` of `L`, ``0.6 r_base`` for ``i < 0.3 L``, ``1.2 r_base`` for
    ``0.3 L <= i < 0.7 L``, else `r_base`; `r_base` for ``L = 1``.

    Parameters
    ----------
    report
        Source or report whose blocks are counted; None to count the blocks of `modules`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        Rank in the last blocks (default: `r_max`). Above ``r_max / 1.2``, the ranks of the middle
        blocks are clipped to `r_max`, and the modules are flagged.
    blocks
        Regular expression for the number of a block, as in `lorank.modules.blocks.numbered_block`.

    Raises
    ------
    ValueError
        If the block of a module cannot be read from its name, or no module is in a block.

    Notes
    -----
    A module outside the numbered blocks gets `r_base` and is flagged, as under linear decay.
    """
    base = r_max if r_base is None else int(r_base)

    def rank(depth: Depth) -> Fraction:
        return next(base * factor for share, factor in _EMPIRICAL if depth.index < share * depth.count)

    return _by_depth(report, modules, r_min, r_max, base, blocks, rank)


@register("attention-heavy", needs="shapes", check=_check)
def attention_heavy(
    report: Any,
    modules: Sequence[AdaptedModule],
    r_min: int,
    r_max: int,
    *,
    r_base: int | None = None,
    roles: Roles = None,
) -> Signal:
    """Give rank `r_base` to attention and ``max(r_min, r_base / 2)`` to feed-forward.

    Section 3.1.2.

    Parameters
    ----------
    report
        Not used.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        Rank of attention modules (default: `r_max`).
    roles
        Roles of modules with unusual names, as in `lorank.modules.roles.roles_of`.

    Raises
    ------
    ValueError
        If the role of a module in a block cannot be read from its name, or no module has a role.

    Notes
    -----
    A module with neither role (a pooler, a head, a router) gets `r_base` and is flagged.
    """
    del report
    base = r_max if r_base is None else int(r_base)
    names = [module.name for module in modules]
    found = roles_of(names, roles)
    if not any(found):
        raise ValueError(
            f"none of {len(names)} modules ({names[0]}, ...) is attention or feed-forward: give roles, such "
            "as roles={'mixer': 'attention'}"
        )
    ranks = [base * (Fraction(1) if role is None else _ATTENTION_HEAVY[role]) for role in found]
    flags = {
        name: "gets r_base, because it is neither attention nor feed-forward"
        for name, role in zip(names, found, strict=True)
        if role is None
    }
    return _signal(modules, ranks, r_min, r_max, flags)


def _by_depth(
    evidence: Report[Any] | Source | None,
    modules: Sequence[AdaptedModule],
    r_min: int,
    r_max: int,
    base: int,
    blocks: str | None,
    rank: Callable[[Depth], Fraction],
) -> Signal:
    """Return the signal of a schedule by depth; `rank` is called for stacks of more than one block."""
    names = [module.name for module in modules]
    depths = depths_of(names, blocks, _known(evidence))
    if not any(depths):
        raise ValueError(
            f"none of {len(names)} modules ({names[0]}, ...) is in a numbered block: give blocks, a regular "
            r"expression with the block's number in a group, such as blocks=r'units\.(\d+)'"
        )
    ranks = [Fraction(base) if depth is None or depth.count == 1 else rank(depth) for depth in depths]
    flags = {
        name: "gets r_base, because it is in no numbered block"
        for name, depth in zip(names, depths, strict=True)
        if depth is None
    }
    return _signal(modules, ranks, r_min, r_max, flags)


def _known(evidence: Report[Any] | Source | None) -> dict[str, None]:
    """Return the names of all known modules of the model; depth is counted over their blocks."""
    if evidence is None:
        return {}
    rows = evidence.modules if isinstance(evidence, Report) else (m.info for m in evidence.matrices)
    return dict.fromkeys(row.module for row in rows)


def _signal(
    modules: Sequence[AdaptedModule],
    exact: Sequence[Fraction],
    r_min: int,
    r_max: int,
    flags: Mapping[str, str],
) -> Signal:
    """Return the signal of the rounded and clipped ranks; flag the modules with ranks above `r_max`."""
    rounded = np.array([math.floor(rank + Fraction(1, 2)) for rank in exact], dtype=np.int64)
    ranks = np.clip(rounded, r_min, r_max)
    cut = {
        module.name: "the schedule gives more than r_max"
        for module, rank in zip(modules, rounded, strict=True)
        if rank > r_max
    }
    joined = {name: "; ".join(filter(None, (flags.get(name), cut.get(name)))) for name in [*flags, *cut]}
    return Signal((ranks - r_min).astype(np.float64), ranks, joined)
