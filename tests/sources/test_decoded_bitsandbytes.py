"""Values of bitsandbytes' layers equal its own dequantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.decoded_matrices import assert_same, decoded

pytest.importorskip("bitsandbytes")
import bitsandbytes.functional as bnb


def by_blocks(codes: torch.Tensor, state: Any, shape: tuple[int, int]) -> torch.Tensor:
    """Return the values by the library's function for 8-bit codes.

    Its CPU kernel for 4-bit codes takes every row as blocks of its own if the columns do not fill blocks,
    unlike its function that quantizes.
    """
    flat = codes.flatten()
    unpacked = torch.stack([flat >> 4, flat & 15], -1).flatten()[: shape[0] * shape[1]].contiguous()
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    table = torch.zeros(256)
    table[:16] = state.code
    values = bnb.dequantize_blockwise(unpacked, absmax=absmax, code=table, blocksize=state.blocksize)
    return values.reshape(shape)


@pytest.mark.parametrize("shape", [(64, 128), (64, 96), (37, 53), (1, 64), (130, 7), (256, 300)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_four_bits_equal_the_library(
    tmp_path: Path, shape: tuple[int, int], kind: str, is_nested: bool, block: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    codes, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=is_nested, quant_type=kind)
    expected = by_blocks(codes, state, shape)
    if shape[1] % block == 0:
        assert torch.equal(bnb.dequantize_4bit(codes, state), expected)
    tensors = {"a.weight": codes}
    tensors |= {f"a.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    assert_same(decoded(tmp_path, tensors)["a"], expected)


def test_codes_that_are_stored_as_bfloat16_equal_bytes(tmp_path: Path) -> None:
    codes, state = bnb.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    tensors = {"a.weight": codes.flatten().view(torch.bfloat16)[:, None]}
    tensors |= {f"a.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    assert_same(decoded(tmp_path, tensors)["a"], by_blocks(codes, state, (64, 96)))


@pytest.mark.parametrize("shape", [(64, 96), (5, 3), (1, 200)])
def test_integers_equal_the_library(tmp_path: Path, shape: tuple[int, int]) -> None:
    codes, statistics, _ = bnb.int8_vectorwise_quant(torch.randn(shape, dtype=torch.float16))
    expected = bnb.int8_vectorwise_dequant(codes, statistics)
    found = decoded(tmp_path, {"a.weight": codes, "a.SCB": statistics})["a"]
    assert_same(found, expected)
