"""A tensor of codes among the tensors of its checkpoint.

Names of tensors are templates: ``{w}`` is the weight's full name (``layers.0.q_proj.weight``, or
``layers.0.mlp.experts.gate_up_proj`` of a stack), ``{m}`` its module, ``{p}`` and ``{l}`` the part of
``{w}`` before its last dot and the part behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lorank.sources.quantization import Quantization


class TensorSpec(NamedTuple):
    """The element type (a name of `element_type`) and the shape of a stored tensor."""

    type: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def last(self) -> int:
        """The last dimension; 0 for a single number."""
        return self.shape[-1] if self.shape else 0


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor of codes, and access to the tensors that describe it.

    Attributes
    ----------
    name
        The tensor's name.
    weight
        The full name of the weight that it stands for.
    codes
        Its type and shape.
    tensors
        Every tensor of the checkpoint.
    quantization
        The quantization that the model's configuration declares.
    values
        Returns the numbers in a small tensor of integers, by name; None where they cannot be read.
    text
        Returns the text in a small tensor of bytes, or in the file's metadata, by name.
    has_scales
        True where any tensor beside the codes has a name with "scale" or the like.
    scale
        The scales, if they have one of the names in `SCALES`.
    """

    name: str
    weight: str
    codes: TensorSpec
    tensors: Mapping[str, TensorSpec]
    quantization: Quantization
    values: Callable[[str], list[int] | None]
    text: Callable[[str], str | None]
    has_scales: bool = False
    scale: TensorSpec | None = None

    @property
    def module(self) -> str:
        """The name of the module whose weight it is."""
        return module_of(self.weight)

    def named(self, template: str) -> str:
        """Return the name that a template stands for."""
        return name_of(template, self.weight)

    def find(self, *templates: str) -> TensorSpec | None:
        """Return the first of some tensors that the checkpoint holds."""
        for template in templates:
            if (found := self.tensors.get(self.named(template))) is not None:
                return found
        return None

    def numbers(self, template: str) -> tuple[int, ...]:
        """Return the numbers in a small tensor; none where one of them is not positive."""
        name = self.named(template)
        found = self.values(name) if name in self.tensors else None
        return tuple(found) if found and all(number > 0 for number in found) else ()

    @property
    def bits(self) -> int | None:
        """Bits of a code, by the configuration."""
        return self.quantization.bits(self.module)


def module_of(weight: str) -> str:
    """Return the module of a weight: the name without ``.weight``; a stack of experts is named by itself."""
    return weight.removesuffix(".weight") if weight != "weight" else ""


def name_of(template: str, weight: str) -> str:
    """Return the name that a template stands for, beside a weight of that full name."""
    start, rest = template[:3], template[3:]
    if start == "{w}":
        return weight + rest
    if start == "{m}":
        return (module_of(weight) + rest).removeprefix(".")
    parent, _, leaf = weight.rpartition(".")
    return (parent + rest.replace("{l}", leaf)).removeprefix(".")


Shape = tuple[int, ...]
"""The shape of a weight; of one dimension where only the number of its values is known."""

WORDS = {"i8": 8, "u8": 8, "i16": 16, "u16": 16, "i32": 32, "u32": 32, "i64": 64, "u64": 64}
"""Bits of integers, by element type."""

WIDTHS = {**WORDS, "fp8": 8, "e8m0": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
"""Bits of element types."""

INTEGERS = frozenset(WORDS)
"""Element types of integers."""

EXPONENTS = frozenset({"u8", "e8m0"})
"""Element types of scales that are powers of two."""

SCALES = (
    "{w}_scale_inv",
    "{w}_scale",
    "{w}_scales",
    "{w}_weight_scale",
    "{w}_weight_scale_inv",
    "{m}.scale",
    "{m}.scales",
    "{m}.scale_weight",
    "{m}.qscale_weight",
    "{w}_scaling_factor",
    "{w}s_scaling_factor",
    "{w}_quantizer.scale",
)
"""Names of the scales of a tensor of codes, over all libraries."""


def element_type(dtype: str) -> str:
    """Return one name for an element type that safetensors, torch and NumPy spell in different ways."""
    name = dtype.lower().replace("_", "")
    if name in ("f8e4m3", "f8e5m2") or (name.startswith(("float8e4m3", "float8e5m2", "f8e4m3", "f8e5m2"))):
        return "fp8"
    if name.endswith(("e8m0", "e8m0fnu")):
        return "e8m0"
    if name in ("f4", "float4e2m1fn"):
        return "fp4"
    if name == "float4e2m1fnx2":
        return "fp4x2"
    return name.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")


def little_endian(type_: str) -> np.dtype[np.generic] | None:
    """Return NumPy's type of the integers of that name; None for others."""
    return np.dtype(f"<{type_[0]}{WORDS[type_] // 8}") if type_ in WORDS else None
