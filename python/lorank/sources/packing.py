"""Finds packed weights and their parts among the tensors of a checkpoint.

This module also counts the parameters of a model, because the number of parameters of a packed weight differs
from the number of elements of its codes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorank.modules import naming
from lorank.sources.codes import INTEGERS, SCALES, Packed, TensorSpec, element_type, little_endian
from lorank.sources.quantization import Quantization
from lorank.sources.schemes import Scheme, schemes_of

# Names of tensors that accompany codes, for all libraries. They are recognised only beside codes.
_PART = re.compile(r"scal|zero|absmax|amax|quant|SCB|_idx|_shape|bitsandbytes__")
_SCALE = re.compile(r"scal|absmax|amax|SCB|SU|SV|suh|svh")

# Names that occur only in quantized checkpoints, for parts whose codes are in another file.
_UNMISTAKABLE = re.compile(
    r"(weight|\w+_proj)_(scale|scale_inv|scale_2|global_scale|zero_point|g_idx)|weight_shape|qzeros|g_idx|qscale_\w+"
    r"|scale_(weight|input)|(nested_)?(absmax|quant_map)|SCB|(input|output)_(scale|global_scale|zero_point)|(\w+_)?scales"
)

# Scales of the key-value cache, and the marker of ComfyUI's files.
_OF_THE_MODEL = re.compile(
    r"(.*\.)?([kvq]|kv|kv_cache|[kvq]_cache|prob\w*)_(scale|zero_point)|(.*\.)?scaled_fp8"
)

_SMALL = 1 << 16
"""Largest number of elements in a tensor that is read to find a shape."""

_FLOATS = frozenset({"f64", "f32", "f16", "bf16", "fp8", "fp4"})


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of a packed weight.

    Attributes
    ----------
    weight
        The full name of the weight.
    scheme
        The scheme by which it is packed.
    shape
        The true shape of the weight; one dimension if only the number of its values is known, None if that
        number is unknown, too.
    """

    weight: str
    scheme: Scheme
    shape: tuple[int, ...] | None

    @property
    def num_parameters(self) -> int | None:
        """Number of values of the weight; None if the checkpoint does not state it."""
        return None if self.shape is None else int(np.prod(self.shape, dtype=object))


@dataclass(frozen=True, slots=True)
class Part:
    """A scale, zero point, table or the like of a packed weight.

    Attributes
    ----------
    weight
        The full name of the weight; empty if the weight is in another file.
    scheme
        The name of the scheme.
    is_scale
        True for a scale, judged by its name.
    """

    weight: str
    scheme: str
    is_scale: bool


class Packing:
    """The packed weights of a checkpoint.

    Parameters
    ----------
    tensors
        Element type and shape of every tensor by its name.
    quantization
        The quantization that the configuration declares.
    content
        A function that returns the bytes of a small tensor by its name; None if they cannot be read.
    metadata
        The metadata of the files.

    Attributes
    ----------
    codes
        The codes of packed weights by the name of the tensor.
    parts
        The other parts of packed weights by the name of the tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        quantization: Quantization,
        content: Callable[[str], bytes | None] = lambda _: None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = {
            name: TensorSpec(element_type(dtype), shape) for name, (dtype, shape) in tensors.items()
        }
        self._sorted = sorted(self._tensors)
        self._quantization = quantization
        self._content = content
        self._metadata = metadata or {}
        self.codes: dict[str, Codes] = {}
        self.parts: dict[str, Part] = {}
        for name in self._tensors:
            self._find(name)
        for name in self.parts.keys() & self.codes.keys():
            del self.codes[name]
        if self.codes or quantization.is_declared:
            for name in self._tensors.keys() - self.codes.keys() - self.parts.keys():
                self._find_alone(name)

    def packed(self, name: str) -> Packed:
        """Return the tensor of codes of a packed weight, with access to the tensors beside it."""
        return self._packed(name, self.codes[name].weight)

    def decode(self, name: str, shape: tuple[int, ...]) -> None:
        """Treat a packed weight as a plain one, under its own name and with the given shape."""
        weight = self.codes.pop(name).weight
        self._tensors[weight] = TensorSpec("f32", shape)

    def reason(self, name: str) -> str | None:
        """Return the reason for skipping a tensor of a file; None for tensors that are not packed."""
        if (codes := self.codes.get(name)) is not None:
            live = "; load the model and analyse it live" if codes.scheme.is_live else ""
            return f"packed ({codes.scheme.name}): its values cannot be decoded from this source{live}"
        return self.part_reason(name)

    def part_reason(self, name: str) -> str | None:
        """Return the reason for skipping a part of a packed weight; None for other tensors."""
        if (part := self.parts.get(name)) is None:
            return None
        noun = "scale" if part.is_scale else "part"
        if not part.weight:
            return f"{noun} of packed weights ({part.scheme})"
        return f"{noun} of the packed weight {part.weight} ({part.scheme})"

    def parameters(self, name: str) -> int | str:
        """Return the number of parameters that a tensor encodes, or the reason why it is unknown."""
        if name in self.parts:
            return 0
        stored = self._tensors[name]
        if (codes := self.codes.get(name)) is not None:
            number = codes.num_parameters
            if number is None:
                return f"{name} is packed ({codes.scheme.name}), and nothing beside it states its size"
            return number
        if stored.type in _FLOATS:
            return stored.size
        is_weight = name.endswith(".weight") and len(stored.shape) > 1
        is_stack = naming.is_in_experts(name) and len(stored.shape) > 2
        if stored.type in INTEGERS and (is_weight or is_stack):
            return f"{name} holds {stored.type} codes of an unknown scheme"
        return 0

    def _find(self, name: str) -> None:
        """Record a tensor as codes, with the parts beside it, if a scheme explains it."""
        stored = self._tensors[name]
        if stored.size == 0:
            return
        is_part = _PART.search(name.rpartition(".")[2]) is not None
        candidates: dict[str, Packed] = {}
        for scheme in schemes_of(stored.type):
            weight = _weight_named(name, scheme.codes)
            if weight is None or (is_part and weight == name):
                continue
            if weight not in candidates:
                candidates[weight] = self._packed(name, weight)
            packed = candidates[weight]
            if scheme.holds(packed):
                self.codes[name] = Codes(weight, scheme, scheme.shape(packed))
                for part in self._parts_of(packed, scheme):
                    is_scale = _SCALE.search(part.rpartition(".")[2]) is not None
                    self.parts.setdefault(part, Part(weight, scheme.name, is_scale))
                return

    def _packed(self, name: str, weight: str) -> Packed:
        """Return a tensor as a candidate for the codes of a weight."""
        packed = Packed(
            name, weight, self._tensors[name], self._tensors, self._quantization, self._numbers, self._text
        )
        if packed.codes.type not in INTEGERS | {"fp8", "fp4", "fp4x2"}:
            return packed
        scale = packed.find(*SCALES)
        has_scales = scale is not None or any("scal" in sibling for sibling in self._beside(packed))
        return replace(packed, has_scales=has_scales, scale=scale)

    def _parts_of(self, packed: Packed, scheme: Scheme) -> Iterator[str]:
        """Yield the names of the parts of a packed weight."""
        # `_beside` finds scales by the prefix of the module. A weight outside any module has no prefix.
        marks = () if scheme.marks is SCALES and packed.module else scheme.marks
        for template in (*marks, *scheme.parts):
            if (name := packed.named(template)) in self._tensors and name != packed.name:
                yield name
        yield from self._beside(packed)

    def _beside(self, packed: Packed) -> Iterator[str]:
        """Yield the names of the tensors that accompany the codes of a packed weight."""
        prefixes = {packed.weight}
        if packed.module and packed.module != packed.weight:
            prefixes.add(f"{packed.module}.")
        for prefix in prefixes:
            for position in range(bisect_left(self._sorted, prefix), len(self._sorted)):
                name = self._sorted[position]
                if not name.startswith(prefix):
                    break
                rest = name[len(prefix) :]
                is_beside = rest[:1] in ("_", ".") if prefix == packed.weight else "." not in rest
                if is_beside and name != packed.name and _PART.search(rest):
                    yield name

    def _find_alone(self, name: str) -> None:
        """Record a tensor that belongs to the whole model, or a part whose codes are in another file."""
        scheme = self._quantization.method or "quantized"
        leaf = name.rpartition(".")[2]
        is_part = _OF_THE_MODEL.fullmatch(name) is not None
        if is_part or (self._quantization.is_declared and _UNMISTAKABLE.fullmatch(leaf)):
            self.parts[name] = Part("", scheme, bool(_SCALE.search(leaf)))

    def _numbers(self, name: str) -> list[int] | None:
        """Return the numbers in a small tensor of integers; None if they cannot be read."""
        stored = self._tensors[name]
        dtype = little_endian(stored.type)
        content = self._content(name) if dtype is not None and stored.size <= _SMALL else None
        if dtype is None or content is None or len(content) != stored.size * dtype.itemsize:
            return None
        return [int(number) for number in np.frombuffer(content, dtype=dtype)]

    def _text(self, name: str) -> str | None:
        """Return the text in the metadata or in a small tensor of bytes; None if it cannot be read."""
        if name in self._metadata:
            return self._metadata[name]
        stored = self._tensors.get(name)
        if stored is None or stored.type != "u8" or stored.size > _SMALL:
            return None
        content = self._content(name)
        return None if content is None else content.decode("utf-8", "replace")


def total(counts: Iterable[int | str]) -> tuple[int | None, str]:
    """Return the sum of numbers of parameters; None and the reason if one number is unknown."""
    number = 0
    for count in counts:
        if isinstance(count, str):
            return None, count
        number += count
    return number, ""


def _weight_named(name: str, template: str) -> str | None:
    """Return the name of the weight, from the name of its codes; None if that does not fit the template."""
    if template == "{w}":
        return name
    if template == "{p}._{l}_qdata":
        parent, _, leaf = name.rpartition(".")
        if not (leaf.startswith("_") and leaf.endswith("_qdata")):
            return None
        own = leaf[1 : -len("_qdata")]
        return f"{parent}.{own}" if parent else own
    ending = template[3:]
    if template.startswith("{w}"):
        return name.removesuffix(ending) if name.endswith(ending) and name != ending else None
    if name == ending.removeprefix("."):
        return "weight"
    return f"{name.removesuffix(ending)}.weight" if name.endswith(ending) else None
