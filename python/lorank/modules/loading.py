"""Maps the tensors of a checkpoint to the parameters of the loaded model.

transformers renames, splits, stacks and transposes tensors when it loads a checkpoint. This module applies
the rules and operations of transformers. Stacks are converted one expert at a time, so that memory holds
only a few matrices at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from lorank.modules import naming
from lorank.modules.skeleton import Skeleton

Fetch = Callable[[str, "int | None"], Any]
"""A function `fetch(name, index)` that reads one matrix of a stack; the whole tensor if `index` is None."""

# The errors that transformers' operations raise for tensors that do not fit.
_MISFITS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, StopIteration)


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors of a checkpoint that together make up parameters of the model.

    Attributes
    ----------
    target
        The name of the first parameter, by which transformers identifies the conversion.
    sources
        Names of the checkpoint's tensors by the pattern that they match, in transformers' order.
    skeleton
        The model.
    targets
        The names of the parameters that the conversion makes.
    by_expert
        True if each expert of a stack can be converted alone.
    """

    target: str
    sources: Mapping[str, Sequence[str]]
    skeleton: Skeleton
    targets: tuple[str, ...] = ()
    by_expert: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the checkpoint's tensors."""
        return [name for names in self.sources.values() for name in names]

    def run(self, fetch: Fetch, expert: int | None = None) -> dict[str, Any]:
        """Convert the tensors and return the parameters by name.

        Parameters
        ----------
        fetch
            A function that reads a tensor of the checkpoint.
        expert
            The index of an expert, to return stacks that hold only this expert's matrix; None for complete
            parameters.
        """
        model = self.skeleton.model
        converter = copy.deepcopy(_converters(self.skeleton)[next(iter(self.sources))])
        for pattern, names in self.sources.items():
            for name, part in _parts(names, expert):
                converter.add_tensor(self.target, name, pattern, fetch(name, part))
        with_lists = converter.convert(self.target, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in with_lists.items()}


def _parts(names: Sequence[str], expert: int | None) -> list[tuple[str, int | None]]:
    """Return the names of the tensors to read, each with the index of the expert if the tensor is a stack."""
    if expert is None:
        return [(name, None) for name in names]
    return [(names[0], expert)] if len(names) == 1 else [(names[expert], None)]


@dataclass(frozen=True, slots=True)
class Placement:
    """The parameters that the tensors of a checkpoint become.

    Attributes
    ----------
    renamed
        The parameter's name by the tensor's name, for tensors that are loaded unchanged.
    conversions
        Computations of parameters from one or several tensors.
    strangers
        The reasons why tensors belong to no parameter of the model, by the tensor's name.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    strangers: dict[str, str] = field(default_factory=dict)

    def misfit(self, shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton) -> str:
        """Describe how most tensors differ from the model; empty if most tensors fit.

        A resized vocabulary changes only a few tensors. Buffers are compared by their names alone.
        """
        converted = sum(len(conversion.names) for conversion in self.conversions)
        if 2 * (len(self.renamed) + converted) < len(shapes):
            return "parameters have other names"
        # Buffers, such as running means, have no shape in the skeleton.
        fitting = [
            skeleton.weights[target].shape == shapes[name]
            for name, target in self.renamed.items()
            if target in skeleton.weights
        ]
        is_fit = 2 * (sum(fitting) + converted) >= len(fitting) + converted
        return "" if is_fit else "parameters have other shapes"


def place(shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton) -> Placement:
    """Find the parameters that a checkpoint's tensors are loaded into.

    Parameters
    ----------
    shapes
        The tensors' shapes by name.
    skeleton
        The model.
    """
    state = skeleton.model.state_dict()
    target_of = _targets(skeleton)
    found = Placement()
    grouped: dict[str, dict[str, list[str]]] = {}
    for name in sorted(shapes, key=_loading_order):
        target, pattern = target_of(name)
        if target not in state:
            found.strangers[name] = f"{skeleton.label} has no such parameter"
        elif not pattern:
            found.renamed[name] = target
        else:
            grouped.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, sources in grouped.items():
        conversion, reason = _checked(Conversion(target, sources, skeleton), shapes, skeleton)
        if reason:
            found.strangers.update(dict.fromkeys(conversion.names, reason))
        else:
            found.conversions.append(conversion)
    return found


def loaded_name(name: str, skeleton: Skeleton) -> tuple[str, bool]:
    """Return the parameter that a tensor is loaded into, and True if the tensor is a part of it."""
    target, pattern = _targets(skeleton)(name)
    return target, bool(pattern)


@lru_cache(maxsize=2)
def _targets(skeleton: Skeleton) -> Callable[[str], tuple[str, str]]:
    """Return a function from the name of a tensor to its parameter and the pattern of its conversion."""
    model = skeleton.model
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    if prefix is None:
        return lambda name: (name, "")
    try:
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return _older_targets(model, state, prefix)
    converters = list(dict.fromkeys(_converters(skeleton).values()))
    renamings = [rule for rule in _rules(skeleton) if isinstance(rule, WeightRenaming)]

    def target_of(name: str) -> tuple[str, str]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return target, pattern or ""

    return target_of


@lru_cache(maxsize=2)
def _rules(skeleton: Skeleton) -> list[Any]:
    """Return transformers' rules for loading a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(skeleton.model))


@lru_cache(maxsize=2)
def _converters(skeleton: Skeleton) -> dict[str, Any]:
    """Map patterns of tensors' names to the conversions of a model, in transformers' order."""
    from transformers.core_model_loading import WeightConverter

    rules = [rule for rule in _rules(skeleton) if isinstance(rule, WeightConverter)]
    return {pattern: rule for rule in rules for pattern in rule.source_patterns}


def _older_targets(model: Any, state: Mapping[str, Any], prefix: str) -> Callable[[str], tuple[str, str]]:
    """Return the function of `_targets` for transformers before 5, which only renames tensors."""
    renames = getattr(model, "_checkpoint_conversion_mapping", None) or {}

    def target_of(name: str) -> tuple[str, str]:
        target = name
        for pattern, replacement in renames.items():
            target, count = re.subn(pattern, replacement, target)
            if count:
                break
        target = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", target))
        if target not in state and prefix:
            with_prefix = f"{prefix}.{target}"
            target = with_prefix if with_prefix in state else target.removeprefix(f"{prefix}.")
        return target, ""

    return target_of


def _checked(
    conversion: Conversion, shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton
) -> tuple[Conversion, str]:
    """Run a conversion on the meta device; return it with its targets, or with the reason for a misfit."""
    import torch

    def fetch(name: str, part: int | None) -> Any:
        shape = shapes[name]
        return torch.empty(shape if part is None else (1, *shape[1:]), device="meta")

    try:
        whole = {name: tuple(value.shape) for name, value in conversion.run(fetch).items()}
    except _MISFITS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return conversion, f"transformers could not convert it ({reason})"
    for name, shape in whole.items():
        if name not in skeleton.weights or skeleton.weights[name].shape != shape:
            return (
                conversion,
                f"transformers converts it to {name} of shape {shape}, which does not fit the model",
            )
    by_expert = _is_by_expert(conversion, whole, fetch, shapes)
    return replace(conversion, targets=tuple(whole), by_expert=by_expert), ""


def _is_by_expert(
    conversion: Conversion,
    whole: Mapping[str, tuple[int, ...]],
    fetch: Fetch,
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Return True if one expert's tensors suffice to compute its part of every parameter."""
    counts = {shape[0] for shape in whole.values()}
    if len(counts) != 1 or any(len(shape) != 3 for shape in whole.values()):
        return False
    (count,) = counts
    for names in conversion.sources.values():
        is_stack = len(names) == 1 and len(shapes[names[0]]) == 3 and shapes[names[0]][0] == count
        if len(names) != count and not is_stack:
            return False
    try:
        single = {name: tuple(value.shape) for name, value in conversion.run(fetch, 0).items()}
    except _MISFITS:
        return False
    return single == {name: (1, *shape[1:]) for name, shape in whole.items()}


def _loading_order(name: str) -> list[tuple[int, str]]:
    """Return the key by which transformers sorts names: numbers sort by value."""
    return [naming.number_first(part) for part in name.split(".")]
