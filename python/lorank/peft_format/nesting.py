"""Keys of tensors inside PEFT's layers, which depend on the choice of adapted modules.

PEFT replaces a module that it adapts by a layer, so the module's own tensors lie below `base_layer`: a bias
is ``X.base_layer.bias`` where X has factors, and ``X.bias`` where it has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from lorank.peft_format.names import BASE_LAYER, PREFIX
from lorank.peft_format.rank_groups import Adapted

Value = TypeVar("Value")

# Starts of the names of a layer's parts other than its base layer.
_OF_LAYERS = ("lora_", "token_adapter")


def wrapped(module: Adapted) -> str:
    """Return the name of the module that PEFT wraps: the module itself, or the one that holds a stack."""
    return module.name.rpartition(".")[0] if module.kind == "expert" else module.name


def around(name: str) -> list[str]:
    """Return the names of the modules whose layers contain a module, outermost first."""
    parts = name.split(f".{BASE_LAYER}.")
    return [f".{BASE_LAYER}.".join(parts[:count]) for count in range(1, len(parts))]


def respelled(
    tensors: Mapping[str, Value], before: Iterable[Adapted], after: Iterable[Adapted]
) -> dict[str, Value]:
    """Return tensors under the keys that they have for another choice of adapted modules.

    Parameters
    ----------
    tensors
        The tensors by keys that fit the modules in `before`.
    before, after
        The modules with factors under the old keys and under the new keys.
    """
    old, new = _layers(before), _layers(after)
    keys = {key: _respelled(key, old, new) for key in tensors}
    # If two tensors get the same key, the respelled tensor is kept, because PEFT did not load the other.
    order = sorted(tensors, key=lambda key: keys[key] != key)
    found = {keys[key]: tensors[key] for key in order}
    return {key: found[key] for key in dict.fromkeys(keys.values())}


def misnamed(modules: Collection[Adapted]) -> tuple[str, str] | None:
    """Find a module inside the layer of another whose name omits that layer; return both names."""
    layers = _layers(modules)
    for module in modules:
        parts = wrapped(module).split(".")
        for count in range(1, len(parts)):
            outer = ".".join(parts[:count])
            if outer in layers and parts[count] != BASE_LAYER:
                return module.name, outer
    return None


def _layers(modules: Iterable[Adapted]) -> Counter[str]:
    """Count the layers around each module: one, or one for every adapted parameter of a stack."""
    return Counter(map(wrapped, modules))


def _respelled(key: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    prefix = PREFIX if key.startswith(PREFIX) else ""
    rest = key.removeprefix(prefix).split(".")
    old: list[str] = []
    new: list[str] = []
    while len(rest) > 1:
        old.append(rest[0])
        new.append(rest.pop(0))
        inside = [BASE_LAYER] * before.get(".".join(old), 0)
        if rest[: len(inside)] != inside or rest[0].startswith(_OF_LAYERS):
            break
        old += inside
        rest = rest[len(inside) :]
        new += [BASE_LAYER] * after.get(".".join(new), 0)
    return prefix + ".".join(new + rest)
