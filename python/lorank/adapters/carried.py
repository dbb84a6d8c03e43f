"""Tensors of an adapter other than its factors, and the modules that they belong to.

In memory, these tensors have the keys of a file in which every listed module has factors, even modules of
rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from lorank.adapters.content import AdapterContent
from lorank.peft_format.names import PREFIX

# Keys of DoRA's magnitudes in files of PEFT (which may add an adapter's name), kohya's scripts, LyCORIS and
# torchtune.
_MAGNITUDE = re.compile(
    r"(?P<owner>.+?)\.(?P<kind>dora_scale|(?:lora_|dora_)?magnitude(?:_vector)?)(?:\.[^.]+)*"
)

# Ends of names that belong to the factors, not to the module.
_FACTOR_ENDS = re.compile(
    r"(?:(?:\.lora|_lora|\.lora_linear_layer)(?:\.(?:up|down|mid|A|B))?|\.lora_(?:up|down|mid|A|B))(?:\.weight)?$"
)

_ADDED = (".diff", ".diff_b", ".w_norm", ".b_norm")
"""Ends of keys of full differences, which runtimes scale by the adapter's strength alone."""


def is_added(key: str) -> bool:
    """Return True for the key of a full difference in an image adapter, which a weighted sum may add up."""
    return key.endswith(_ADDED)


def owner(stem: str, names: Collection[str]) -> str | None:
    """Return the module that the start of a key names, without ends that belong to factors, or None."""
    if stem in names:
        return stem
    shorter = _FACTOR_ENDS.sub("", stem)
    return owner(shorter, names) if shorter != stem else None


def magnitudes(keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Map the key of every DoRA magnitude to the name of its module."""
    found = {}
    for key in keys:
        if not (match := _MAGNITUDE.fullmatch(key)):
            continue
        module = owner(match["owner"].removeprefix(PREFIX), names)
        # A module of the base model may be called "magnitude", too.
        if module is not None or match["kind"] != "magnitude":
            found[key] = module or match["owner"].removeprefix(PREFIX)
    return found


def with_own_tensors(adapter: AdapterContent) -> set[str]:
    """Return the modules with a bias of B or a DoRA magnitude: their layers are needed even at rank 0."""
    found = {name for name, module in adapter.modules.items() if module.carried}
    names = adapter.modules.keys()
    return found | (set(magnitudes(adapter.carried, names).values()) & names)


def starts(key: str) -> Iterator[str]:
    """Yield the dotted starts of a key, with and without ends that belong to factors."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        start = ".".join(parts[:count])
        yield start
        yield _FACTOR_ENDS.sub("", start)
