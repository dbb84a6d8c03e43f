"""The table of schemes by which checkpoints pack weights, in the order in which they are tried.

Names of tensors are templates, as `lorank.sources.codes` defines them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lorank.sources import true_shapes as shapes
from lorank.sources.codes import INTEGERS, SCALES, Packed, Shape
from lorank.sources.quantization import Quantization


@dataclass(frozen=True, slots=True)
class Scheme:
    """A scheme by which weights are packed.

    Attributes
    ----------
    name
        The name in messages.
    codes
        The template of the tensor of codes.
    types
        Element types of the codes; empty for any type.
    marks
        Templates of the tensors that reveal the scheme: the checkpoint must hold at least one. If `marks` is
        empty, the other conditions decide.
    shape
        A function that returns the true shape of the weight; None if the checkpoint does not state it.
    fits
        A function that checks a further condition on shapes or on the configuration.
    parts
        Templates of further tensors of the weight whose names hold no "scale" or the like.
    declared
        A function that returns True for configurations that make the marks unnecessary, because the marked
        tensors may be in another file.
    is_live
        True if the weight of a loaded model can be dequantized.
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
        """Return True if this scheme explains a tensor whose name and type fit."""
        least = 1 if self.codes == "{w}" else 2
        if len(packed.codes.shape) < least:
            return False
        if self.marks is SCALES:
            is_marked = packed.scale is not None
        else:
            is_marked = not self.marks or packed.find(*self.marks) is not None
        if is_marked and self.fits(packed):
            return True
        is_weight = self.codes != "{w}" or packed.name.endswith("weight") or len(packed.codes.shape) == 3
        return is_weight and self.declared(packed.quantization)


def _types(*names: str) -> frozenset[str]:
    return frozenset(names)


def _is_declared(quantization: Quantization) -> bool:
    return quantization.is_declared


def _by_method(*methods: str) -> Callable[[Quantization], bool]:
    return lambda quantization: quantization.method in methods


_BNB_PARTS = ("{w}.absmax", "{w}.quant_map", "{w}.nested_absmax", "{w}.nested_quant_map")
_NF4, _FP4 = "{w}.quant_state.bitsandbytes__nf4", "{w}.quant_state.bitsandbytes__fp4"
_BYTES, _FP8, _I8 = _types("i8", "u8"), _types("fp8"), _types("i8")
_HQQ_PARTS = tuple(
    f"{{m}}.{name}"
    for name in ("shape", "nbits", "group_size", "axis", "packing", "view_as_float", "channel_wise")
)
_VPTQ_PARTS = ("{m}.centroids.weight", "{m}.res_centroids.weight", "{m}.outlier_centroids.weight")

SCHEMES: tuple[Scheme, ...] = (
    Scheme("bitsandbytes nf4", "{w}", _types(), (_NF4,), shapes.bitsandbytes, parts=(*_BNB_PARTS, _NF4)),
    Scheme("bitsandbytes fp4", "{w}", _types(), (_FP4,), shapes.bitsandbytes, parts=(*_BNB_PARTS, _FP4)),
    Scheme(
        "bitsandbytes 4-bit",
        "{w}",
        _BYTES,
        ("{w}.absmax", "{w}.quant_map"),
        shapes.bitsandbytes,
        parts=_BNB_PARTS,
        declared=lambda q: q.is_bitsandbytes_4bit,
    ),
    Scheme(
        "bitsandbytes int8",
        "{w}",
        _I8,
        ("{m}.SCB", "{w}_format"),
        shapes.as_stored,
        parts=("{m}.SCB", "{w}_format"),
        declared=lambda q: q.is_bitsandbytes_8bit,
    ),
    Scheme(
        "MXFP4",
        "{w}_blocks",
        _types("u8"),
        ("{w}_scales",),
        shapes.blocks,
        fits=lambda packed: len(packed.codes.shape) >= 3,
        declared=_by_method("mxfp4"),
    ),
    Scheme("NVFP4", "{w}_packed", _types("u8"), ("{w}_global_scale",), shapes.twice_as_wide),
    Scheme("MXFP4", "{w}_packed", _types("u8"), ("{w}_scale",), shapes.twice_as_wide, declared=_is_declared),
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
        shapes.pack_quantized,
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
        shapes.twice_as_wide,
        parts=("{m}.forward_hadamard_matrix", "{m}.backward_hadamard_matrix"),
        is_live=False,
    ),
    Scheme(
        "SVDQuant",
        "{m}.qweight",
        _BYTES,
        ("{m}.wscales",),
        shapes.twice_as_wide,
        parts=("{m}.proj_down", "{m}.proj_up", "{m}.smooth_factor", "{m}.smooth_factor_orig", "{m}.smooth"),
        is_live=False,
    ),
    Scheme(
        "AWQ",
        "{m}.qweight",
        INTEGERS,
        ("{m}.scales", "{m}.qzeros"),
        shapes.awq,
        fits=shapes.is_awq,
        declared=_by_method("awq"),
        is_live=False,
    ),
    Scheme(
        "GPTQ",
        "{m}.qweight",
        INTEGERS,
        ("{m}.scales", "{m}.qzeros"),
        shapes.gptq,
        fits=lambda packed: len(packed.codes.shape) >= 2,
        parts=("{m}.g_idx",),
        declared=_is_declared,
        is_live=False,
    ),
    Scheme(
        "HQQ",
        "{m}.W_q",
        _types(),
        ("{m}.scale", "{m}.zero", "{m}.meta"),
        shapes.hqq,
        parts=_HQQ_PARTS,
        declared=_is_declared,
    ),
    Scheme("quanto", "{w}._data", _BYTES | _FP8, ("{w}._scale",), shapes.quanto, parts=("{w}._shift",)),
    Scheme("quanto", "{w}._data._data", _BYTES, ("{w}._scale",), shapes.quanto, parts=("{w}._shift",)),
    Scheme("torchao", "{p}._{l}_qdata", _types(), ("{p}._{l}_scale", "{p}._{l}_zero_point"), shapes.torchao),
    Scheme(
        "AQLM",
        "{m}.codes",
        INTEGERS,
        ("{m}.codebooks",),
        shapes.aqlm,
        parts=("{m}.codebooks",),
        is_live=False,
    ),
    Scheme(
        "VPTQ",
        "{m}.indices",
        INTEGERS,
        ("{m}.centroids.weight",),
        shapes.vptq,
        parts=(*_VPTQ_PARTS, "{m}.outlier_indices", "{m}.perm", "{w}_bias"),
        is_live=False,
    ),
    Scheme(
        "HIGGS",
        "{w}",
        _types("i16"),
        ("{m}.tables",),
        shapes.higgs,
        fits=lambda packed: len(packed.codes.shape) == 2,
        parts=("{m}.tables", "{m}.tables2"),
        is_live=False,
    ),
    Scheme(
        "SpQR",
        "{m}.dense_weights",
        INTEGERS,
        ("{m}.row_offsets", "{m}.col_vals"),
        lambda _: None,
        parts=("{m}.row_offsets", "{m}.col_vals", "{m}.in_perm"),
        is_live=False,
    ),
    Scheme(
        "QuIP#", "{m}.Qidxs", INTEGERS, ("{m}.SU",), shapes.quip, parts=("{m}.SU", "{m}.SV"), is_live=False
    ),
    Scheme(
        "EXL2",
        "{m}.q_weight",
        _types("i32"),
        ("{m}.q_groups", "{m}.q_scale"),
        shapes.exl2,
        parts=("{m}.q_groups", "{m}.q_group_map", "{m}.q_perm", "{m}.q_invperm"),
        is_live=False,
    ),
    Scheme(
        "EXL3",
        "{m}.trellis",
        _types("i16"),
        ("{m}.suh", "{m}.svh", "{m}.su"),
        shapes.exl3,
        fits=lambda packed: len(packed.codes.shape) == 3,
        parts=("{m}.suh", "{m}.svh", "{m}.su", "{m}.sv", "{m}.mcg", "{m}.mul1"),
        is_live=False,
    ),
    Scheme(
        "Marlin",
        "{m}.B",
        _types("i32"),
        ("{m}.s",),
        lambda packed: shapes.flat(packed, 4),
        parts=("{m}.s", "{m}.workspace"),
        is_live=False,
    ),
    Scheme(
        "grouped affine integers (MLX)",
        "{w}",
        _types("u32"),
        ("{m}.scales",),
        shapes.mlx,
        parts=("{m}.biases", "{m}.qbiases"),
        is_live=False,
    ),
    Scheme(
        "NVFP4",
        "{w}",
        _types("u8"),
        ("{w}_scale_2", "{w}_weight_scale_2", "{w}_sf"),
        shapes.twice_as_wide,
        parts=("{w}_sf", "{w}_sf_rowmajor"),
    ),
    Scheme("NVFP4", "{w}", _types("u8"), SCALES, shapes.twice_as_wide, shapes.has_float8_scales),
    Scheme(
        "MXFP4",
        "{w}",
        _BYTES,
        SCALES,
        shapes.twice_as_wide,
        fits=shapes.has_four_bit_groups,
        declared=_by_method("mxfp4"),
    ),
    Scheme("MXFP4", "{w}", _types("fp4"), SCALES, shapes.as_stored),
    Scheme("MXFP4", "{w}", _types("fp4x2"), SCALES, shapes.twice_as_wide),
    Scheme(
        "BitNet",
        "{w}",
        _types("u8"),
        SCALES,
        shapes.four_times_as_high,
        shapes.has_one_scale,
        declared=_by_method("bitnet"),
    ),
    Scheme(
        "int4 in bytes",
        "{w}",
        _types("u8"),
        SCALES,
        shapes.twice_as_high,
        shapes.is_half_as_high,
        is_live=False,
    ),
    Scheme("EETQ int8", "{w}", _I8, ("{w}_scales",), shapes.as_stored, is_live=False),
    Scheme("int8 with scales", "{w}", _I8, SCALES, shapes.as_stored),
    Scheme(
        "low-bit integers",
        "{w}",
        INTEGERS,
        (),
        shapes.by_bits,
        lambda packed: packed.has_scales,
        is_live=False,
    ),
    Scheme(
        "low-bit embedding",
        "{m}.embedding_quantized",
        _BYTES,
        ("{m}.embedding_scale",),
        lambda packed: packed.codes.shape if packed.codes.type == "i8" else shapes.by_bits(packed),
        is_live=False,
    ),
    Scheme("MXFP8", "{w}", _FP8, SCALES, shapes.as_stored, shapes.has_shared_exponents),
    Scheme("fp8 with one scale", "{w}", _FP8, SCALES, shapes.as_stored, shapes.has_one_scale),
    Scheme("fp8 with row scales", "{w}", _FP8, SCALES, shapes.as_stored, shapes.has_scales_of_rows),
    Scheme("fp8 with block scales", "{w}", _FP8, SCALES, shapes.as_stored),
    Scheme(
        "fp8 with unknown scales",
        "{w}",
        _FP8,
        (),
        shapes.as_stored,
        lambda packed: packed.has_scales,
        is_live=False,
    ),
    Scheme(
        "fp8 by configuration",
        "{w}",
        _FP8,
        (),
        shapes.as_stored,
        lambda _: False,
        declared=lambda q: q.is_float8,
    ),
)
"""Every scheme; the first that explains a tensor is used."""


@cache
def schemes_of(element_type: str) -> tuple[Scheme, ...]:
    """Return the schemes whose codes may have an element type, in their order."""
    return tuple(scheme for scheme in SCHEMES if not scheme.types or element_type in scheme.types)
