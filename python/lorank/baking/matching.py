"""Matches the tensors of two models that may be stored under other names."""

from __future__ import annotations

from collections.abc import Mapping

from lorank.baking.checkpoint import StoredModel, StoredTensor
from lorank.modules.building import Unknown
from lorank.modules.description import describe_model


def matched(base: StoredModel, other: StoredModel) -> dict[str, StoredTensor]:
    """Return the tensors of another model by the names that the base model gives them.

    Names are compared as they are, with a common prefix added or removed, and by the parameters that the
    tensors are loaded into.
    """
    found = {name: other.tensors[name] for name in base.tensors if name in other.tensors}
    weights = base.tensors.keys() - base.packing.parts.keys()
    if weights <= found.keys() or not other.tensors:
        return found
    found |= _by_prefix(base, other, found)
    if not weights <= found.keys():
        found = {**_by_parameters(base, other), **found}
    return found


def _by_prefix(
    base: StoredModel, other: StoredModel, known: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Match names that differ by one common prefix."""
    left = [name for name in base.tensors if name not in known]
    left.sort(key=lambda name: name in base.packing.parts)
    free = {name for name in other.tensors if name not in known}
    best: dict[str, StoredTensor] = {}
    prefixes = {name[: -len(left[0])] for name in free if name.endswith(f".{left[0]}")}
    for prefix in prefixes:
        renamed = {name: other.tensors[prefix + name] for name in left if prefix + name in free}
        best = max(best, renamed, key=len)
    for end in [i + 1 for i, character in enumerate(left[0]) if character == "."]:
        prefix = left[0][:end]
        renamed = {
            name: other.tensors[name.removeprefix(prefix)]
            for name in left
            if name.startswith(prefix) and name.removeprefix(prefix) in free
        }
        best = max(best, renamed, key=len)
    return best


def _by_parameters(base: StoredModel, other: StoredModel) -> dict[str, StoredTensor]:
    """Match tensors that are loaded unchanged into the same parameter."""
    descriptions = [describe_model(model.config, model.plain_shapes) for model in (base, other)]
    tables = []
    for found in descriptions:
        if isinstance(found, Unknown):
            return {}
        owners = found.skeleton.owners
        tables.append({name: owners.get(to, to) for name, to in found.placement.renamed.items()})
    by_parameter = {to: name for name, to in tables[1].items()}
    return {name: other.tensors[by_parameter[to]] for name, to in tables[0].items() if to in by_parameter}
