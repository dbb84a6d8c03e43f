"""Values of 4-bit floats equal those of transformers, compressed-tensors and ModelOpt's formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support.decoded_matrices import assert_same, decoded, random_codes

U8, FP8, E8M0 = torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of codes, two per byte, the low four bits first."""
    both = torch.stack([codes & 15, codes >> 4], -1).long()
    return VALUES[both].flatten(-2)


def exponents(*shape: int) -> torch.Tensor:
    return torch.randint(100, 150, shape, dtype=U8, generator=torch.Generator().manual_seed(2))


def test_blocks_of_gpt_oss_equal_transformers(tmp_path: Path) -> None:
    name = "m.experts.gate_up_proj"
    for rows, groups in [(96, 4), (70, 3), (1, 1), (200, 5)]:
        blocks, scales = random_codes((3, rows, groups, 16), U8), exponents(3, rows, groups)
        found = decoded(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales})
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        for expert in range(3):
            assert_same(found[f"{name}[{expert}]"], expected[expert])


def test_every_exponent_and_code_equals_transformers(tmp_path: Path) -> None:
    name = "m.experts.down_proj"
    # The exponent 255 is not a power of two in float32, and libraries differ in it.
    blocks = torch.arange(256, dtype=U8).reshape(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=U8).reshape(1, 255, 1).repeat(1, 1, 16)
    found = decoded(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert_same(found[f"{name}[0]"], expected[0])


@pytest.mark.parametrize("codes_type", [torch.int8, U8])
@pytest.mark.parametrize("scale", ["scale", "weight_scale", "weight_scale_inv"])
def test_experts_of_deepseek_equal_transformers(tmp_path: Path, codes_type: torch.dtype, scale: str) -> None:
    codes, scales = random_codes((48, 64), codes_type), exponents(48, 4).view(E8M0)
    found = decoded(tmp_path, {"a.weight": codes, f"a.{scale}": scales})["a"]
    expected = Fp8Dequantize(None)._dequantize_one(codes.view(torch.int8), scales, torch.float32)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(96, 128), (7, 32), (1, 64)])
def test_values_equal_compressed_tensors(tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    is_nv = kind == "nvfp4"
    options: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True}
    options |= (
        {"strategy": "tensor_group", "group_size": 16, "scale_dtype": FP8}
        if is_nv
        else {"strategy": "group", "group_size": 32, "scale_dtype": U8}
    )
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**options)
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(f"{kind}-pack-quantized")
    size = options["group_size"]
    state = {"weight": torch.randn(shape), "weight_scale": torch.rand(shape[0], shape[1] // size) + 0.2}
    if is_nv:
        state["weight_global_scale"] = torch.tensor([2.7])
    stored = compressor.compress(state, scheme)
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    found = decoded(tmp_path, {f"a.{name}": value for name, value in stored.items()})["a"]
    # The library computes the same products in the type of the scales; these are powers of two for MXFP4.
    factor = scale.float() / 2.7 if is_nv else torch.exp2(scale.float() - 127)
    factor = scale.float() / stored["weight_global_scale"] if is_nv else factor
    assert_same(found, unpacked(packed) * factor.repeat_interleave(size, 1))
    theirs = compressor.decompress(dict(stored), scheme)["weight"]
    torch.testing.assert_close(torch.from_numpy(found), theirs.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("overall", [0.37, 1e-30, 3e37])
def test_two_levels_of_modelopt_are_multiplied_first(tmp_path: Path, overall: float) -> None:
    codes, scales = random_codes((33, 24), U8), random_codes((33, 3), FP8, 1)
    second = torch.tensor(overall)
    tensors = {"a.weight": codes, "a.weight_scale": scales, "a.weight_scale_2": second}
    factor = (scales.float() * second).repeat_interleave(16, 1)
    assert_same(decoded(tmp_path, tensors)["a"], unpacked(codes) * factor)


def test_stacked_experts_of_modelopt_have_their_own_overall_scales(tmp_path: Path) -> None:
    name = "m.experts.gate_up_proj"
    codes, scales, second = random_codes((4, 64, 32), U8), random_codes((4, 64, 4), FP8, 1), torch.rand(4)
    tensors = {name: codes, f"{name}_weight_scale": scales, f"{name}_weight_scale_2": second}
    found = decoded(tmp_path, tensors)
    for expert in range(4):
        factor = (scales[expert].float() * second[expert]).repeat_interleave(16, 1)
        assert_same(found[f"{name}[{expert}]"], unpacked(codes[expert]) * factor)
