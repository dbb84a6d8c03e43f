"""Ranks that follow from a module's place in the model alone.

Source: Adaptive LoRA: Layerwise Rank Allocation for Parameter-Efficient Fine-Tuning, section 3.1.

Ranks are computed in rational arithmetic, rounded half up, and clipped to ``[r_min, r_max]``. `i` is the
index of a module's block among the `L` blocks of its stack (an encoder and a decoder are two stacks),
adapted or not, as far as the source or report knows of them. Scores are ``rank - r_min``; where that is
zero for all of them, a budget gives all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lorank.allocation.budget import is_integer
from lorank.allocation.signals.registry import Signal, register
from lorank.modules.roles import Depth, Role, Roles, check_expressions, depths_of, roles_of
from lorank.modules.targets import AdaptedModule
from lorank.report.base import Report
from lorank.sources.base import Source

# The empirical schedule: up to which share of the depth, how much of r_base.
_EMPIRICAL = (
    (Fraction(3, 10), Fraction(6, 10)),
    (Fraction(7, 10), Fraction(12, 10)),
    (Fraction(1), Fraction(1)),
)

_ATTENTION_HEAVY: Mapping[Role, Fraction] = {"attention": Fraction(1), "feed-forward": Fraction(1, 2)}


def _check(r_base: int | None = None, blocks: str | None = None, roles: Roles = None) -> None:
    if r_base is not None and (not is_integer(r_base) or r_base < 0):
        raise ValueError(f"r_base must be a rank, not {r_base!r}")
    check_expressions(blocks, roles)


@register("uniform", needs="shapes", check=_check)
def uniform(
    report: Any, modules: Sequence[AdaptedModule], r_min: int, r_max: int, *, r_base: int | None = None
) -> Signal:
    """Rank `r_base` for every module: plain LoRA, the baseline of every comparison.

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
    """Rank ``r_base - (r_base - r_min) i / (L - 1)`` in block `i` of `L`, counted from 0.

    Section 3.1.1: from `r_base` in the first block to `r_min` in the last; `r_base` for ``L = 1``.

    Parameters
    ----------
    report
        A source or a report, of which the model's blocks are counted; None to count those of `modules`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        The first block's rank (default: `r_max`).
    blocks
        How a block's number is read where names are unusual: as in `lorank.modules.roles.numbered_block`.

    Raises
    ------
    ValueError
        If a module's block cannot be read from its name, or none is in a block.

    Notes
    -----
    A module in no numbered block (a pooler, a head, a projector) has no depth. It counts as a stack
    of one block, gets `r_base`, and is flagged.
    """
    base = r_max if r_base is None else int(r_base)

    def rank(depth: Depth) -> Fraction:
        # The formula's maximum with r_min is the clipping that every schedule ends in.
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
    """Rank ``0.6 r_base`` in the first 0.3 of the blocks, ``1.2 r_base`` up to 0.7, then `r_base`.

    Section 3.1.3: in block `i` of `L`, ``0.6 r_base`` for ``i < 0.3 L``, ``1.2 r_base`` for
    ``0.3 L <= i < 0.7 L``, else `r_base`; `r_base` for ``L = 1``.

    Parameters
    ----------
    report
        A source or a report, of which the model's blocks are counted; None to count those of `modules`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        The last blocks' rank (default: `r_max`). No rank exceeds `r_max`, so that the middle has its
        ``1.2 r_base`` only if that is no more; modules that are cut are flagged.
    blocks
        How a block's number is read where names are unusual: as in `lorank.modules.roles.numbered_block`.

    Raises
    ------
    ValueError
        If a module's block cannot be read from its name, or none is in a block.

    Notes
    -----
    A module in no numbered block gets `r_base` and is flagged, as under linear decay.
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
    """Rank `r_base` for attention, ``max(r_min, r_base / 2)`` for feed-forward.

    Section 3.1.2.

    Parameters
    ----------
    report
        Not looked at.
    modules, r_min, r_max
        As in `lorank.allocate`.
    r_base
        The rank of attention modules (default: `r_max`).
    roles
        What modules with unusual names do: as in `lorank.modules.roles.roles_of`.

    Raises
    ------
    ValueError
        If the role of a module in a block cannot be read from its name, or none has one.

    Notes
    -----
    A module that is neither (a pooler, a head, a router) gets `r_base` and is flagged.
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
        name: "neither attention nor feed-forward: r_base"
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
    """The signal of a schedule that needs the depth: `rank` is asked where there is more than one block."""
    names = [module.name for module in modules]
    depths = depths_of(names, blocks, _known(evidence))
    if not any(depths):
        raise ValueError(
            f"none of {len(names)} modules ({names[0]}, ...) is in a numbered block: give blocks, a regular "
            r"expression with the block's number in a group, such as blocks=r'units\.(\d+)'"
        )
    ranks = [Fraction(base) if depth is None or depth.count == 1 else rank(depth) for depth in depths]
    flags = {
        name: "in no numbered block: r_base"
        for name, depth in zip(names, depths, strict=True)
        if depth is None
    }
    return _signal(modules, ranks, r_min, r_max, flags)


def _known(evidence: Report[Any] | Source | None) -> dict[str, None]:
    """The modules of the whole model, as far as they are known: blocks are counted over all of them."""
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
    """The ranks rounded and clipped; to the flags, those whose rank `r_max` cuts."""
    rounded = np.array([math.floor(rank + Fraction(1, 2)) for rank in exact], dtype=np.int64)
    ranks = np.clip(rounded, r_min, r_max)
    cut = {
        module.name: "the schedule gives more than r_max"
        for module, rank in zip(modules, rounded, strict=True)
        if rank > r_max
    }
    joined = {name: "; ".join(filter(None, (flags.get(name), cut.get(name)))) for name in [*flags, *cut]}
    return Signal((ranks - r_min).astype(np.float64), ranks, joined)
