"""Chooses a rank for every module, from a method's signal and a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._internal.progress import waiting
from lorank.allocation import signals
from lorank.allocation.budget import Budget, average_rank_budget, fit_ranks, parse_budget, rank_bounds
from lorank.allocation.rank_allocation import RankAllocation
from lorank.allocation.signals.registry import Signal
from lorank.analysis.matrices import analyze
from lorank.modules import naming
from lorank.modules.facts import ModelFacts
from lorank.modules.roles import Placement, Roles, check_roles, in_placement
from lorank.modules.targets import AdaptedModule, Matrix, adaptable_modules, targeted
from lorank.report.base import Report
from lorank.sources import OPENING, AnySource, Source, open_source


def allocate(
    signal_source: Report[Any] | AnySource,
    method: str = "htsr",
    *,
    r_min: int = 4,
    r_max: int = 32,
    budget: Budget | None = None,
    avg_rank: float | None = None,
    targets: naming.Targets = None,
    placement: Placement = "all",
    roles: Roles = None,
    threads: int | None = None,
    progress: bool = True,
    **method_options: Any,
) -> RankAllocation:
    """Choose a rank for every adapted module.

    Parameters
    ----------
    signal_source
        A report of `analyze`, `profile_gradients` or `profile_tasks`; or any source that `analyze` reads,
        which is analysed if the method needs spectra.
    method
        Name of the method that computes scores and ranks: one of `lorank.allocation.signals.names()`.
        ``help(lorank.allocation.signals.find(name).function)`` documents the formula and options of a method;
        ``lorank allocate --help`` lists the options of all methods.
    r_min, r_max
        Bounds of every rank, ``0 <= r_min <= r_max``. No rank exceeds ``min(out, in)`` of its module, even
        if that is below `r_min`. Modules at that bound are flagged.
    budget
        Number of parameters of the adapter: an integer, ``"500k"``, or a share of the base model's
        parameters, such as ``"0.5%"``. Ranks above `r_min` are then proportional to the scores.
    avg_rank
        Average of the ranks, instead of a budget; the average is lower if the matrices are too small for it.
        Without a budget or an average, the ranks are computed by the method's own formula.
    targets
        Modules to adapt, as PEFT reads ``target_modules``: a list of names or suffixes, or one regular
        expression for whole names. ``"all-linear"`` or None selects every linear layer and stack of experts
        except the output head and the routers of experts.
    placement
        ``"attention"`` or ``"feed-forward"`` to adapt only those modules among the targets.
    roles
        Roles of modules with unusual names, as in `lorank.modules.roles.roles_of`: for `placement` and for
        methods with an option `roles`.
    threads, progress
        Options of the analysis, if the source is analysed: as in `analyze`.
    **method_options
        Options of the method.

    Returns
    -------
    RankAllocation
        The number of parameters never exceeds the budget, but would exceed it if the rank of any module below
        its bound were raised by 1.

    Raises
    ------
    ValueError
        If an argument is malformed, no module is selected, or `roles` match no module. If the budget is
        infeasible (the message states the feasible range), or is a percentage and the base model's number of
        parameters is unknown. If both `budget` and `avg_rank` are given, or the method needs one of them and
        neither is given. If the method needs another report.

    Examples
    --------
    >>> import lorank, numpy
    >>> random = numpy.random.default_rng(0)
    >>> names = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj")
    >>> weights = {f"{name}.weight": random.standard_normal((32, 16)) for name in names}
    >>> allocation = lorank.allocate(weights, "htsr", r_min=1, r_max=8, budget=400, progress=False)
    >>> allocation.num_parameters
    384
    >>> lorank.allocate(weights, "uniform", r_max=4, placement="attention", progress=False).ranks
    {'layers.0.attn.q_proj': 4}
    """
    r_min, r_max = rank_bounds(r_min, r_max)
    if budget is not None and avg_rank is not None:
        raise ValueError("give budget or avg_rank, not both")
    registered = signals.find(method)
    if roles is not None and "roles" in registered.options:
        method_options["roles"] = roles
    registered.check_options(method, method_options)
    with waiting(OPENING, enabled=progress):
        opened = signal_source if isinstance(signal_source, Report) else open_source(signal_source)
    modules, refused, others = _selection(opened, targets, placement, roles)
    names = [module.name for module in modules]
    evidence = opened
    if registered.needs == "spectra" and isinstance(opened, Source):
        evidence = analyze(opened, include=names, threads=threads, progress=progress)
    registered.check_evidence(method, evidence)
    with np.errstate(over="ignore", invalid="ignore"):
        signal = registered.function(evidence, modules, r_min, r_max, **method_options)
    _check_scores(method, signal, names)
    limits = _Limits(r_min, r_max, budget, avg_rank)
    ranks = _ranks(signal, modules, limits, evidence)
    if ranks is None:
        raise ValueError(f"method {method!r} needs a budget or avg_rank")
    return RankAllocation(
        modules,
        dict(zip(names, (int(rank) for rank in ranks), strict=True)),
        dict(zip(names, (float(score) for score in signal.scores), strict=True)),
        method,
        others,
        {**refused, **_with_caps(signal.flags, modules, ranks, r_max)},
        _label(evidence),
        evidence.num_parameters,
        _facts(opened),
    )


def _check_scores(method: str, signal: Signal, names: Sequence[str]) -> None:
    """Raise ValueError for a score that is not finite: a report from elsewhere can hold any numbers."""
    if not np.all(finite := np.isfinite(signal.scores)):
        first = names[int(np.argmin(finite))]
        raise ValueError(f"method {method!r} finds no finite score for {first}: its numbers are out of range")


def _selection(
    opened: Report[Any] | Source, targets: naming.Targets, placement: Placement, roles: Roles
) -> tuple[list[AdaptedModule], dict[str, str], list[str]]:
    """Return the modules to adapt, flags of modules that PEFT refuses, and the names of all other modules."""
    every = adaptable_modules(_matrices(opened))
    check_roles([module.name for module in every], roles)
    facts = _facts(opened)
    adapted, refused = _without_refused(_targeted(opened, every, targets, facts), facts)
    modules = _placed(adapted, placement, roles)
    return modules, refused, _others(every, facts, {module.name for module in modules})


@dataclass(frozen=True, slots=True)
class _Limits:
    """The limits of the ranks: bounds for every single rank, and a budget or an average rank."""

    r_min: int
    r_max: int
    budget: Budget | None
    avg_rank: float | None


def _ranks(
    signal: Signal, modules: Sequence[AdaptedModule], limits: _Limits, evidence: Report[Any] | Source
) -> npt.NDArray[np.int64] | None:
    """Return the ranks of modules; None if there is no budget and the method has no ranks of its own."""
    r_min, r_max = limits.r_min, limits.r_max
    # A module cannot use a rank above that of its matrix.
    caps = np.array([min(r_max, *module.shape) for module in modules], dtype=np.int64)
    if limits.budget is not None:
        most = parse_budget(limits.budget, evidence.num_parameters, evidence.unknown_parameters)
        costs = [module.cost for module in modules]
        return fit_ranks(signal.scores, costs, r_min, r_max, most, at_most=caps)
    if limits.avg_rank is not None:
        most = min(average_rank_budget(limits.avg_rank, modules, r_min, r_max), int(caps.sum()))
        return fit_ranks(signal.scores, np.ones(len(modules)), r_min, r_max, most, at_most=caps)
    return None if signal.ranks is None else np.minimum(signal.ranks, caps)


def _matrices(evidence: Report[Any] | Source) -> Iterable[Matrix]:
    """Return the identities of the matrices of a report or source."""
    if isinstance(evidence, Report):
        return evidence.modules
    return [matrix.info for matrix in evidence.matrices]


def _targeted(
    evidence: Report[Any] | Source,
    every: Sequence[AdaptedModule],
    targets: naming.Targets,
    facts: ModelFacts,
) -> list[AdaptedModule]:
    """Return the modules that `targets` selects; if there are none, the error also names packed weights."""
    try:
        return targeted(every, targets, facts.ties)
    except ValueError as error:
        packed = [skipped for skipped in evidence.skipped if skipped.reason.startswith("packed")]
        if not packed:
            raise
        raise ValueError(
            f"{error}; {len(packed)} weights were not read; the first is {packed[0].name}: {packed[0].reason}"
        ) from None


def _facts(evidence: Report[Any] | Source) -> ModelFacts:
    """Return the facts about the model; reports of gradients and tasks hold none."""
    unknown = ModelFacts(reason="the report does not describe the model")
    return getattr(evidence, "facts", unknown)


def _others(every: Sequence[AdaptedModule], facts: ModelFacts, chosen: set[str]) -> list[str]:
    """Return the names of the modules that are not adapted, including modules without a row."""
    names = [module.name for module in every]
    names += facts.modules
    return [name for name in dict.fromkeys(names) if name not in chosen]


def _without_refused(
    modules: Sequence[AdaptedModule], facts: ModelFacts
) -> tuple[list[AdaptedModule], dict[str, str]]:
    """Return the modules that PEFT can adapt, and flags of the others.

    Raises
    ------
    ValueError
        If PEFT can adapt none of the modules.
    """
    adaptable = [module for module in modules if module.name not in facts.refused]
    names = [module.name for module in modules if module.name in facts.refused]
    if not adaptable:
        raise ValueError(
            f"none of the {len(names)} modules can be adapted: {names[0]}: {facts.refused[names[0]]}"
        )
    return adaptable, {name: f"not adapted: {facts.refused[name]}" for name in names}


def _with_caps(
    flags: Mapping[str, str], modules: Sequence[AdaptedModule], ranks: Iterable[int], r_max: int
) -> dict[str, str]:
    """Return the flags, with a remark on every module whose rank is limited by the size of its matrix."""
    found = dict(flags)
    for module, rank in zip(modules, ranks, strict=True):
        if rank >= min(module.shape) and rank < r_max:
            remark = f"a {module.shape[0]}x{module.shape[1]} matrix has no larger rank"
            found[module.name] = f"{found[module.name]}; {remark}" if module.name in found else remark
    return found


def _label(evidence: Report[Any] | Source) -> str:
    """Return the name of a report's source, or of a source."""
    return evidence.source if isinstance(evidence, Report) else evidence.label


def _placed(modules: list[AdaptedModule], placement: Placement, roles: Roles) -> list[AdaptedModule]:
    """Return the modules that a placement selects."""
    selected = in_placement([module.name for module in modules], placement, roles)
    chosen = [module for module, is_selected in zip(modules, selected, strict=True) if is_selected]
    if not chosen:
        raise ValueError(f"placement {placement!r} selects none of the {len(modules)} modules")
    return chosen
