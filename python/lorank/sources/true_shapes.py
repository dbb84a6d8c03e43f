"""Computes the true shape of a packed weight from its codes and from the tensors beside them."""

from __future__ import annotations

import json
import math

from lorank.sources.codes import ELEMENT_BITS, EXPONENTS, INTEGER_BITS, Packed, Shape, TensorSpec


def as_stored(packed: Packed) -> Shape | None:
    """Return the shape of the codes, for one code per element."""
    return packed.codes.shape


def twice_as_wide(packed: Packed) -> Shape | None:
    """Return the shape for two codes per element along the last dimension."""
    *rest, last = packed.codes.shape
    return (*rest, 2 * last)


def blocks(packed: Packed) -> Shape | None:
    """Return the shape for two codes per byte, in blocks along the last dimension."""
    *rest, groups, size = packed.codes.shape
    return (*rest, 2 * groups * size)


def four_times_as_high(packed: Packed) -> Shape | None:
    """Return the shape for four codes per element along the first dimension."""
    first, *rest = packed.codes.shape
    return (4 * first, *rest)


def twice_as_high(packed: Packed) -> Shape | None:
    """Return the shape for two codes per element along the first dimension."""
    first, *rest = packed.codes.shape
    return (2 * first, *rest)


def flat(packed: Packed, bits: int | None) -> Shape | None:
    """Return the number of codes of `bits` bits that the tensor's bytes hold."""
    width = ELEMENT_BITS.get(packed.codes.type)
    if bits is None or width is None:
        return None
    # Three bits do not divide 32: ten codes share a word of 32 bits.
    per_word = 10 if (bits, width) == (3, 32) else width // bits if width % bits == 0 else 0
    return (packed.codes.size * per_word,) if per_word else None


def bitsandbytes(packed: Packed) -> Shape | None:
    """Return the shape in the quantization state if it fits the bytes, else the number of codes."""
    count = packed.codes.size * ELEMENT_BITS.get(packed.codes.type, 8) // 4
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


def pack_quantized(packed: Packed) -> Shape | None:
    """Return `weight_shape` if it fits the 32-bit words, else the shape by the configured bits."""
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


def gptq(packed: Packed) -> Shape | None:
    """Return ``(out, in)``; column indices, zero points or the configured bits determine `in`."""
    *rest, words, out = packed.codes.shape
    width = INTEGER_BITS[packed.codes.type]
    indices, zeros = packed.find("{m}.g_idx"), packed.find("{m}.qzeros")
    if indices is not None and words < indices.last <= words * width:
        return (*rest, out, indices.last)
    bits = packed.bits
    if zeros is not None and (width * zeros.last) % out == 0:
        found = width * zeros.last // out
        bits = found if 2 <= found <= 8 else bits
    return (*rest, out, words * width // bits) if bits else None


def is_awq(packed: Packed) -> bool:
    """Return True if codes are packed along `out`, judged by the scales."""
    scales = packed.find("{m}.scales")
    if scales is None or len(scales.shape) != len(packed.codes.shape):
        return packed.quantization.method == "awq"
    return scales.last != packed.codes.last


def awq(packed: Packed) -> Shape | None:
    """Return ``(out, in)`` if codes are packed along `out`; the number of codes for other layouts."""
    *rest, rows, words = packed.codes.shape
    scales, width = packed.find("{m}.scales"), INTEGER_BITS[packed.codes.type]
    if scales is not None and scales.size and scales.last % words == 0 and width * words >= 2 * scales.last:
        return (*rest, scales.last, rows)
    return flat(packed, packed.bits or 4)


def hqq(packed: Packed) -> Shape | None:
    """Return the stored `shape` if it fits, else the number of codes by the stored or configured bits."""
    stored, bits = packed.numbers("{m}.shape"), packed.numbers("{m}.nbits")
    capacity = packed.codes.size * ELEMENT_BITS.get(packed.codes.type, 8)
    if stored and math.prod(stored) <= capacity:
        return stored
    return flat(packed, bits[0] if bits else packed.bits)


def torchao(packed: Packed) -> Shape | None:
    """Return the shape in the file's metadata, where packed classes keep it."""
    if packed.codes.type == "fp8":
        return packed.codes.shape
    try:
        state = json.loads(packed.text(packed.weight) or "")
        kind, data = state["_type"], state["_data"]
        shape = tuple(int(size) for size in data.get("shape") or ())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if shape and 0 < math.prod(shape) <= 8 * packed.codes.size * ELEMENT_BITS.get(packed.codes.type, 8):
        return shape
    return packed.codes.shape if kind.startswith("Int8") else None


def quanto(packed: Packed) -> Shape | None:
    """Return the shape of 8-bit codes; for other codes, their number by the configured bits."""
    return packed.codes.shape if packed.codes.type in ("i8", "fp8") else flat(packed, packed.bits)


def aqlm(packed: Packed) -> Shape | None:
    """Return the shape, from the size of the groups of values in the codebooks."""
    books, codes = packed.find("{m}.codebooks"), packed.codes.shape
    if books is None or len(books.shape) != 4 or len(codes) < 2:
        return None
    return codes[0] * books.shape[2], codes[1] * books.shape[3]


def vptq(packed: Packed) -> Shape | None:
    """Return the shape ``(out, in)`` that the configuration lists."""
    return packed.quantization.features(packed.module)


def higgs(packed: Packed) -> Shape | None:
    """Return the shape for words of shape ``(out * bits / 16, in)``; the table's size determines the bits."""
    table = packed.find("{m}.tables")
    bits = table.size.bit_length() - 1 if table is not None else 0
    rows, cols = packed.codes.shape
    return (rows * 16 // bits, cols) if bits else None


def quip(packed: Packed) -> Shape | None:
    """Return ``(out, in)``, the lengths of the two sign vectors."""
    out, fan_in = packed.find("{m}.SV"), packed.find("{m}.SU")
    return (out.size, fan_in.size) if out is not None and fan_in is not None else None


def exl2(packed: Packed) -> Shape | None:
    """Return ``(out, in)``; the permutation of the columns determines `in`."""
    order = packed.find("{m}.q_perm", "{m}.q_invperm")
    return (packed.codes.shape[-1], order.size) if order is not None else None


def exl3(packed: Packed) -> Shape | None:
    """Return ``(out, in)`` from the number of 16 x 16 tiles."""
    tiles_in, tiles_out, *_ = packed.codes.shape
    return 16 * tiles_out, 16 * tiles_in


def mlx(packed: Packed) -> Shape | None:
    """Return the shape for 32-bit words along the last dimension, by the configured bits or by the scales."""
    *rest, words = packed.codes.shape
    bits, scales = packed.bits, packed.find("{m}.scales")
    if bits is None and scales is not None and scales.type == "u8":
        # Codes are floats of 8 bits if 32 codes share a scale, else of 4 bits.
        bits = 8 if words == 8 * scales.last else 4
    return (*rest, words * 32 // bits) if bits else None


def by_bits(packed: Packed) -> Shape | None:
    """Return the shape for codes of the configured bits, packed in bytes along the last dimension."""
    *rest, last = packed.codes.shape
    bits = packed.bits
    return (*rest, last * 8 // bits) if bits in (2, 4, 8) else None


def _scale(packed: Packed) -> TensorSpec:
    """Return the scales; an empty tensor if there are none."""
    return packed.scale or TensorSpec("", ())


def has_shared_exponents(packed: Packed) -> bool:
    """Return True if each scale is a byte with the exponent of 32 codes of a row."""
    *rows, cols = packed.codes.shape
    scale = _scale(packed)
    return scale.type in EXPONENTS and scale.shape == (*rows, -(-cols // 32))


def has_four_bit_groups(packed: Packed) -> bool:
    """Return True if each scale belongs to 32 codes of a row, two codes per byte."""
    *rows, cols = packed.codes.shape
    scale = _scale(packed)
    # A single column of scales without exponents more likely belongs to rows of 16 8-bit integers.
    is_clear = scale.type in EXPONENTS or scale.last > 1
    return is_clear and scale.shape == (*rows, cols // 16) and cols % 16 == 0


def has_float8_scales(packed: Packed) -> bool:
    """Return True if the scales are 8-bit floats."""
    return _scale(packed).type == "fp8"


def is_half_as_high(packed: Packed) -> bool:
    """Return True if the scales have twice as many rows as the bytes."""
    scale = _scale(packed)
    return len(scale.shape) == 2 and scale.shape[0] == 2 * packed.codes.shape[0]


def has_one_scale(packed: Packed) -> bool:
    """Return True if one scale applies to the whole weight."""
    return _scale(packed).size == 1


def has_scales_of_rows(packed: Packed) -> bool:
    """Return True if each scale applies to a row, or to a column of a transposed weight."""
    *_, rows, cols = packed.codes.shape if len(packed.codes.shape) > 1 else (1, *packed.codes.shape)
    shape = [size for size in _scale(packed).shape if size != 1]
    shape = shape[1:] if len(packed.codes.shape) == 3 and shape[:1] == [packed.codes.shape[0]] else shape
    return not shape or shape in ([rows], [cols])
