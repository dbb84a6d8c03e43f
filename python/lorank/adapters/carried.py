"""Tensors that an adapter carries beside its factors, and the modules that they belong to.

The keys of an adapter in memory are those of a file in which every listed module has factors, even modules of
rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from lorank.adapters.content import AdapterContent
from lorank.peft_format.names import PREFIX

# DoRA's magnitudes as PEFT, kohya's scripts, LyCORIS and torchtune call them; PEFT may add an adapter's name.
_MAGNITUDE = re.compile(
    r"(?P<owner>.+?)\.(?P<kind>dora_scale|(?:lora_|dora_)?magnitude(?:_vector)?)(?:\.[^.]+)*"
)

# Ends of names that belong to the factors, not to the module.
_FACTOR_ENDS = re.compile(
    r"(?:(?:\.lora|_lora|\.lora_linear_layer)(?:\.(?:up|down|mid|A|B))?|\.lora_(?:up|down|mid|A|B))(?:\.weight)?$"
)

_ADDED = (".diff", ".diff_b", ".w_norm", ".b_norm")
"""Ends of full differences, which runtimes add to a weight or bias by the adapter's strength alone."""


def is_added(key: str) -> bool:
    """Return True for a full difference in an image adapter's file, which a weighted sum may add up."""
    return key.endswith(_ADDED)


def owner(stem: str, names: Collection[str]) -> str | None:
    """Return the module that the start of a key names, with or without an end that belongs to its factors."""
    if stem in names:
        return stem
    shorter = _FACTOR_ENDS.sub("", stem)
    return owner(shorter, names) if shorter != stem else None


def magnitudes(keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Return the modules that DoRA magnitudes belong to, by the magnitudes' keys."""
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
    """Return the modules with a bias of their factors or a DoRA magnitude, whose layer rank 0 needs, too."""
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
