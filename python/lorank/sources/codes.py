"""Tensors of codes, and the names and element types of the tensors that describe them.

Names of tensors are given as templates: ``{w}`` is the full name of the weight (``layers.0.q_proj.weight``,
or ``layers.0.mlp.experts.gate_up_proj`` for a stack), ``{m}`` the name of its module, ``{p}`` and ``{l}`` the
parts of ``{w}`` before and after its last dot.
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
        """The last dimension; 0 for a scalar."""
        return self.shape[-1] if self.shape else 0


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor of codes, and access to the tensors that describe it.

    Attributes
    ----------
    name
        The name of the tensor.
    weight
        The full name of the weight that the codes encode.
    codes
        Element type and shape of the codes.
    tensors
        Element type and shape of every tensor of the checkpoint by its name.
    quantization
        The quantization that the model's configuration declares.
    values
        A function that returns the numbers in a small tensor of integers by its name; None if they cannot be
        read.
    text
        A function that returns the text in a small tensor of bytes, or in the file's metadata, by name.
    has_scales
        True if a tensor beside the codes has a name with "scale" or the like.
    scale
        The scales, if their name is one of `SCALES`.
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
        """The name of the module that holds the weight."""
        return module_of(self.weight)

    def named(self, template: str) -> str:
        """Fill a template with the names of this weight."""
        return name_of(template, self.weight)

    def find(self, *templates: str) -> TensorSpec | None:
        """Return the tensor of the first template that the checkpoint holds; None if it holds none."""
        for template in templates:
            if (found := self.tensors.get(self.named(template))) is not None:
                return found
        return None

    def numbers(self, template: str) -> tuple[int, ...]:
        """Return the numbers in a small tensor; an empty tuple unless all are positive."""
        name = self.named(template)
        found = self.values(name) if name in self.tensors else None
        return tuple(found) if found and all(number > 0 for number in found) else ()

    @property
    def bits(self) -> int | None:
        """Number of bits per code, by the configuration; None if unknown."""
        return self.quantization.bits(self.module)


def module_of(weight: str) -> str:
    """Return the module of a weight: the name without ``.weight``; a stack of experts keeps its name."""
    return weight.removesuffix(".weight") if weight != "weight" else ""


def name_of(template: str, weight: str) -> str:
    """Fill a template with the names of a weight.

    Examples
    --------
    >>> name_of("{m}.scales", "layers.0.q_proj.weight")
    'layers.0.q_proj.scales'
    >>> name_of("{p}._{l}_qdata", "layers.0.q_proj.weight")
    'layers.0.q_proj._weight_qdata'
    """
    start, rest = template[:3], template[3:]
    if start == "{w}":
        return weight + rest
    if start == "{m}":
        return (module_of(weight) + rest).removeprefix(".")
    parent, _, leaf = weight.rpartition(".")
    return (parent + rest.replace("{l}", leaf)).removeprefix(".")


Shape = tuple[int, ...]
"""The shape of a weight; one dimension if only the number of its values is known."""

INTEGER_BITS = {"i8": 8, "u8": 8, "i16": 16, "u16": 16, "i32": 32, "u32": 32, "i64": 64, "u64": 64}
"""Bits of integers by element type."""

ELEMENT_BITS = {**INTEGER_BITS, "fp8": 8, "e8m0": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
"""Bits by element type."""

INTEGERS = frozenset(INTEGER_BITS)
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
"""Templates of the names of scales, over all libraries."""


def element_type(dtype: str) -> str:
    """Return one name for an element type that safetensors, torch and NumPy spell in different ways.

    Examples
    --------
    >>> element_type("BF16"), element_type("bfloat16"), element_type("F8_E4M3")
    ('bf16', 'bf16', 'fp8')
    """
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
    """Return the little-endian NumPy type of an integer element type; None for other types."""
    return np.dtype(f"<{type_[0]}{INTEGER_BITS[type_] // 8}") if type_ in INTEGER_BITS else None
