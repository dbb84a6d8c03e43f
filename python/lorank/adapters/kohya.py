"""Image adapters: the keys of kohya's scripts and of diffusers, in one `.safetensors` file."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from lorank import naming
from lorank._core import FormatError, Matrix
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.diffusers_settings import KEY as SETTINGS_KEY
from lorank.adapters.diffusers_settings import PartSettings
from lorank.adapters.module import LoraModule
from lorank.adapters.padding import RANKS_KEY
from lorank.adapters.peft_format import SPECTRAL_KEY, dora_note
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

# Methods that are no product of two factors, by how their keys end.
_OTHER_METHODS = {
    re.compile(rf".*{ending}"): method
    for ending, method in {
        r"\.hada_\w+": "LoHa",
        r"\.lokr_\w+": "LoKr",
        r"\.oft_\w+": "OFT",
        r"\.boft_\w+": "BOFT",
        r"\.on_input": "IA3",
        r"\.diff(?:_b)?": "a full difference",
        r"\.[ab][12]\.weight": "GLoRA",
    }.items()
}

_MAGNITUDE = ".dora_scale"
CERTIFICATE_KEY = "lorank.certificate"
"""Metadata of a file that a certificate belongs to: it, as JSON."""

# How PEFT's own files name everything: what they say is not all there, as the alphas are in the config.
_PEFT_PREFIX = "base_model.model."


def read(tensors: Tensors) -> LoraAdapter:
    """An adapter over a file's tensors.

    Raises
    ------
    FormatError
        If it is another method's file, which is named, or its factors do not fit each other.
    """
    found = _Found.of(tensors)
    settings = PartSettings.of(tensors.label, tensors.metadata)
    modules = [
        _module(tensors, name, keys, found.alphas.pop(name, None), settings)
        for name, keys in found.factors.items()
    ]
    # What is called alpha and belongs to nothing is not ours to judge.
    found.carried.update({key: tensors.stored(key) for key in found.alphas.values()})
    modules.sort(key=lambda module: naming.natural_key(module.name))
    return LoraAdapter(
        {module.name: module for module in modules},
        carried=found.carried,
        notes=found.notes(),
        format="kohya",
        label=tensors.label,
        is_spectral=SPECTRAL_KEY in tensors.metadata,
        key_style={"separators": found.styles, "metadata": dict(tensors.metadata), "settings": settings},
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The keys of a file, sorted out: factors and how they are spelled, alphas, and the rest."""

    factors: dict[str, dict[str, str]]
    styles: dict[str, tuple[str, tuple[str, str]]]
    alphas: dict[str, str]
    carried: dict[str, Stored]

    @classmethod
    def of(cls, tensors: Tensors) -> _Found:
        found = cls(defaultdict(dict), {}, {}, {})
        for key in tensors.shapes():
            if match := _KEY.fullmatch(key):
                factors, factor = found.factors[match["name"]], _FACTORS[match["factor"]]
                if factor in factors:
                    raise FormatError(
                        f"{tensors.label}: tensors {factors[factor]!r} and {key!r} are the same thing twice"
                    )
                factors[factor] = key
                found.styles[match["name"]] = (match["separator"], _PAIRS[match["factor"]])
            elif key.endswith(".alpha"):
                found.alphas[key.removesuffix(".alpha")] = key
            else:
                _refuse_other_methods(tensors.label, key)
                found.carried[key] = tensors.stored(key)
        if not found.factors:
            raise FormatError(f"{tensors.label}: holds no LoRA factors (lora_up/lora_down, lora_A/lora_B)")
        if any(name.startswith(_PEFT_PREFIX) for name in found.factors):
            raise FormatError(
                f"{tensors.label}: has the names of PEFT but no adapter_config.json beside it, or was named "
                "without its folder: give the folder that holds both, or the scale of the update is unknown"
            )
        return found

    def notes(self) -> list[str]:
        magnitudes = sum(key.endswith(_MAGNITUDE) for key in self.carried)
        others = len(self.carried) - magnitudes
        notes = [dora_note(magnitudes)] if magnitudes else []
        notes += [f"{others} tensors that are no factors are kept as they are"] if others else []
        if any("mid" in keys for keys in self.factors.values()):
            notes.append("mid kernels were folded into lora_down")
        return notes


def keys(adapter: LoraAdapter, name: str) -> tuple[str, str]:
    """The keys of B and of A."""
    separator, (b, a) = adapter.key_style["separators"][name]
    return f"{name}{separator}{b}.weight", f"{name}{separator}{a}.weight"


def alpha_key(adapter: LoraAdapter, name: str) -> str | None:
    """The key of alpha; None where the settings in the metadata have it, which diffusers takes instead."""
    return f"{name}.alpha" if adapter.key_style["settings"].part_of(name) is None else None


def metadata(adapter: LoraAdapter, ranks: Mapping[str, int]) -> dict[str, str]:
    """The file's own metadata, without what they say of the old ranks and factors."""
    stale = {"ss_network_dim", "ss_network_alpha", SPECTRAL_KEY, RANKS_KEY, CERTIFICATE_KEY, SETTINGS_KEY}
    kept = {key: value for key, value in adapter.key_style["metadata"].items() if key not in stale}
    settings: PartSettings = adapter.key_style["settings"]
    return kept | ({SETTINGS_KEY: settings.rewritten(ranks)} if settings.parts else {})


def _refuse_other_methods(label: str, key: str) -> None:
    for ending, method in _OTHER_METHODS.items():
        if ending.fullmatch(key):
            raise FormatError(f"{label}: tensor {key!r} belongs to {method}: only LoRA can be read")


def _module(
    tensors: Tensors, name: str, keys: Mapping[str, str], alpha: str | None, settings: PartSettings
) -> LoraModule:
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

    scaling = 1.0
    if alpha is not None:
        scaling = tensors.number(alpha) / rank
    elif said := settings.of_module(name):
        if said[0] != rank:
            fail(f"has rank {rank}, but the settings in the metadata say {said[0]}")
        scaling = said[1]
    kind = "conv" if len(a_tail) > 1 else "linear"
    return LoraModule(
        name,
        kind,  # type: ignore[arg-type]
        shape,
        rank,
        scaling,
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
