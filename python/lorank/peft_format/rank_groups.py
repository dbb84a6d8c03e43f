"""Groups of modules to which PEFT gives equal ranks.

These are tied tables, the projections of one `nn.MultiheadAttention`, and experts that are separate modules.

A stack of experts under one parameter needs no group: it is one module with copies.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lorank.modules.weight import Kind
from lorank.peft_format.names import INSIDE

# PEFT wraps an `nn.MultiheadAttention`, so that its output projection is `ATTENTION.base_layer.out_proj`.
_ATTENTION_OUTPUT = f"{INSIDE}.out_proj"

# Names of experts that are separate modules, which transformers 5 stacks on loading.
_EXPERT = re.compile(r"(?P<container>.*\bexperts)\.\d+\.(?P<projection>.+)")

# Names of expert projections to the hidden size. transformers 5 fuses the others into one parameter.
_OUTWARD = re.compile(r"down|out|w2|wo$")


class Adapted(Protocol):
    """The properties of a `LoraModule` or an `AdaptedModule` that groups depend on."""

    @property
    def name(self) -> str:
        """The module's dotted name."""
        ...

    @property
    def kind(self) -> Kind:
        """The operation of the module on its weight."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight or of the update, in either order for an embedding."""
        ...


def rank_groups(modules: Iterable[Adapted], settings: Mapping[str, Any]) -> list[list[str]]:
    """Group the names of modules that must have equal ranks.

    Parameters
    ----------
    modules
        Adapted modules, named as in PEFT.
    settings
        The adapter's settings; `ensure_weight_tying` ties heads to embeddings.

    Returns
    -------
    list of list of str
        Groups of two or more names, in the order of the modules. No name is in two groups.
    """
    modules = list(modules)
    keys = {module.name: _key(module.name) for module in modules}
    if settings.get("ensure_weight_tying"):
        keys |= _tied(modules)
    groups: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        groups[keys[module.name]].append(module.name)
    return [group for group in groups.values() if len(group) > 1]


def rank_owner(name: str) -> str:
    """Return the name by which PEFT looks up a module's rank: its own name, except inside attention."""
    return name.removesuffix(_ATTENTION_OUTPUT)


def separate_experts(names: Iterable[str]) -> list[str]:
    """Return the names of experts that are separate modules.

    transformers 5 stacks them on loading. PEFT then gives all stacks the rank `r` of the settings.
    """
    return [name for name in names if _EXPERT.fullmatch(name)]


def group_indices(names: Sequence[str], groups: Iterable[Sequence[str]]) -> list[list[int]]:
    """Return the groups as positions in `names`; a name outside of every group forms its own."""
    places = {name: i for i, name in enumerate(names)}
    found = [[places[name] for name in group if name in places] for group in groups]
    grouped = {i for group in found for i in group}
    alone = [[i] for i in range(len(names)) if i not in grouped]
    return sorted([group for group in found if group] + alone)


def _key(name: str) -> str:
    """Return the key that the members of a group share."""
    if expert := _EXPERT.fullmatch(name):
        side = "outward" if _OUTWARD.search(expert["projection"]) else "inward"
        return f"{expert['container']} {side}"
    return rank_owner(name)


def _tied(modules: Sequence[Adapted]) -> dict[str, str]:
    """Map linear modules to the embedding that they are tied to: the one with sides of the same lengths."""
    embeddings = {tuple(sorted(m.shape)): m.name for m in modules if m.kind == "embedding"}
    sides = {m.name: tuple(sorted(m.shape)) for m in modules if m.kind == "linear"}
    return {name: embeddings[side] for name, side in sides.items() if side in embeddings}
