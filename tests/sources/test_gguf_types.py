"""Tests of the block types of GGUF files, against the package that defines them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from lorank._core import Checkpoint, FormatError, gguf_types

ROWS, BLOCKS = 24, 3


def write(path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], Any]]) -> Checkpoint:
    """Write tensors of blocks, and open the file."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (codes, kind) in tensors.items():
        writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Checkpoint(path)


def codes_of(kind: Any, seed: int, scale: bytes | None = None) -> np.ndarray[Any, Any]:
    """Return random blocks; with `scale`, all pairs of bytes at even positions are that scale at times."""
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    codes = rng.integers(0, 256, (ROWS, BLOCKS, size), dtype=np.uint8)
    if scale is not None:
        for at in (0, 2, size - 2, size - 4):
            if at >= 0:
                codes[rng.random((ROWS, BLOCKS)) < 0.3, at : at + 2] = list(scale)
    return codes.reshape(ROWS, -1)


def assert_bits(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Compare float32 bit for bit, except for the bits of NaN."""
    same = found.view(np.uint32) == expected.view(np.uint32)
    assert np.all(same | (np.isnan(found) & np.isnan(expected)))


# Half-precision scales: zero, minus zero, the least subnormal, one, the largest, infinities, NaN.
SCALES = [None, *(s.to_bytes(2, "little") for s in (0, 0x8000, 1, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in gguf_types() if hasattr(gguf.GGMLQuantizationType, name)])
def test_values_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    stored = {f"t{i}": (codes_of(kind, i, scale), kind) for i, scale in enumerate(SCALES)}
    checkpoint = write(tmp_path / "x.gguf", stored)
    cols = BLOCKS * gguf.GGML_QUANT_SIZES[kind][0]
    for position, (tensor, dtype, shape) in enumerate(checkpoint.tensors()):
        assert (dtype, shape) == (name, [ROWS, cols])
        expected = dequantize(stored[tensor][0], kind)
        # Whole rows; one row; rows that begin within blocks; one matrix of a stack.
        for rows, width in ((ROWS, cols), (1, ROWS * cols), (8 * ROWS, cols // 8)):
            found = checkpoint.dequantized("gguf", {"codes": position}, {}, (rows, width)).to_array()
            assert_bits(found.reshape(expected.shape), expected)
        last = checkpoint.dequantized("gguf", {"codes": position}, {}, (ROWS // 4, cols), 3).to_array()
        assert_bits(last, expected[-ROWS // 4 :])


def test_every_type_of_the_package_is_decoded() -> None:
    plain = {"F32", "F16", "BF16"}
    assert set(gguf_types()) >= {kind.name for kind in gguf.quants._type_traits} - plain


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_long_rows_are_decoded(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_K
    codes = np.random.default_rng(0).integers(0, 256, (2, 200 * 144), dtype=np.uint8)
    checkpoint = write(tmp_path / "x.gguf", {"t": (codes, kind)})
    found = checkpoint.dequantized("gguf", {"codes": 0}, {}, (2, 200 * 256)).to_array()
    assert_bits(found, dequantize(codes, kind))


def test_matrix_that_cuts_blocks_is_refused(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_0
    checkpoint = write(tmp_path / "x.gguf", {"t": (codes_of(kind, 0), kind)})
    with pytest.raises(FormatError, match="blocks of 32 values"):
        checkpoint.dequantized("gguf", {"codes": 0}, {}, (4, 6))
