"""The keys of image adapters: factors, biases and alphas of kohya's scripts, diffusers and ComfyUI."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from lorank._core import FormatError
from lorank.adapters.carried import owner
from lorank.adapters.tensors import Tensors

# Keys of factors: the module's name, the factor, an adapter's name (DiffSynth), and weight or bias.
_FACTOR = re.compile(
    r"(?P<name>.+?)(?:\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.|(?<=_lora\d)\.)"
    r"(?P<factor>up|down|mid|A|B)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<end>weight|bias))?"
)
_LETTERS = {"up": "B", "B": "B", "down": "A", "A": "A", "mid": "mid"}

_ALPHA = re.compile(r"(?P<stem>.+?)[._](?:lora_|network_)?alpha(?:\.(?!weight$|bias$)[^.]+)?")


@dataclass(frozen=True, slots=True)
class Spelled:
    """The keys of one module.

    Attributes
    ----------
    factors
        Keys by ``"A"``, ``"B"`` and ``"mid"``.
    bias
        The key of the bias that is added to the output of B; None if there is none.
    """

    factors: dict[str, str] = field(default_factory=dict)
    bias: str | None = None


def alpha_key(name: str) -> str:
    """Return the usual key of a module's alpha."""
    return f"{name}.alpha"


def sorted_out(tensors: Tensors) -> tuple[dict[str, Spelled], list[str]]:
    """Return the keys of every module's factors and biases, and the keys of all other tensors.

    Raises
    ------
    FormatError
        If a module has two tensors for one factor, factors of two adapters, or a bias of A or "mid".
    """
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    biases: dict[str, str] = {}
    adapters: dict[str, str] = {}
    others = []
    for key, shape in tensors.shapes().items():
        match = _FACTOR.fullmatch(key)
        # Without the usual end, only a matrix is a factor: `lora_A.alpha` is a number.
        if match is None or (match["end"] is None and len(shape) < 2):
            others.append(key)
            continue
        name, letter, adapter = match["name"], _LETTERS[match["factor"]], match["adapter"] or ""
        if (first := adapters.setdefault(name, adapter)) != adapter:
            raise FormatError(
                f"{tensors.label}: module {name!r}: has tensors of two adapters, {first!r} and {adapter!r} "
                f"(tensor {key!r}): keep one adapter in the file"
            )
        if match["end"] == "bias" and letter != "B":
            raise FormatError(
                f"{tensors.label}: tensor {key!r}: a bias between the factors is not part of their product"
            )
        table, entry = (biases, name) if match["end"] == "bias" else (factors[name], letter)
        if entry in table:
            raise FormatError(
                f"{tensors.label}: tensors {table[entry]!r} and {key!r} define the same parameter"
            )
        table[entry] = key
    if orphans := [key for name, key in biases.items() if name not in factors]:
        raise FormatError(f"{tensors.label}: tensor {orphans[0]!r}: its module has no factors")
    return {name: Spelled(keys, biases.get(name)) for name, keys in factors.items()}, others


def alphas(tensors: Tensors, keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Map modules to the keys of their alphas, which may spell names differently from the factors' keys.

    Raises
    ------
    FormatError
        If two keys are alphas of one module.
    """
    flat: dict[str, list[str]] = defaultdict(list)
    for name in names:
        flat[_flattened(name)].append(name)
    found: dict[str, str] = {}
    for key in keys:
        if not (match := _ALPHA.fullmatch(key)):
            continue
        twins = flat[_flattened(match["stem"])]
        module = owner(match["stem"], names) or (twins[0] if len(twins) == 1 else None)
        if module is None:
            continue
        if module in found:
            raise FormatError(
                f"{tensors.label}: tensors {found[module]!r} and {key!r} define the same parameter"
            )
        found[module] = key
    return found


def _flattened(name: str) -> str:
    """Flatten a name as kohya's scripts do, without ``lora_``: ``unet_mid_block`` for ``unet.mid.block``."""
    return name.replace(".", "_").removeprefix("lora_")


def is_alpha(key: str) -> bool:
    """Return True for the key of an alpha."""
    return _ALPHA.fullmatch(f"_.{key}") is not None
