"""The schemes by which checkpoints pack weights: one row a scheme, in the order in which they are tried.

Names of tensors are templates: ``{w}`` is the weight's full name (``layers.0.q_proj.weight``, or
``layers.0.mlp.experts.gate_up_proj`` of a stack), ``{m}`` its module, ``{p}`` and ``{l}`` the part of
``{w}`` before its last dot and the part behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lorank.sources.quantization import Quantization


class Stored(NamedTuple):
    """The element type, as `element_type` names it, and the shape of a stored tensor."""

    type: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def last(self) -> int:
        """The last dimension; 0 of a single number."""
        return self.shape[-1] if self.shape else 0


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor of codes and access to what describes it.

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
        What the model's configuration declares.
    values
        Returns the numbers in a small tensor of integers, by name; None where they cannot be had.
    text
        Returns the text in a small tensor of bytes, or in the file's metadata, by name.
    has_scales
        True where a tensor beside the codes is called a scale, by whatever name.
    """

    name: str
    weight: str
    codes: Stored
    tensors: Mapping[str, Stored]
    quantization: Quantization
    values: Callable[[str], list[int] | None]
    text: Callable[[str], str | None]
    has_scales: bool = False

    @property
    def module(self) -> str:
        """The name of the module whose weight it is."""
        return self.weight.removesuffix(".weight") if self.weight != "weight" else ""

    def named(self, template: str) -> str:
        """The name that a template stands for."""
        parent, _, leaf = self.weight.rpartition(".")
        name = template.format(w=self.weight, m=self.module, p=parent, l=leaf)
        return name.removeprefix(".")

    def find(self, *templates: str) -> Stored | None:
        """The first of some tensors that the checkpoint holds."""
        for template in templates:
            if (found := self.tensors.get(self.named(template))) is not None:
                return found
        return None

    def numbers(self, template: str) -> tuple[int, ...]:
        """The numbers in a small tensor; empty where there are none, or one is not positive."""
        name = self.named(template)
        found = self.values(name) if name in self.tensors else None
        return tuple(found) if found and all(number > 0 for number in found) else ()

    @property
    def bits(self) -> int | None:
        """Bits of a code, by the configuration."""
        return self.quantization.bits(self.module)


Shape = tuple[int, ...]
"""The shape of a weight; of one dimension where only the number of its values is known."""

_WORDS = {"i8": 8, "u8": 8, "i16": 16, "u16": 16, "i32": 32, "u32": 32, "i64": 64, "u64": 64}
_WIDTHS = {**_WORDS, "fp8": 8, "e8m0": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_INTEGERS = frozenset(_WORDS)

SCALES = (
    "{w}_scale_inv",
    "{w}_scale",
    "{w}_scales",
    "{m}.scale",
    "{m}.scales",
    "{m}.scale_weight",
    "{m}.qscale_weight",
    "{w}_scaling_factor",
    "{w}s_scaling_factor",
    "{w}_quantizer.scale",
)
"""Where the scales of a tensor of codes are, over all libraries."""


def _as_stored(packed: Packed) -> Shape | None:
    return packed.codes.shape


def _twice_as_wide(packed: Packed) -> Shape | None:
    *rest, last = packed.codes.shape
    return (*rest, 2 * last)


def _blocks(packed: Packed) -> Shape | None:
    *rest, groups, size = packed.codes.shape
    return (*rest, 2 * groups * size)


def _four_times_as_high(packed: Packed) -> Shape | None:
    first, *rest = packed.codes.shape
    return (4 * first, *rest)


def _twice_as_high(packed: Packed) -> Shape | None:
    first, *rest = packed.codes.shape
    return (2 * first, *rest)


def _flat(packed: Packed, bits: int | None) -> Shape | None:
    """The number of codes of so many bits that the tensor's bytes hold."""
    width = _WIDTHS.get(packed.codes.type)
    if bits is None or width is None:
        return None
    # Three bits do not divide a word: ten codes share 32 bits.
    per_word = 10 if (bits, width) == (3, 32) else width // bits if width % bits == 0 else 0
    return (packed.codes.size * per_word,) if per_word else None


def _bitsandbytes(packed: Packed) -> Shape | None:
    """The shape in the quantization state, if it fits the bytes; else two codes a byte."""
    count = packed.codes.size * _WIDTHS.get(packed.codes.type, 8) // 4
    for kind in ("nf4", "fp4"):
        text = packed.text(packed.named(f"{{w}}.quant_state.bitsandbytes__{kind}"))
        try:
            found = json.loads(text)["shape"] if text else None
            shape = tuple(int(size) for size in found or ())
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if shape and min(shape) > 0 and count - 1 <= math.prod(shape) <= count:
            return shape
    return (count,)


def _pack_quantized(packed: Packed) -> Shape | None:
    """`weight_shape` if it fits the words; else by the bits of the configuration, where they fill words."""
    *rest, words = packed.codes.shape
    stored = packed.numbers("{w}_shape")
    if (
        len(stored) == len(packed.codes.shape)
        and list(stored[:-1]) == rest
        and words <= stored[-1] <= 32 * words
    ):
        return stored
    bits = packed.bits
    return (*rest, words * 32 // bits) if bits and 32 % bits == 0 else None


def _gptq(packed: Packed) -> Shape | None:
    """``(out, in)``: `in` by the column indices, or by the bits of the zero points or the configuration."""
    *rest, words, out = packed.codes.shape
    width = _WORDS[packed.codes.type]
    indices, zeros = packed.find("{m}.g_idx"), packed.find("{m}.qzeros")
    if indices is not None and words < indices.last <= words * width:
        return (*rest, out, indices.last)
    bits = packed.bits
    if zeros is not None and (width * zeros.last) % out == 0:
        found = width * zeros.last // out
        bits = found if 2 <= found <= 8 else bits
    return (*rest, out, words * width // bits) if bits else None


def _is_awq(packed: Packed) -> bool:
    scales = packed.find("{m}.scales")
    if scales is None or len(scales.shape) != len(packed.codes.shape):
        return packed.quantization.method == "awq"
    return scales.last != packed.codes.last


def _awq(packed: Packed) -> Shape | None:
    """``(out, in)`` where words run along `out`; other layouts by their number of codes."""
    *rest, rows, words = packed.codes.shape
    scales, width = packed.find("{m}.scales"), _WORDS[packed.codes.type]
    if scales is not None and scales.size and scales.last % words == 0 and width * words >= 2 * scales.last:
        return (*rest, scales.last, rows)
    return _flat(packed, packed.bits or 4)


def _hqq(packed: Packed) -> Shape | None:
    stored, bits = packed.numbers("{m}.shape"), packed.numbers("{m}.nbits")
    capacity = packed.codes.size * _WIDTHS.get(packed.codes.type, 8)
    if stored and math.prod(stored) <= capacity:
        return stored
    return _flat(packed, bits[0] if bits else packed.bits)


def _torchao(packed: Packed) -> Shape | None:
    """By the class in the file's metadata: packed classes keep their shape there."""
    if packed.codes.type == "fp8":
        return packed.codes.shape
    try:
        state = json.loads(packed.text(packed.weight) or "")
        kind, data = state["_type"], state["_data"]
        shape = tuple(int(size) for size in data.get("shape") or ())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if shape and 0 < math.prod(shape) <= 8 * packed.codes.size * _WIDTHS.get(packed.codes.type, 8):
        return shape
    return packed.codes.shape if kind.startswith("Int8") else None


def _quanto(packed: Packed) -> Shape | None:
    return packed.codes.shape if packed.codes.type in ("i8", "fp8") else _flat(packed, packed.bits)


def _aqlm(packed: Packed) -> Shape | None:
    books, codes = packed.find("{m}.codebooks"), packed.codes.shape
    if books is None or len(books.shape) != 4 or len(codes) < 2:
        return None
    return codes[0] * books.shape[2], codes[1] * books.shape[3]


def _vptq(packed: Packed) -> Shape | None:
    return packed.quantization.features(packed.module)


def _higgs(packed: Packed) -> Shape | None:
    """``(out bits / 16, in)`` words; the table has a value for every code."""
    table = packed.find("{m}.tables")
    bits = table.size.bit_length() - 1 if table is not None else 0
    rows, cols = packed.codes.shape
    return (rows * 16 // bits, cols) if bits else None


def _quip(packed: Packed) -> Shape | None:
    out, fan_in = packed.find("{m}.SV"), packed.find("{m}.SU")
    return (out.size, fan_in.size) if out is not None and fan_in is not None else None


def _exl2(packed: Packed) -> Shape | None:
    order = packed.find("{m}.q_perm", "{m}.q_invperm")
    return (packed.codes.shape[-1], order.size) if order is not None else None


def _exl3(packed: Packed) -> Shape | None:
    tiles_in, tiles_out, *_ = packed.codes.shape
    return 16 * tiles_out, 16 * tiles_in


def _mlx(packed: Packed) -> Shape | None:
    *rest, words = packed.codes.shape
    bits, scales = packed.bits, packed.find("{m}.scales")
    if (
        bits is None and scales is not None and scales.type == "u8"
    ):  # Floats of 4 bits, or of 8 with 32 a scale.
        bits = 8 if words == 8 * scales.last else 4
    return (*rest, words * 32 // bits) if bits else None


def _by_bits(packed: Packed) -> Shape | None:
    """Codes of the configuration's bits that fill bytes along the last dimension."""
    *rest, last = packed.codes.shape
    bits = packed.bits
    return (*rest, last * 8 // bits) if bits in (2, 4, 8) else None


def _scale(packed: Packed) -> Stored:
    return packed.find(*SCALES) or Stored("", ())


def _has_shared_exponents(packed: Packed) -> bool:
    """True where bytes hold the exponents of 32 codes each."""
    scale = _scale(packed)
    return scale.type in ("u8", "e8m0") and scale.shape[-1:] == (-(-packed.codes.shape[-1] // 32),)


def _has_four_bit_groups(packed: Packed) -> bool:
    """True where every scale is that of 32 codes of a row, two a byte."""
    scale = _scale(packed)
    return scale.shape[:-1] == packed.codes.shape[:-1] and 16 * scale.last == packed.codes.last


def _is_half_as_high(packed: Packed) -> bool:
    scale = _scale(packed)
    return len(scale.shape) == 2 and scale.shape[0] == 2 * packed.codes.shape[0]


def _has_one_scale(packed: Packed) -> bool:
    return _scale(packed).size == 1


def _has_scales_of_rows(packed: Packed) -> bool:
    """True where a scale holds for a whole row (or for a whole column of a transposed weight)."""
    *_, rows, cols = packed.codes.shape if len(packed.codes.shape) > 1 else (1, *packed.codes.shape)
    shape = [size for size in _scale(packed).shape if size != 1]
    shape = shape[1:] if len(packed.codes.shape) == 3 and shape[:1] == [packed.codes.shape[0]] else shape
    return not shape or shape in ([rows], [cols])


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way of packing weights.

    Attributes
    ----------
    name
        How messages call it.
    codes
        The template of the tensor of codes.
    types
        Element types of the codes; empty for any.
    marks
        Templates of which the checkpoint holds one at least; with none, the rest decides.
    shape
        The weight's true shape, or None where the checkpoint does not state it.
    fits
        What else must hold: of shapes, or of the configuration.
    parts
        Templates of further tensors that belong to the weight and have no "scale" or the like in
        their names.
    declared
        True for a configuration that makes the marks unnecessary: they may be in another file.
    is_live
        True where the weight of a loaded model can be had.
    """

    name: str
    codes: str
    types: frozenset[str]
    marks: tuple[str, ...]
    shape: Callable[[Packed], Shape | None]
    fits: Callable[[Packed], bool] = lambda _: True
    parts: tuple[str, ...] = ()
    declared: Callable[[Quantization], bool] = lambda _: False
    is_live: bool = True

    def holds(self, packed: Packed) -> bool:
        """True where this scheme explains the tensor; its name and type are known to fit."""
        least = 1 if self.codes == "{w}" else 2
        if len(packed.codes.shape) < least:
            return False
        is_marked = not self.marks or packed.find(*self.marks) is not None
        return (is_marked and self.fits(packed)) or self.declared(packed.quantization)


def _types(*names: str) -> frozenset[str]:
    return frozenset(names)


def _is_declared(quantization: Quantization) -> bool:
    return quantization.is_declared


def _by_method(*methods: str) -> Callable[[Quantization], bool]:
    return lambda quantization: quantization.method in methods


_BNB_PARTS = ("{w}.absmax", "{w}.quant_map", "{w}.nested_absmax", "{w}.nested_quant_map")
_NF4, _FP4 = "{w}.quant_state.bitsandbytes__nf4", "{w}.quant_state.bitsandbytes__fp4"
_BYTES, _FP8, _I8 = _types("i8", "u8"), _types("fp8"), _types("i8")
_VPTQ_PARTS = ("{m}.centroids.weight", "{m}.res_centroids.weight", "{m}.outlier_centroids.weight")

SCHEMES: tuple[Scheme, ...] = (
    Scheme("bitsandbytes nf4", "{w}", _types(), (_NF4,), _bitsandbytes, parts=(*_BNB_PARTS, _NF4)),
    Scheme("bitsandbytes fp4", "{w}", _types(), (_FP4,), _bitsandbytes, parts=(*_BNB_PARTS, _FP4)),
    Scheme(
        "bitsandbytes 4-bit",
        "{w}",
        _BYTES,
        ("{w}.absmax", "{w}.quant_map"),
        _bitsandbytes,
        parts=_BNB_PARTS,
        declared=lambda q: q.is_bitsandbytes_4bit,
    ),
    Scheme(
        "bitsandbytes int8",
        "{w}",
        _I8,
        ("{m}.SCB", "{w}_format"),
        _as_stored,
        parts=("{m}.SCB", "{w}_format"),
        declared=lambda q: q.is_bitsandbytes_8bit,
    ),
    Scheme(
        "MXFP4",
        "{w}_blocks",
        _types("u8"),
        ("{w}_scales",),
        _blocks,
        fits=lambda packed: len(packed.codes.shape) >= 3,
        declared=_by_method("mxfp4"),
    ),
    Scheme("NVFP4", "{w}_packed", _types("u8"), ("{w}_global_scale",), _twice_as_wide),
    Scheme("MXFP4", "{w}_packed", _types("u8"), ("{w}_scale",), _twice_as_wide, declared=_is_declared),
    Scheme(
        "2:4 sparse Marlin",
        "{w}_packed",
        _types("i32"),
        ("{m}.scale_packed", "{m}.meta"),
        lambda _: None,
        parts=("{m}.meta",),
        is_live=False,
    ),
    Scheme(
        "pack-quantized integers",
        "{w}_packed",
        _types("i32"),
        ("{w}_scale", "{w}_shape"),
        _pack_quantized,
        parts=("{w}_shape",),
        declared=_is_declared,
    ),
    Scheme(
        "2:4 sparse",
        "{w}.compressed",
        _types(),
        ("{w}.bitmask", "{w}.shape"),
        lambda packed: packed.numbers("{w}.shape") or None,
        parts=("{w}.bitmask", "{w}.shape", "{w}.row_offsets"),
        is_live=False,
    ),
    Scheme(
        "FP-Quant",
        "{m}.qweight",
        _types("u8"),
        ("{m}.scales",),
        _twice_as_wide,
        parts=("{m}.forward_hadamard_matrix", "{m}.backward_hadamard_matrix"),
        is_live=False,
    ),
    Scheme(
        "SVDQuant",
        "{m}.qweight",
        _BYTES,
        ("{m}.wscales",),
        _twice_as_wide,
        parts=("{m}.proj_down", "{m}.proj_up", "{m}.smooth_factor", "{m}.smooth_factor_orig", "{m}.smooth"),
        is_live=False,
    ),
    Scheme(
        "AWQ",
        "{m}.qweight",
        _INTEGERS,
        ("{m}.scales", "{m}.qzeros"),
        _awq,
        fits=_is_awq,
        declared=_by_method("awq"),
        is_live=False,
    ),
    Scheme(
        "GPTQ",
        "{m}.qweight",
        _INTEGERS,
        ("{m}.scales", "{m}.qzeros"),
        _gptq,
        fits=lambda packed: len(packed.codes.shape) >= 2,
        parts=("{m}.g_idx",),
        declared=_is_declared,
        is_live=False,
    ),
    Scheme("HQQ", "{m}.W_q", _types(), ("{m}.scale", "{m}.zero", "{m}.meta"), _hqq, declared=_is_declared),
    Scheme("quanto", "{w}._data", _BYTES | _FP8, ("{w}._scale",), _quanto, parts=("{w}._shift",)),
    Scheme("quanto", "{w}._data._data", _BYTES, ("{w}._scale",), _quanto, parts=("{w}._shift",)),
    Scheme("torchao", "{p}._{l}_qdata", _types(), ("{p}._{l}_scale", "{p}._{l}_zero_point"), _torchao),
    Scheme(
        "AQLM", "{m}.codes", _INTEGERS, ("{m}.codebooks",), _aqlm, parts=("{m}.codebooks",), is_live=False
    ),
    Scheme(
        "VPTQ",
        "{m}.indices",
        _INTEGERS,
        ("{m}.centroids.weight",),
        _vptq,
        parts=(*_VPTQ_PARTS, "{m}.outlier_indices", "{m}.perm", "{w}_bias"),
        is_live=False,
    ),
    Scheme(
        "HIGGS",
        "{w}",
        _types("i16"),
        ("{m}.tables",),
        _higgs,
        fits=lambda packed: len(packed.codes.shape) == 2,
        parts=("{m}.tables", "{m}.tables2"),
        is_live=False,
    ),
    Scheme(
        "SpQR",
        "{m}.dense_weights",
        _INTEGERS,
        ("{m}.row_offsets", "{m}.col_vals"),
        lambda _: None,
        parts=("{m}.row_offsets", "{m}.col_vals", "{m}.in_perm"),
        is_live=False,
    ),
    Scheme("QuIP#", "{m}.Qidxs", _INTEGERS, ("{m}.SU",), _quip, parts=("{m}.SU", "{m}.SV"), is_live=False),
    Scheme(
        "EXL2",
        "{m}.q_weight",
        _types("i32"),
        ("{m}.q_groups", "{m}.q_scale"),
        _exl2,
        parts=("{m}.q_groups", "{m}.q_group_map", "{m}.q_perm", "{m}.q_invperm"),
        is_live=False,
    ),
    Scheme(
        "EXL3",
        "{m}.trellis",
        _types("i16"),
        ("{m}.suh", "{m}.svh", "{m}.su"),
        _exl3,
        fits=lambda packed: len(packed.codes.shape) == 3,
        parts=("{m}.suh", "{m}.svh", "{m}.su", "{m}.sv", "{m}.mcg", "{m}.mul1"),
        is_live=False,
    ),
    Scheme(
        "Marlin",
        "{m}.B",
        _types("i32"),
        ("{m}.s",),
        lambda packed: _flat(packed, 4),
        parts=("{m}.s", "{m}.workspace"),
        is_live=False,
    ),
    Scheme(
        "grouped affine integers (MLX)",
        "{w}",
        _types("u32"),
        ("{m}.scales",),
        _mlx,
        parts=("{m}.biases", "{m}.qbiases"),
        is_live=False,
    ),
    Scheme(
        "NVFP4",
        "{w}",
        _types("u8"),
        ("{w}_scale_2", "{w}_sf"),
        _twice_as_wide,
        parts=("{w}_sf", "{w}_sf_rowmajor"),
    ),
    Scheme(
        "MXFP4",
        "{w}",
        _BYTES,
        SCALES,
        _twice_as_wide,
        fits=_has_four_bit_groups,
        declared=_by_method("mxfp4"),
    ),
    Scheme("MXFP4", "{w}", _types("fp4"), SCALES, _as_stored),
    Scheme("MXFP4", "{w}", _types("fp4x2"), SCALES, _twice_as_wide),
    Scheme(
        "BitNet",
        "{w}",
        _types("u8"),
        SCALES,
        _four_times_as_high,
        _has_one_scale,
        declared=_by_method("bitnet"),
    ),
    Scheme("packed int4", "{w}", _types("u8"), SCALES, _twice_as_high, _is_half_as_high, is_live=False),
    Scheme("EETQ int8", "{w}", _I8, ("{w}_scales",), _as_stored, is_live=False),
    Scheme("int8 with scales", "{w}", _I8, SCALES, _as_stored),
    Scheme(
        "packed integers", "{w}", _INTEGERS, (), _by_bits, lambda packed: packed.has_scales, is_live=False
    ),
    Scheme(
        "packed embedding",
        "{m}.embedding_quantized",
        _BYTES,
        ("{m}.embedding_scale",),
        lambda packed: packed.codes.shape if packed.codes.type == "i8" else _by_bits(packed),
        is_live=False,
    ),
    Scheme("MXFP8", "{w}", _FP8, SCALES, _as_stored, _has_shared_exponents),
    Scheme("fp8 with one scale", "{w}", _FP8, SCALES, _as_stored, _has_one_scale),
    Scheme("fp8 with row scales", "{w}", _FP8, SCALES, _as_stored, _has_scales_of_rows),
    Scheme("fp8 with block scales", "{w}", _FP8, SCALES, _as_stored),
    Scheme(
        "fp8 with scales of its own kind",
        "{w}",
        _FP8,
        (),
        _as_stored,
        lambda packed: packed.has_scales,
        is_live=False,
    ),
    Scheme(
        "fp8 by configuration", "{w}", _FP8, (), _as_stored, lambda _: False, declared=lambda q: q.is_float8
    ),
)
"""Every scheme; the first that holds is taken."""


def element_type(dtype: str) -> str:
    """One name for an element type, whether safetensors, torch or NumPy spells it."""
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
    """NumPy's type of the integers of that name; None for others."""
    return np.dtype(f"<{type_[0]}{_WORDS[type_] // 8}") if type_ in _WORDS else None
