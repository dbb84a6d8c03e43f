"""Reads the modules of an image adapter's file; the factors stay on disk."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from lorank._core import FormatError
from lorank.adapters import carried
from lorank.adapters.content import AdapterContent
from lorank.adapters.factors import Pair, TensorFactors
from lorank.adapters.formats import image_keys, product_reading
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.diffusers_settings import PartSettings
from lorank.adapters.formats.image_keys import Spelled, alpha_key
from lorank.adapters.formats.image_style import ImageStyle
from lorank.adapters.formats.peft_notes import dora_note
from lorank.adapters.formats.product_factors import ProductFactors
from lorank.adapters.metadata import SPECTRAL_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import Tensors
from lorank.modules import naming
from lorank.modules.weight import Kind
from lorank.peft_format.names import BIAS, PREFIX
from lorank.sources import arrays

# Methods whose update is not a product of two factors, by the ends of their tensors' keys.
_OTHER_METHODS = {
    re.compile(rf".*{ending}"): method
    for ending, method in {
        r"\.oft_\w+": "OFT",
        r"\.boft_\w+": "BOFT",
        r"\.on_input": "IA3",
        r"\.[ab][12]\.weight": "GLoRA",
    }.items()
}

_ALPHAS_IN_METADATA = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")


def read(tensors: Tensors) -> AdapterContent:
    """Read an adapter from a file's tensors, without the values of the factors.

    Raises
    ------
    FormatError
        If the file is of another method (the message gives its name), or factors do not fit each other.
    """
    found = _Found.of(tensors)
    settings = PartSettings.of(tensors.label, tensors.metadata)
    modules = [
        _module(tensors, name, keys, found.alphas.get(name), settings) for name, keys in found.modules.items()
    ]
    modules += [_product(tensors, name, keys, found) for name, keys in found.products.items()]
    modules.sort(key=lambda module: naming.natural_key(module.name))
    style = ImageStyle(
        {name: (keys.factors["B"], keys.factors["A"]) for name, keys in found.modules.items()}
        | {name: (f"{name}.lora_up.weight", f"{name}.lora_down.weight") for name in found.products},
        dict(tensors.metadata),
        settings,
        has_alphas=any(key == alpha_key(name) for name, key in found.alphas.items()),
    )
    return AdapterContent(
        {module.name: module for module in modules},
        carried={key: tensors.stored(key) for key in found.others},
        notes=[*found.notes(), *_alpha_without_tensor(tensors.metadata, found.alphas, settings, modules)],
        format="kohya",
        label=tensors.label,
        is_spectral=SPECTRAL_KEY in tensors.metadata,
        key_style=style,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The keys of a file by their roles: modules, their alphas, and the rest."""

    modules: dict[str, Spelled]
    products: dict[str, dict[str, str]]
    alphas: dict[str, str]
    scalars: dict[str, str]
    others: list[str]

    @classmethod
    def of(cls, tensors: Tensors) -> _Found:
        modules, others = image_keys.sorted_out(tensors)
        products, others = product_reading.parts_of(others)
        if twice := sorted(modules.keys() & products.keys()):
            raise FormatError(f"{tensors.label}: module {twice[0]!r}: has factors of LoRA and of a product")
        for key in others:
            _refuse_other_methods(tensors.label, key)
        if not modules and not products:
            if added := [key for key in others if carried.is_added(key)]:
                what = f"tensor {added[0]!r} belongs to a full difference"
                raise FormatError(f"{tensors.label}: {what}: only LoRA can be read")
            raise FormatError(f"{tensors.label}: holds no LoRA factors (lora_up/lora_down, lora_A/lora_B)")
        if any(key.startswith(PREFIX) for key in tensors.shapes()):
            raise FormatError(
                f"{tensors.label}: has tensor names of PEFT, which stores the scale of updates in "
                "adapter_config.json: give the folder that holds both files"
            )
        names = modules.keys() | products.keys()
        alphas = image_keys.alphas(tensors, others, names)
        scalars = {name: key for name in products if (key := f"{name}.scalar") in others}
        used = {*alphas.values(), *scalars.values()}
        return cls(modules, products, alphas, scalars, [key for key in others if key not in used])

    def notes(self) -> list[str]:
        """Return notes on keys that saving changes, and on tensors that are kept unchanged."""
        magnitudes = carried.magnitudes(self.others, self.modules.keys() | self.products.keys())
        lost = [key for key in self.others if image_keys.is_alpha(key)]
        added = [key for key in self.others if carried.is_added(key)]
        rest = len(self.others) - len(magnitudes) - len(lost) - len(added)
        notes = [dora_note(len(magnitudes))] if magnitudes else []
        if lost:
            notes.append(
                f"{len(lost)} alphas were not applied, because their modules have no factors; the first is "
                f"{lost[0]}"
            )
        if unusual := [key for name, key in self.alphas.items() if key != alpha_key(name)]:
            notes.append(
                f"{len(unusual)} alphas with unusual names were folded into the factors; the first was "
                f"{unusual[0]}. Programs that do not read such names scaled the modules by 1"
            )
        if added:
            notes.append(f"the file also holds {len(added)} full differences; the first is {added[0]}")
        if rest:
            notes.append(f"{rest} tensors that are not factors are kept as they are")
        if any("mid" in keys.factors for keys in self.modules.values()):
            notes.append("mid kernels were folded into lora_down")
        kinds = ["LOHA" if "hada_w1_a" in keys else "LOKR" for keys in self.products.values()]
        notes += [product_reading.note(kind, count) for kind, count in Counter(kinds).items()]
        return notes


def _alpha_without_tensor(
    metadata: Mapping[str, str],
    alphas: Mapping[str, str],
    settings: PartSettings,
    modules: Sequence[LoraModule],
) -> list[str]:
    """Return a note if the metadata give an alpha and no tensor holds one."""
    key = next((key for key in _ALPHAS_IN_METADATA if key in metadata), None)
    if key is None or alphas or settings.parts:
        return []
    if metadata[key] in {f"{module.rank}" for module in modules} | {f"{module.rank}.0" for module in modules}:
        return []
    return [
        f"the metadata give {key} = {metadata[key][:20]}, but no tensor holds an alpha: the scale 1 was "
        "used, and saving drops the entry"
    ]


def _refuse_other_methods(label: str, key: str) -> None:
    for ending, method in _OTHER_METHODS.items():
        if ending.fullmatch(key):
            raise FormatError(f"{label}: tensor {key!r} belongs to {method}: only LoRA can be read")


def _module(
    tensors: Tensors, name: str, spelled: Spelled, alpha: str | None, settings: PartSettings
) -> LoraModule:
    keys = spelled.factors
    a, b, mid = _shapes(tensors, name, keys)
    rank = b[1]
    a_tail = (a[1], *mid[2:]) if mid else a[1:]
    kind: Kind = "conv" if len(a_tail) > 1 else "linear"
    stored = TensorFactors(tensors, keys["B"], keys["A"], (b[0], math.prod(a_tail)), rank)
    return LoraModule(
        name,
        kind,
        stored.shape,
        rank,
        _scaling(tensors, name, rank, alpha, settings),
        tensors.dtype(keys["B"]),
        stored if mid is None else KernelFactors(stored, keys["mid"], mid, a),
        a_tail=tuple(a_tail),
        b_tail=b[2:],
        carried={} if spelled.bias is None else {BIAS: _bias(tensors, name, spelled.bias, b[0])},
    )


def _product(tensors: Tensors, name: str, keys: Mapping[str, str], found: _Found) -> LoraModule:
    """Return a module of LoHa or LoKr."""
    alpha, scalar = found.alphas.get(name), found.scalars.get(name)

    def scaling(rank: int | None) -> float:
        # A product without factors has no rank to divide by.
        scale = tensors.number(alpha) / rank if alpha is not None and rank is not None else 1.0
        return scale * (tensors.number(scalar) if scalar is not None else 1.0)

    return product_reading.module_of(tensors, name, keys, scaling)


def _shapes(
    tensors: Tensors, name: str, keys: Mapping[str, str]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """Return the shapes of A, B and mid after checking that they fit; the shape of a missing mid is None."""

    def fail(reason: str) -> NoReturn:
        raise FormatError(f"{tensors.label}: module {name!r}: {reason}")

    for factor, word in (("A", "down"), ("B", "up")):
        if factor not in keys:
            fail(f"has no lora_{word}")
    shapes = tensors.shapes()
    a, b = shapes[keys["A"]], shapes[keys["B"]]
    mid = shapes[keys["mid"]] if "mid" in keys else None
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b) or math.prod(b[2:]) != 1:
        fail(f"factors of shapes {list(b)} and {list(a)} are not matrices")
    if mid is None and a[0] != b[1]:
        fail(f"factors of shapes {list(b)} and {list(a)} do not fit each other")
    if mid is not None and (len(mid) != 4 or mid[:2] != (b[1], a[0]) or math.prod(a[2:]) != 1):
        fail(f"factors of shapes {list(b)}, {list(mid)} and {list(a)} do not fit each other")
    return a, b, mid


def _scaling(tensors: Tensors, name: str, rank: int, alpha: str | None, settings: PartSettings) -> float:
    """Return a module's scaling from its alpha, or else from the metadata's settings; 1 without either."""
    if alpha is not None:
        return tensors.number(alpha) / rank
    stated = settings.rank_and_scaling(name)
    if stated is None:
        return 1.0
    if stated[0] != rank:
        raise FormatError(
            f"{tensors.label}: module {name!r}: has rank {rank}, but the settings in the metadata state "
            f"{stated[0]}"
        )
    return stated[1]


def _bias(tensors: Tensors, name: str, key: str, outputs: int) -> np.ndarray[Any, Any]:
    """Read the bias that is added to the output of B before scaling."""
    shape = tensors.shapes()[key]
    if shape != (outputs,):
        raise FormatError(
            f"{tensors.label}: module {name!r}: a bias of shape {list(shape)} does not fit {outputs} outputs"
        )
    vector: np.ndarray[Any, Any] = tensors.matrix(key, 1, outputs).to_array()[0]
    return vector


@dataclass(frozen=True, slots=True)
class KernelFactors:
    """The factors of a convolution that is stored as ``up * mid * down``: mid is folded into A.

    Attributes
    ----------
    stored
        The stored tensors ``up`` and ``down``.
    mid_key
        Name of the tensor ``mid``.
    mid, down
        Shapes of ``mid (r, s, kh, kw)`` and ``down (s, in, 1, 1)``.
    """

    stored: TensorFactors
    mid_key: str
    mid: tuple[int, ...]
    down: tuple[int, ...]

    def __call__(self) -> Sequence[Pair]:
        """Return ``B (out, r)`` and ``A (r, in * kh * kw)``."""
        tensors = self.stored.tensors
        kernel = tensors.matrix(self.mid_key, self.mid[0], math.prod(self.mid[1:])).to_array()
        down = tensors.matrix(self.stored.a_key, self.down[0], self.down[1]).to_array()
        folded: np.ndarray[Any, Any] = np.einsum(
            "rskl,si->rikl", kernel.reshape(self.mid).astype(np.float64), down
        )
        return [(self.stored.b, arrays.matrix(folded.reshape(self.mid[0], -1)))]


def with_kernels(adapter: AdapterContent, base: BaseWeights) -> AdapterContent:
    """Return an adapter whose flat convolutions of LoHa and LoKr have the base model's kernel shapes."""
    modules = {}
    for name, module in adapter.modules.items():
        if isinstance(module.factors, ProductFactors) and module.kind == "linear":
            path = (
                base.unflattened(re.sub(r"^lora_(?:unet|transformer)_", "", name)) or name.partition(".")[2]
            )
            if kernel := base.kernel(path, module.shape[1]):
                module = replace(module, kind="conv", a_tail=kernel, b_tail=(1,) * (len(kernel) - 1))
        modules[name] = module
    return replace(adapter, modules=modules)
