"""Values of 8-bit floats and integers with scales equal those of transformers and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.support.decoded_matrices import assert_same, decoded, random_codes

NAMES = ["weight_scale_inv", "weight_scale", "scale", "qscale_weight", "scale_weight", "weight_scales"]
FP8, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
SCALES = [torch.float32, torch.bfloat16, torch.float16, E8M0, FP8]


def scales(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return positive scales of very different sizes."""
    exponents = np.random.default_rng(1).uniform(-8, 8, shape)
    return torch.tensor(np.exp2(exponents), dtype=torch.float32).to(dtype)


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the values by transformers, in float32."""
    return Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Repeat every scale over its block, whose last rows and columns may be cut."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", SCALES)
def test_blocks_equal_transformers_under_every_name(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    codes, scale = random_codes((256, 384), FP8), scales((2, 3), dtype)
    found = decoded(tmp_path, {"a.weight": codes, f"a.{name}": scale})["a"]
    assert_same(found, dequantized(codes, scale))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (96, 1), (96,), (1, 64), (96, 2)])
@pytest.mark.parametrize("codes_type", [FP8, E5M2])
def test_scales_of_any_shape_equal_transformers(
    tmp_path: Path, shape: tuple[int, ...], codes_type: torch.dtype
) -> None:
    codes, scale = random_codes((96, 64), codes_type), scales(shape, torch.float32)
    found = decoded(tmp_path, {"a.weight": codes, "a.weight_scale": scale})["a"]
    grid = scale.reshape(96, 1) if shape == (96,) else scale.reshape(1, 1) if len(shape) < 2 else scale
    assert_same(found, dequantized(codes, grid))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    block=st.sampled_from([(128, 128), (64, 32), (1, 128), (7, 5)]),
)
def test_ragged_blocks_have_the_declared_size(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    codes, scale = random_codes(shape, FP8), scales(grid, torch.float32)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale}
    found = decoded(tmp_path_factory.mktemp("a"), tensors, quantization)["a"]
    assert_same(found, codes.float() * spread(scale, block, shape))


def test_extreme_scales_and_nan_codes_are_exact(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).repeat(6, 1)
    extreme = [0.0, 1e-45, 1e-38, 3.4e38, float("inf"), float("nan")]
    scale = torch.tensor(extreme).reshape(6, 1)
    found = decoded(tmp_path, {"a.weight": codes, "a.weight_scale": scale})["a"]
    assert_same(found, codes.float() * scale)


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0])
def test_shared_exponents_equal_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = random_codes((16, 512), FP8)
    scale = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(dtype)
    found = decoded(tmp_path, {"a.weight": codes, "a.weight_scale": scale})["a"]
    assert_same(found, dequantized(codes, scale))


def test_stacked_experts_have_their_own_scales(tmp_path: Path) -> None:
    name = "m.experts.gate_up_proj"
    codes = random_codes((3, 256, 128), FP8)
    for shape in [(3, 2, 1), (3, 256, 1), (3, 1, 128), (3, 1, 1), (3,), ()]:
        scale = scales(shape, torch.float32)
        found = decoded(tmp_path, {name: codes, f"{name}_scale_inv": scale})
        grid = scale.reshape(3, 1, 1) if shape == (3,) else scale
        for expert in range(3):
            one = grid if shape == () else grid[expert]
            assert_same(found[f"{name}[{expert}]"], dequantized(codes[expert], one))


@pytest.mark.parametrize(
    ("strategy", "shape"), [("tensor", (1,)), ("channel", (96, 1)), ("block", (3, 2)), ("mx", (96, 2))]
)
def test_values_equal_compressed_tensors(tmp_path: Path, strategy: str, shape: tuple[int, ...]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    options: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        options["block_structure"] = [32, 32]
    if strategy == "mx":
        options |= {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**options)
    )
    form = "mxfp8-quantized" if strategy == "mx" else "float-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    weight = torch.randn(96, 64)
    full = torch.rand(shape).exp() / 100 if strategy != "mx" else torch.full(shape, 2.0**-7)
    stored = compressor.compress({"weight": weight, "weight_scale": full}, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    found = decoded(tmp_path, {f"a.{name}": value for name, value in stored.items()})["a"]
    assert_same(found, expected)


@pytest.mark.parametrize("shape", [(), (96, 1), (96, 2)])
def test_integers_with_zero_points(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes, scale = random_codes((96, 64), torch.int8), scales(shape, torch.float32)
    zeros = random_codes(shape, torch.int8, 5) if shape else None
    tensors = {"a.weight": codes, "a.weight_scale": scale}
    tensors |= {} if zeros is None else {"a.weight_zero_point": zeros}
    found = decoded(tmp_path, tensors)["a"]
    block = (1, 64 // shape[1]) if shape else (96, 64)
    wide = spread(scale.reshape(-1, shape[1] if shape else 1), block, (96, 64))
    moved = codes.float() - (0 if zeros is None else spread(zeros, block, (96, 64)))
    assert_same(found, moved * wide)
