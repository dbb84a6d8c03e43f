"""Tensors that an adapter carries beside its factors: their modules, and the keys that they are saved under.

PEFT wraps a module that it adapts, so the module's own tensors lie below `base_layer`: a trained bias or a
resized table is ``X.base_layer.bias`` where X has factors, and ``X.bias`` where it has none. The keys of an
adapter in memory are those of a file in which every listed module has factors, whatever rank is left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from lorank.adapters.content import AdapterContent
from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import Stored

PREFIX = "base_model.model."
"""The start of every key in a PEFT file."""

WRAPPED = "base_layer"
"""PEFT's name for a module inside the layer that adapts it."""

_TABLE = f".{WRAPPED}.weight"

# Starts of the names of a PEFT layer's own parts, beside the module inside the layer.
_OF_LAYERS = ("lora_", "token_adapter")

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
    """Return True for a full difference in an image file, which a weighted sum may add up."""
    return key.endswith(_ADDED)


def owner(stem: str, names: Collection[str]) -> str | None:
    """Find the module that the start of a key names, with or without an end that belongs to its factors."""
    if stem in names:
        return stem
    shorter = _FACTOR_ENDS.sub("", stem)
    return owner(shorter, names) if shorter != stem else None


def magnitudes(keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Find the keys of DoRA magnitudes, and the modules that they belong to."""
    found = {}
    for key in keys:
        if not (match := _MAGNITUDE.fullmatch(key)):
            continue
        module = owner(match["owner"].removeprefix(PREFIX), names)
        # A module of the base model may be called "magnitude", too.
        if module is not None or match["kind"] != "magnitude":
            found[key] = module or match["owner"].removeprefix(PREFIX)
    return found


def owners(adapter: AdapterContent) -> set[str]:
    """Find the modules whose layer is needed even at rank 0, as other tensors or modules depend on the layer.

    These are modules with a bias of their factors or a DoRA magnitude, and

    - in PEFT files, modules that contain another adapted module (its name leads through their layer), and
      those whose table is saved: vLLM and llama.cpp pass over ``X.base_layer.weight`` and refuse
      ``X.weight``;
    - in image files, modules with any other tensor: readers look for that beside factors.
    """
    names = adapter.modules.keys()
    found = {name for name, module in adapter.modules.items() if module.carried}
    found |= set(magnitudes(adapter.carried, names).values()) & names
    if adapter.format == "kohya":
        return found | {name for key in adapter.carried for name in _starts(key) if name in names}
    layers = {
        key.removeprefix(PREFIX).removesuffix(_TABLE) for key in adapter.carried if key.endswith(_TABLE)
    }
    for module in adapter.adapted:
        parts = module.name.split(f".{WRAPPED}.")
        layers |= {f".{WRAPPED}.".join(parts[:count]) for count in range(1, len(parts))}
    return found | {name for name, module in adapter.modules.items() if _wrapped(module) in layers}


def _wrapped(module: LoraModule) -> str:
    """Return the name of the module that PEFT wraps: the module itself, or the one that holds a stack."""
    return module.name.rpartition(".")[0] if module.kind == "expert" else module.name


def _starts(key: str) -> Iterator[str]:
    """Yield the dotted starts of a key, with and without ends that belong to factors."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        start = ".".join(parts[:count])
        yield start
        yield _FACTOR_ENDS.sub("", start)


def written(adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
    """Return the carried tensors, under the keys of a file in which only the named modules have factors."""
    if adapter.format == "kohya":
        return dict(adapter.carried)
    after = [module for name, module in adapter.modules.items() if name in names]
    kept = {key: x for key, x in adapter.carried.items() if not _is_of_a_lost_layer(key, adapter, names)}
    return respelled(kept, adapter.modules.values(), after)


def _is_of_a_lost_layer(key: str, adapter: AdapterContent, names: Collection[str]) -> bool:
    name, found, _ = key.removeprefix(PREFIX).partition(".lora_")
    return bool(found) and name in adapter.modules and name not in names


def respelled(
    carried: Mapping[str, Stored], before: Iterable[LoraModule], after: Iterable[LoraModule]
) -> dict[str, Stored]:
    """Spell PEFT's keys of carried tensors for another choice of adapted modules.

    Parameters
    ----------
    carried
        The tensors by keys that fit the modules in `before`.
    before, after
        The modules with factors.
    """
    old, new = _wrappers(before), _wrappers(after)
    keys = {key: _respelled(key, old, new) for key in carried}
    # Of two tensors with one new key, the respelled one stays: PEFT did not load the other beside it.
    order = sorted(carried, key=lambda key: keys[key] != key)
    found = {keys[key]: carried[key] for key in order}
    return {key: found[key] for key in dict.fromkeys(keys.values())}


def _wrappers(modules: Iterable[LoraModule]) -> Counter[str]:
    """Count the layers of PEFT around a module: one, or one for every adapted parameter of a stack."""
    return Counter(map(_wrapped, modules))


def misnamed(modules: Collection[LoraModule]) -> tuple[str, str] | None:
    """Find a module inside the layer of another whose name omits that layer; return both names."""
    layers = _wrappers(modules)
    for module in modules:
        parts = _wrapped(module).split(".")
        for count in range(1, len(parts)):
            outer = ".".join(parts[:count])
            if outer in layers and parts[count] != WRAPPED:
                return module.name, outer
    return None


def _respelled(key: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    prefix = PREFIX if key.startswith(PREFIX) else ""
    rest = key.removeprefix(prefix).split(".")
    old: list[str] = []
    new: list[str] = []
    while len(rest) > 1:
        old.append(rest[0])
        new.append(rest.pop(0))
        inside = [WRAPPED] * before.get(".".join(old), 0)
        if rest[: len(inside)] != inside or rest[0].startswith(_OF_LAYERS):
            break
        old += inside
        rest = rest[len(inside) :]
        new += [WRAPPED] * after.get(".".join(new), 0)
    return prefix + ".".join(new + rest)


def summed(
    parts: Sequence[tuple[AdapterContent, float]], after: Collection[LoraModule]
) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors that a weighted sum of adapters carries, and notes about them.

    Full differences are added up. Of other tensors, which hold trained values and not differences, the first
    adapter's are taken; those of an adapter with the weight 0 are left out.

    Raises
    ------
    ValueError
        If two differences of one key have unequal shapes.
    """
    every: dict[str, list[tuple[AdapterContent, Stored, float]]] = {}
    for adapter, weight in parts:
        spelled = adapter.carried
        if adapter.format == "peft":
            spelled = respelled(spelled, adapter.modules.values(), after)
        for key, stored in spelled.items() if weight else ():
            every.setdefault(key, []).append((adapter, stored, weight))
    found: dict[str, Stored] = {}
    shared = added = 0
    for key, terms in every.items():
        if parts[0][0].format == "kohya" and is_added(key):
            found[key] = _sum(key, terms)
            added += 1
        else:
            found[key] = terms[0][1]
            shared += len(terms) > 1
    notes = [f"{added} full differences (.diff, .diff_b) were added up"] if added else []
    if shared:
        notes.append(f"{shared} tensors that are not factors lie in several adapters: the first's were taken")
    return found, notes


def _sum(key: str, terms: Sequence[tuple[AdapterContent, Stored, float]]) -> Stored:
    first = terms[0][0]
    total: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
    for adapter, stored, weight in terms:
        values = weight * stored.to_array().astype(np.float64)
        if total is not None and total.shape != values.shape:
            raise ValueError(
                f"tensor {key!r} has shape {list(total.shape)} in {first.label} and {list(values.shape)} in "
                f"{adapter.label}: differences of unequal shapes do not add up"
            )
        total = values if total is None else total + values
    assert total is not None
    types = {stored.dtype for _, stored, _ in terms}
    return Stored(total.astype(np.float32), dtype=types.pop() if len(types) == 1 else "float32")
