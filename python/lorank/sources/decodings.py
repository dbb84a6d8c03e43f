"""Describes to the core how a packed weight of a file is decoded: scheme, tensors by role, and settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from lorank._core import gguf_types
from lorank.sources.codes import SCALES, Packed, Shape


@dataclass(frozen=True, slots=True)
class Decoding:
    """The decoding of a packed weight by the core.

    Attributes
    ----------
    scheme
        The name of the scheme in the core.
    parts
        The names of the weight's tensors by their role.
    shape
        The shape of the decoded weight.
    settings
        Numbers that the scheme needs besides the tensors.
    """

    scheme: str
    parts: Mapping[str, str]
    shape: Shape
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def unit(self) -> tuple[int, int]:
        """Shape of one matrix: the weight, an expert of a stack, or a flattened kernel."""
        if len(self.shape) == 3:
            return self.shape[1], self.shape[2]
        return self.shape[0], math.prod(self.shape[1:])


def decoding(packed: Packed, scheme: str, shape: Shape | None) -> Decoding | None:
    """Return the decoding of a packed weight; None if the core has no formula or a tensor is missing.

    Parameters
    ----------
    packed
        The codes and the tensors beside them.
    scheme
        The name of the scheme in `SCHEMES`.
    shape
        The true shape of the weight.
    """
    describe = _DECODINGS.get(scheme)
    return None if describe is None or shape is None or len(shape) < 2 else describe(packed, shape)


def _parts(packed: Packed, codes: str, **templates: tuple[str, ...]) -> dict[str, str] | None:
    """Return the names of tensors by role; None if one is missing. Roles that end with `_` are optional."""
    found = {"codes": codes}
    for role, names in templates.items():
        name = next((name for x in names if (name := packed.named(x)) in packed.tensors), None)
        if name is not None:
            found[role.removesuffix("_")] = name
        elif not role.endswith("_"):
            return None
    return found


def _numbers(packed: Packed, shape: Shape, scheme: str, *, has_blocks: bool = False) -> Decoding | None:
    """Return the decoding of codes of 8 bits that are numbers."""
    parts = _parts(packed, packed.name, scales=SCALES, zeros_=("{w}_zero_point",))
    if parts is None or len(shape) > 3:
        return None
    block = packed.quantization.block_size if has_blocks else None
    settings = {} if block is None else {"block_rows": block[0], "block_cols": block[1]}
    return Decoding(scheme, parts, shape, settings)


def _mxfp4(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of 4-bit floats; gpt-oss stores the transpose of its parameters, in blocks."""
    parts = _parts(packed, packed.name, scales=("{w}_scales", *SCALES))
    if parts is None or len(shape) > 3 or packed.find("{w}_zero_point") is not None:
        return None
    if packed.codes.type not in ("u8", "i8"):
        return None
    if not packed.name.endswith("_blocks"):
        return Decoding("mxfp4", parts, shape)
    return Decoding("mxfp4", parts, (*shape[:-2], shape[-1], shape[-2]), {"transposed": 1})


def _nvfp4(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of 4-bit floats with two levels of scales."""
    if len(shape) > 3 or packed.find("{w}_zero_point") is not None:
        return None
    divided = _parts(packed, packed.name, scales=SCALES, overall=("{w}_global_scale",))
    if divided is not None:
        return Decoding("nvfp4-divide", divided, shape)
    multiplied = _parts(packed, packed.name, scales=SCALES, overall=("{w}_scale_2", "{w}_weight_scale_2"))
    return None if multiplied is None else Decoding("nvfp4-multiply", multiplied, shape)


def _pack_quantized(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of integers in words of 32 bits."""
    parts = _parts(
        packed,
        packed.name,
        scales=("{w}_scale",),
        zeros_=("{w}_zero_point",),
        order_=("{w}_g_idx",),
    )
    words, cols = packed.codes.last, shape[-1]
    fitting = [bits for bits in range(1, 9) if -(-cols * bits // 32) == words]
    declared = packed.quantization.all_bits(packed.module)
    bits = next((b for b in fitting if b in declared), fitting[0] if len(fitting) == 1 else None)
    if parts is None or bits is None or len(shape) > 3:
        return None
    scales = packed.tensors[parts["scales"]]
    return Decoding("packed-integers", parts, shape, {"bits": bits, **_group(packed, cols, scales.last)})


def _group(packed: Packed, size: int, count: int) -> dict[str, float]:
    """Return the declared size of a group if it divides `size` into `count` groups."""
    declared = sorted(packed.quantization.group_sizes(packed.module))
    fitting = [group for group in declared if -(-size // group) == count]
    return {"group_size": fitting[0]} if fitting and count > 1 else {}


def _gptq(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of integers that are packed along `in`; version 2 stores exact zero points."""
    layout = packed.quantization.layout
    parts = _parts(packed, packed.name, scales=("{m}.scales",), zeros=("{m}.qzeros",), order_=("{m}.g_idx",))
    if parts is None or packed.codes.type != "i32" or layout not in ("", "gptq", "gptq_v2"):
        return None
    *_, words, _ = packed.codes.shape
    bits, rest = divmod(32 * words, shape[-1])
    if rest or bits not in (2, 3, 4, 8):
        return None
    groups = packed.tensors[parts["scales"]].shape
    settings = {"bits": bits, **_group(packed, shape[-1], groups[-2] if len(groups) > 1 else 1)}
    return Decoding("gptq", parts, shape, settings | ({"zeros_are_exact": 1} if layout == "gptq_v2" else {}))


def _awq(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of integers that are packed along `out`."""
    parts = _parts(packed, packed.name, scales=("{m}.scales",), zeros=("{m}.qzeros",))
    is_four = packed.codes.type == "i32" and 8 * packed.codes.last == shape[-2]
    if parts is None or not is_four or packed.quantization.layout not in ("", "gemm"):
        return None
    groups = packed.tensors[parts["scales"]].shape
    return Decoding("awq", parts, shape, _group(packed, shape[-1], groups[-2] if len(groups) > 1 else 1))


def _bitsandbytes(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of codes that are positions in a table, by their stored state."""
    parts = _parts(
        packed,
        packed.name,
        absmax=("{w}.absmax",),
        map=("{w}.quant_map",),
        nested_absmax_=("{w}.nested_absmax",),
        nested_map_=("{w}.nested_quant_map",),
    )
    state = _state(packed)
    if parts is None or not state:
        return None
    names = {"block_size": "blocksize", "nested_block_size": "nested_blocksize", "offset": "nested_offset"}
    settings = {
        name: float(state[key])
        for name, key in names.items()
        if type(state.get(key)) in (int, float) and math.isfinite(state[key])
    }
    return Decoding("bitsandbytes-4bit", parts, shape, settings)


def _state(packed: Packed) -> dict[str, float]:
    """Return the state of a weight of bitsandbytes; empty if it cannot be read."""
    for kind in ("nf4", "fp4"):
        text = packed.text(packed.named(f"{{w}}.quant_state.bitsandbytes__{kind}"))
        try:
            found = json.loads(text) if text else None
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _int8(packed: Packed, shape: Shape) -> Decoding | None:
    """Return the decoding of bitsandbytes' integers of 8 bits."""
    parts = _parts(packed, packed.name, scales=("{m}.SCB",))
    return None if parts is None else Decoding("bitsandbytes-int8", parts, shape)


_DECODINGS: Mapping[str, Callable[[Packed, Shape], Decoding | None]] = {
    "MXFP8": partial(_numbers, scheme="fp8"),
    "fp8 with one scale": partial(_numbers, scheme="fp8"),
    "fp8 with row scales": partial(_numbers, scheme="fp8"),
    "fp8 with block scales": partial(_numbers, scheme="fp8", has_blocks=True),
    "int8 with scales": partial(_numbers, scheme="int8"),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "pack-quantized integers": _pack_quantized,
    "GPTQ": _gptq,
    "AWQ": _awq,
    "bitsandbytes nf4": _bitsandbytes,
    "bitsandbytes fp4": _bitsandbytes,
    "bitsandbytes int8": _int8,
}
"""The function that describes the decoding, by the name of the scheme."""

GGUF_TYPES = frozenset(gguf_types())
"""The block types of GGUF files that can be decoded."""

DECODED = frozenset(_DECODINGS) | GGUF_TYPES
"""The names of schemes and block types whose weights can be decoded from files."""
