"""The modules of a live model whose weight gradients follow from inputs and output gradients."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from lorank.modules import naming
from lorank.modules.live_modules import named_modules
from lorank.modules.targets import AdaptedModule, adaptable_modules, targeted
from lorank.modules.weight import kind_of
from lorank.sources import live
from lorank.sources.base import MatrixInfo, Skipped, Source


@dataclass(frozen=True, slots=True)
class Target:
    """A module to profile.

    Attributes
    ----------
    info
        Name (without PEFT's prefixes), kind and shape of the module.
    module
        The live module; for a PEFT layer, its base layer.
    kernel
        Kernel size ``(kh, kw)`` of a convolution; empty for other modules.
    """

    info: MatrixInfo
    module: Any
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundTargets:
    """The modules to profile, and the selected modules that cannot be profiled.

    Attributes
    ----------
    chosen
        Modules to profile, in the model's order.
    skipped
        Selected modules that cannot be profiled, with reasons.
    source
        The model as a source of weights.
    """

    chosen: Sequence[Target]
    skipped: Sequence[Skipped]
    source: Source


def find_targets(model: Any, targets: naming.Targets) -> FoundTargets:
    """Return the modules of a live model that `targets` selects, as in `allocate`.

    Raises
    ------
    ValueError
        If no selected module can be profiled.
    """
    source = live.from_module(model)
    unread = _unread(model, source)
    every = [
        *adaptable_modules(matrix.info for matrix in source.matrices),
        *(AdaptedModule(name, "linear", (0, 0)) for name in unread),
    ]
    names = {module.name for module in targeted(every, targets)}
    found = named_targets(model, source, names)
    if not found.chosen:
        raise ValueError(f"targets {targets!r} select no module of {source.label} that can be profiled")
    left_out = [skipped for name, skipped in unread.items() if name in names]
    return FoundTargets(found.chosen, (*found.skipped, *left_out), source)


def _unread(model: Any, source: Source) -> dict[str, Skipped]:
    """Return the layers whose weight the source could not read, because it is quantized or partitioned."""
    modules = {prefix.removesuffix("."): module for prefix, module in named_modules(model)}
    read = {matrix.info.module for matrix in source.matrices}
    found: dict[str, Skipped] = {}
    for skipped in source.skipped:
        name, _, local = skipped.name.rpartition(".")
        is_tied = skipped.reason.startswith("tied to")
        if name in read or name not in modules or "weight" not in local or is_tied:
            continue
        kind = kind_of(modules[name])[0]
        if kind in ("linear", "conv") or (kind is None and len(skipped.shape) >= 2):
            found.setdefault(name, Skipped(name, skipped.shape, skipped.reason))
    return found


def named_targets(model: Any, source: Source, names: Container[str]) -> FoundTargets:
    """Find the modules with given names.

    Parameters
    ----------
    model
        The live model.
    source
        The model as a source of weights.
    names
        Names of modules without PEFT's prefixes.
    """
    modules = {prefix.removesuffix("."): module for prefix, module in named_modules(model)}
    chosen: list[Target] = []
    skipped: dict[str, Skipped] = {}
    for matrix in source.matrices:
        info = matrix.info
        if info.module not in names:
            continue
        module = modules.get(naming.without_parameter(info.module))
        if module is None or info.kind in ("expert", "embedding") or kind_of(module)[0] is None:
            what = f"an {info.kind}" if info.kind != "linear" else f"a {type(module).__name__}"
            reason = f"{what}: its gradient does not follow from inputs and output gradients"
            skipped[info.module] = Skipped(info.module, info.shape, reason)
        elif info.kind == "conv" and not _is_plain_convolution(module):
            reason = "a convolution that is grouped or not 2-D"
            skipped[info.module] = Skipped(info.module, info.shape, reason)
        else:
            chosen.append(Target(info, module, matrix.kernel[1:]))
    return FoundTargets(chosen, tuple(skipped.values()), source)


def _is_plain_convolution(module: Any) -> bool:
    """Return True for a two-dimensional convolution without groups."""
    names = {base.__name__ for base in type(module).__mro__}
    return "Conv2d" in names and module.groups == 1
