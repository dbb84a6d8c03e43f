"""Image adapters: the keys of kohya's scripts and of diffusers, in one `.safetensors` file."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from lorank import naming
from lorank._core import FormatError, Matrix
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.module import LoraModule
from lorank.adapters.padding import RANKS_KEY
from lorank.adapters.peft_format import SPECTRAL_KEY
from lorank.adapters.tensors import Stored, Tensors
from lorank.sources import arrays

# name, then how the two factors are told apart.
_KEY = re.compile(
    r"(?P<name>.+?)(?P<separator>\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.)"
    r"(?P<factor>up|down|mid|A|B)\.weight"
)
_FACTORS = {"up": "B", "B": "B", "down": "A", "A": "A", "mid": "mid"}
_PAIRS = {
    "A": ("B", "A"),
    "B": ("B", "A"),
    "up": ("up", "down"),
    "down": ("up", "down"),
    "mid": ("up", "down"),
}

# Methods that are no product of two factors, by what their keys contain.
_OTHER_METHODS = {
    "hada_w": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "on_input": "IA3",
    ".diff": "a full difference",
    ".a1.weight": "GLoRA",
}


# How PEFT's own files name everything: what they say is not all there, as the alphas are in the config.
_PEFT_PREFIX = "base_model.model."


def read(tensors: Tensors) -> LoraAdapter:
    """An adapter over a file's tensors.

    Raises
    ------
    FormatError
        If it is another method's file, which is named, or its factors do not fit each other.
    """
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    styles: dict[str, tuple[str, tuple[str, str]]] = {}
    carried: dict[str, Stored] = {}
    alphas: dict[str, str] = {}
    for key in tensors.shapes():
        if found := _KEY.fullmatch(key):
            factors[found["name"]][_FACTORS[found["factor"]]] = key
            styles[found["name"]] = (found["separator"], _PAIRS[found["factor"]])
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = key
        else:
            _refuse_other_methods(tensors.label, key)
            carried[key] = tensors.stored(key)
    if not factors:
        raise FormatError(f"{tensors.label}: holds no LoRA factors (lora_up/lora_down, lora_A/lora_B)")
    if any(name.startswith(_PEFT_PREFIX) for name in factors):
        raise FormatError(
            f"{tensors.label}: has the names of PEFT but no adapter_config.json beside it, or was named "
            "without its folder: give the folder that holds both, or the scale of the update is unknown"
        )
    notes = [f"{len(carried)} tensors that are no factors are kept as they are"] if carried else []
    if any("mid" in keys for keys in factors.values()):
        notes.append("mid kernels were folded into lora_down")
    modules = [_module(tensors, name, factors[name], alphas.pop(name, None)) for name in factors]
    carried |= {key: tensors.stored(key) for key in alphas.values()}
    modules.sort(key=lambda module: naming.natural_key(module.name))
    return LoraAdapter(
        {module.name: module for module in modules},
        carried=carried,
        notes=notes,
        format="kohya",
        label=tensors.label,
        is_spectral=SPECTRAL_KEY in tensors.metadata,
        key_style={"separators": styles, "metadata": dict(tensors.metadata)},
    )


def keys(adapter: LoraAdapter, name: str) -> tuple[str, str, str]:
    """The keys of B, of A and of alpha."""
    separator, (b, a) = adapter.key_style["separators"][name]
    return f"{name}{separator}{b}.weight", f"{name}{separator}{a}.weight", f"{name}.alpha"


def metadata(adapter: LoraAdapter) -> dict[str, str]:
    """The file's own metadata without what they say of the old ranks and factors."""
    stale = {"ss_network_dim", "ss_network_alpha", SPECTRAL_KEY, RANKS_KEY}
    return {key: value for key, value in adapter.key_style["metadata"].items() if key not in stale}


def _refuse_other_methods(label: str, key: str) -> None:
    for part, method in _OTHER_METHODS.items():
        if part in key:
            raise FormatError(f"{label}: tensor {key!r} belongs to {method}: only LoRA can be read")


def _module(tensors: Tensors, name: str, keys: Mapping[str, str], alpha: str | None) -> LoraModule:
    def fail(reason: str) -> NoReturn:
        raise FormatError(f"{tensors.label}: module {name!r}: {reason}")

    for factor, word in (("A", "down"), ("B", "up")):
        if factor not in keys:
            fail(f"has no lora_{word}")
    shapes = tensors.shapes()
    a, b = shapes[keys["A"]], shapes[keys["B"]]
    mid = shapes[keys["mid"]] if "mid" in keys else None
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b) or math.prod(b[2:]) != 1:
        fail(f"factors of shapes {list(b)} and {list(a)} are no matrices")
    if mid is None and a[0] != b[1]:
        fail(f"factors of shapes {list(b)} and {list(a)} do not fit each other")
    if mid is not None and (len(mid) != 4 or mid[:2] != (b[1], a[0]) or math.prod(a[2:]) != 1):
        fail(f"factors of shapes {list(b)}, {list(mid)} and {list(a)} do not fit each other")
    rank = b[1]
    a_tail = (a[1], *mid[2:]) if mid else a[1:]
    shape = (b[0], math.prod(a_tail))

    def factors() -> list[tuple[Matrix, Matrix]]:
        left = tensors.matrix(keys["B"], b[0], rank)
        if mid is None:
            return [(left, tensors.matrix(keys["A"], rank, shape[1]))]
        return [(left, arrays.matrix(_folded(tensors, keys, mid, a)))]

    value = float(tensors.matrix(alpha, 1, 1).to_array()[0, 0]) if alpha else float(rank)
    kind = "conv" if len(a_tail) > 1 else "linear"
    return LoraModule(
        name,
        kind,  # type: ignore[arg-type]
        shape,
        rank,
        value / rank,
        tensors.dtype(keys["B"]),
        factors,
        a_tail=tuple(a_tail),
        b_tail=b[2:],
    )


def _folded(
    tensors: Tensors, keys: Mapping[str, str], mid: tuple[int, ...], a: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """``A[r, in * kh * kw]`` of a convolution that is stored as ``up * mid * down``."""
    kernel = tensors.matrix(keys["mid"], mid[0], math.prod(mid[1:])).to_array().reshape(mid)
    down = tensors.matrix(keys["A"], a[0], a[1]).to_array()
    folded: np.ndarray[Any, Any] = np.einsum("rskl,si->rikl", kernel.astype(np.float64), down)
    return folded.reshape(mid[0], -1)
