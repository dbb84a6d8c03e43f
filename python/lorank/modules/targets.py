"""The modules of a model that can get a rank, and those that targets select."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorank.allocation.signals.registry import AdaptedModule
from lorank.modules import naming
from lorank.report.base import Report, Row
from lorank.sources import Source


def adaptable_modules(evidence: Report[Any] | Source) -> list[AdaptedModule]:
    """Every module of a source or report, experts of one stack together."""
    infos: Iterable[Row] = (
        evidence.modules if isinstance(evidence, Report) else (m.info for m in evidence.matrices)
    )
    by_module: dict[str, list[Row]] = defaultdict(list)
    for info in infos:
        by_module[info.module].append(info)
    return [
        AdaptedModule(name, members[0].kind, members[0].shape, len(members))
        for name, members in by_module.items()
    ]


def targeted(
    modules: Sequence[AdaptedModule],
    targets: naming.Targets,
    ties: Mapping[str, Sequence[str]] | None = None,
) -> list[AdaptedModule]:
    """Return the modules that `targets` selects, read as in `allocate`.

    A module that PEFT adapts by the name of its weight is selected by its own name, too.

    Parameters
    ----------
    modules, targets
        The modules, and which of them.
    ties
        The further modules that share a module's weight, by its name.

    Raises
    ------
    ValueError
        If there are none, or a target is a module that shares the weight of another one.
    """
    if targets is None or targets == naming.ALL_LINEAR:
        chosen = [
            module
            for module in modules
            if module.kind in ("linear", "expert")
            and not naming.is_output_head(module.name)
            and not naming.is_router(module.name)
        ]
    else:
        spellings = {module.name: naming.spellings(module.name) for module in modules}
        every = [name for spelled in spellings.values() for name in spelled]
        _check_untied(targets, every, ties or {})
        naming.check_known(targets, every)
        is_target = naming.matcher(targets)
        chosen = [module for module in modules if any(map(is_target, spellings[module.name]))]
    if not chosen:
        some = ", ".join(module.name for module in modules[:3])
        which = f"targets {targets!r} select none" if targets is not None else "all-linear selects none"
        raise ValueError(f"{which} of the {len(modules)} modules that were read ({some}, ...)")
    return chosen


def _check_untied(targets: naming.Targets, known: Iterable[str], ties: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a target in a list that selects nothing but a module tied to another."""
    if targets is None or isinstance(targets, str):
        return
    suffixes = {suffix for name in known for suffix in naming.suffixes(name)}
    for target in targets:
        for owner, others in ties.items():
            tied = [name for name in others if naming.is_suffix(target, name)]
            if tied and target not in suffixes:
                raise ValueError(f"{tied[0]} shares the weight of {owner}: target {owner} instead")
