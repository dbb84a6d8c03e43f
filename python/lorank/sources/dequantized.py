"""Dequantizes packed weights of live models to float32, by the formulas of their schemes.

A stack of experts is dequantized one expert at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorank.sources.codes import SCALES, name_of
from lorank.sources.packing import Codes

Loader = Callable[[int | None], Any]
"""A function that returns the matrix of an expert for its index, or the whole weight for None."""

# The values of 4-bit floats (e2m1), by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Classes that store one scale per output as a row vector: the dimension of the outputs in their weight.
_SCALES_OF_OUTPUTS = {"CompressedTensorsFP8Linear": 0, "FbgemmFp8Llama4TextExperts": 2}


@dataclass(frozen=True, slots=True)
class LiveCodes:
    """Codes in a live model.

    Attributes
    ----------
    codes
        The packed weight that the codes encode.
    name
        The name of the tensor of codes.
    module
        The module that holds the codes.
    tensors
        Every parameter and buffer of the model by its name.
    block_size
        Shape ``(out, in)`` of the blocks that share a scale; None unless the configuration declares it.
    """

    codes: Codes
    name: str
    module: Any
    tensors: Mapping[str, Any]
    block_size: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The true shape of the weight, by the codes or by the features of the module; None if unknown."""
        shape, features = self.codes.shape, ("out_features", "in_features")
        if (shape is None or len(shape) < 2) and self.codes.weight.endswith("weight"):
            sizes = [getattr(self.module, name, None) for name in features]
            if all(type(size) is int and size > 0 for size in sizes):
                return tuple(sizes)  # type: ignore[arg-type]  # checked the line before
        return shape if shape is not None and len(shape) > 1 else None

    @property
    def values(self) -> Any:
        """The tensor of codes."""
        return self.tensors[self.name]

    def find(self, *templates: str) -> Any:
        """Return the tensor of the first template that the model holds; None if it holds none."""
        names = (name_of(template, self.codes.weight) for template in templates)
        return next((self.tensors[name] for name in names if name in self.tensors), None)

    @property
    def is_of(self) -> set[str]:
        """The names of the module's classes."""
        return {base.__name__ for base in type(self.module).__mro__}


def loader(live: LiveCodes) -> Loader | None:
    """Return a function that dequantizes the weight; None if no formula is known."""
    shape = live.shape
    if shape is None:
        return None
    if (own := _own_dequantizer(live, shape)) is not None:
        return lambda _: own().detach().float()
    build = _LOADERS.get(live.codes.scheme.name)
    return None if build is None else build(live, shape)


def _own_dequantizer(live: LiveCodes, shape: tuple[int, ...]) -> Callable[[], Any] | None:
    """Return the module's own function that dequantizes its weight (gptqmodel, Gemma); None without one."""
    module, local = live.module, live.name.rpartition(".")[2]
    if local == "qweight" and hasattr(module, "dequantize_weight"):
        return lambda: _oriented(module.dequantize_weight(), shape)
    if local == "weight" and hasattr(module, "_dequantize_weights"):
        return lambda: module._dequantize_weights()
    if local == "embedding_quantized" and isinstance(getattr(type(module), "weight", None), property):
        return lambda: module.weight
    return None


def _oriented(weight: Any, shape: tuple[int, ...]) -> Any:
    """Transpose a weight that gptqmodel returns as ``(in, out)``."""
    return weight if tuple(weight.shape) == shape and shape[0] != shape[1] else weight.T


def _scaled(live: LiveCodes, shape: tuple[int, ...], unpack: Callable[[Any], Any]) -> Loader | None:
    """Return a loader that multiplies codes by a grid of scales; None if the scales do not fit."""
    scale = live.find(*SCALES)
    if scale is None:
        return None
    grid = _grid(tuple(scale.shape), shape, _SCALES_OF_OUTPUTS.get(type(live.module).__name__))
    zeros = live.find("{w}_zero_point")
    if zeros is not None and zeros.shape != scale.shape:
        return None
    declared = getattr(live.module, "block_size", None) or live.block_size
    blocks = None if grid is None else _block_sizes(grid, shape, declared)
    if grid is None or blocks is None:
        return None

    def load(expert: int | None) -> Any:
        def spread(values: Any) -> Any:
            values = values.reshape(grid)
            if expert is None:
                return _spread(values, blocks, shape)
            return _spread(values[expert if grid[0] > 1 else 0], blocks[1:], shape[1:])

        codes = live.values.detach()
        values = unpack(codes if expert is None else codes[expert])
        values = values if zeros is None else values - spread(zeros.detach().float())
        return values * spread(_as_numbers(scale))

    return load


def _grid(
    scale: tuple[int, ...], shape: tuple[int, ...], output_dimension: int | None
) -> tuple[int, ...] | None:
    """Return the scales' shape with as many dimensions as the weight; None if the scales do not fit it."""
    dimensions = len(shape)
    if math.prod(scale) == 1:
        return (1,) * dimensions
    if output_dimension is not None:
        vector = [1] * dimensions
        vector[output_dimension] = shape[output_dimension]
        vector[0] = shape[0]
        return tuple(vector) if math.prod(vector) == math.prod(scale) else None
    if len(scale) == dimensions:
        return scale
    stacks = 1 if dimensions == 3 and scale[0] == shape[0] else 0
    rest = scale[stacks:]
    if len(rest) > 1 or len(scale) >= dimensions or (dimensions == 3 and not stacks):
        return None
    before = shape[:1] if stacks else ()
    if not rest or rest == (1,):
        return (*before, 1, 1)
    if rest[0] in shape[-2:]:
        return (*before, rest[0], 1) if rest[0] == shape[-2] else (*before, 1, rest[0])
    return None


def _block_sizes(
    grid: tuple[int, ...], shape: tuple[int, ...], declared: tuple[int, int] | None
) -> tuple[int, ...] | None:
    """Return the size, in each dimension, of the blocks that share a scale; the last ones may be smaller."""
    expected = (*(None for _ in shape[2:]), *(declared or (None, None)))
    sizes = []
    for count, size, block in zip(grid, shape, expected, strict=True):
        if count == 1:
            sizes.append(size)
        elif block and -(-size // block) == count:
            sizes.append(block)
        elif count <= size and size % count == 0:
            sizes.append(size // count)
        elif -(-size // 128) == count:
            sizes.append(128)
        else:
            return None
    return tuple(sizes)


def _spread(scales: Any, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Repeat each scale over its block; dimensions with one scale are left to broadcasting."""
    for dimension, (block, size) in enumerate(zip(blocks, shape, strict=True)):
        if scales.shape[dimension] > 1 and block > 1:
            scales = scales.repeat_interleave(block, dim=dimension).narrow(dimension, 0, size)
    return scales


def _as_numbers(scale: Any) -> Any:
    """Convert scales to float32; bytes hold exponents of two."""
    import torch

    scale = scale.detach()
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _as_floats(codes: Any) -> Any:
    """Convert codes that are numbers to float32."""
    return codes.float()


def _unpacked_fours(codes: Any) -> Any:
    """Unpack two 4-bit floats per byte, starting with the low four bits."""
    import torch

    table = torch.tensor(_E2M1, dtype=torch.float32, device=codes.device)
    codes = codes.contiguous().view(torch.uint8)
    both = torch.stack([codes & 15, codes >> 4], dim=-1)
    return table[both.long()].flatten(-2)


def _blocks_of_fours(live: LiveCodes, _: tuple[int, ...]) -> Loader | None:
    """Return a loader of 4-bit floats in blocks along the last dimension, with one exponent per block."""
    scales = live.find("{w}_scales")
    if scales is None or tuple(scales.shape) != tuple(live.values.shape[:-1]):
        return None

    def load(expert: int | None) -> Any:
        codes, exponents = live.values.detach(), _as_numbers(scales)
        if expert is not None:
            codes, exponents = codes[expert], exponents[expert]
        return (_unpacked_fours(codes) * exponents[..., None]).flatten(-2)

    return load


def _nvfp4(live: LiveCodes, shape: tuple[int, ...]) -> Loader | None:
    """Return a loader of 4-bit floats with two levels of scales.

    compressed-tensors divides by the global scale; other libraries multiply.
    """
    if not str(getattr(live.find(*SCALES), "dtype", "")).endswith("float8_e4m3fn"):
        return None
    load = _scaled(live, shape, _unpacked_fours)
    divisor, factor = live.find("{w}_global_scale"), live.find("{w}_scale_2", "{w}_weight_scale_2")
    if load is None or (divisor is None and factor is None):
        return None

    def scaled(expert: int | None) -> Any:
        overall = factor if divisor is None else divisor
        overall = overall.detach().float()
        if expert is not None and overall.numel() > 1:
            overall = overall.reshape(len(live.values), -1)[expert]
        values = load(expert)
        return values / overall if divisor is not None else values * overall

    return scaled


def _pack_quantized(live: LiveCodes, shape: tuple[int, ...]) -> Loader | None:
    """Return a loader of signed integers in 32-bit words: ``(q - z) * scale`` by groups of columns."""
    rows, cols = shape if len(shape) == 2 else (0, 0)
    bits = next((b for b in (4, 8, 2) if -(-cols * b // 32) == live.values.shape[-1]), 0)
    scale, zeros, groups = (live.find(f"{{w}}_{part}") for part in ("scale", "zero_point", "g_idx"))
    if not bits or scale is None or scale.ndim != 2 or scale.shape[0] not in (1, rows):
        return None
    if groups is None and cols % scale.shape[1]:
        return None

    def load(_: int | None) -> Any:
        values = _unpacked_words(live.values.detach(), bits)[:, :cols]
        column = _columns(groups, cols, scale.shape[1])
        if zeros is not None:
            unpacked = (
                _unpacked_words(zeros.detach().T, bits).T[:rows] if zeros.dtype.itemsize == 4 else zeros
            )
            values = values - unpacked.float()[:, column]
        return values * scale.detach().float()[:, column]

    return load


def _columns(groups: Any, cols: int, count: int) -> Any:
    """Return the group of every column."""
    import torch

    if groups is not None and bool((groups >= 0).all()):
        return groups.detach().long()
    return torch.arange(cols) // (cols // count)


def _unpacked_words(words: Any, bits: int) -> Any:
    """Unpack signed integers along the last dimension, starting with the lowest bits."""
    import torch

    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    codes = (words.to(torch.int32)[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2).float() - 2 ** (bits - 1)


def _bitnet(live: LiveCodes, _shape: tuple[int, ...]) -> Loader | None:
    """Return a loader of ternary values, divided by the scale. Every two bits hold a quarter of the rows."""
    scale = live.find("{w}_scale")
    if scale is None or "BitLinear" not in live.is_of:
        return None

    def load(_expert: int | None) -> Any:
        import torch

        codes = live.values.detach()
        values = torch.cat([(codes >> shift) & 3 for shift in (0, 2, 4, 6)]).float() - 1
        return values / scale.detach().float()

    return load


_LOADERS: Mapping[str, Callable[[LiveCodes, tuple[int, ...]], Loader | None]] = {
    **dict.fromkeys(
        ("fp8 with one scale", "fp8 with row scales", "fp8 with block scales", "MXFP8", "int8 with scales"),
        partial(_scaled, unpack=_as_floats),
    ),
    "MXFP4": lambda live, shape: (
        _blocks_of_fours(live, shape)
        if live.name.endswith("_blocks")
        else _scaled(live, shape, _unpacked_fours)
    ),
    "NVFP4": _nvfp4,
    "pack-quantized integers": _pack_quantized,
    "BitNet": _bitnet,
}
"""The function that builds a loader, by the name of the scheme."""
