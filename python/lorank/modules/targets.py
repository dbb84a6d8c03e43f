"""Lists the modules of a model that can get a rank, and selects modules by targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorank.modules import naming
from lorank.modules.weight import Kind


class Matrix(Protocol):
    """The identity of a matrix: a row of a report, or an entry of a source."""

    @property
    def module(self) -> str:
        """The dotted name of the module, or of the stacked parameter."""

    @property
    def kind(self) -> Kind:
        """The operation that the module performs with its weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the matrix."""


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """A module that gets a rank.

    Attributes
    ----------
    name
        The dotted name of the module, or of the stacked parameter.
    kind
        The operation that the module performs with its weight.
    shape
        Shape ``(out, in)`` of the matrix.
    copies
        Number of matrices that share the rank: the number of experts in a stack, else 1.

    Examples
    --------
    >>> AdaptedModule("layers.0.mlp.experts.down_proj", "expert", (64, 32), copies=8).cost
    768
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    copies: int = 1

    @property
    def cost(self) -> int:
        """Number of parameters of one rank: ``copies * (out + in)``."""
        return self.copies * sum(self.shape)


def adaptable_modules(matrices: Iterable[Matrix]) -> list[AdaptedModule]:
    """Return the modules that hold matrices; the experts of one stack are one module."""
    by_module: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        by_module[matrix.module].append(matrix)
    return [
        AdaptedModule(name, members[0].kind, members[0].shape, len(members))
        for name, members in by_module.items()
    ]


def targeted(
    modules: Sequence[AdaptedModule],
    targets: naming.Targets,
    ties: Mapping[str, Sequence[str]] | None = None,
) -> list[AdaptedModule]:
    """Return the modules that targets select.

    A module that PEFT adapts by the name of its weight is also selected by the name of the module.

    Parameters
    ----------
    modules
        The modules of the model.
    targets
        Names, suffixes or an expression, as in `lorank.allocate`.
    ties
        The other modules that share the weight of a module, by the name of that module.

    Raises
    ------
    ValueError
        If no module is selected, or a target selects only a module that shares another module's weight.
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
    """Raise ValueError for a target in a list that selects only a module tied to another."""
    if targets is None or isinstance(targets, str):
        return
    suffixes = {suffix for name in known for suffix in naming.suffixes(name)}
    for target in targets:
        for owner, others in ties.items():
            tied = [name for name in others if naming.is_suffix(target, name)]
            if tied and target not in suffixes:
                raise ValueError(f"{tied[0]} shares the weight of {owner}: target {owner} instead")
