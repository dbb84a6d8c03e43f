"""The analysis of quantized checkpoints equals that of the dequantized model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorank
from tests.support.decoded_matrices import write_model
from tests.support.quantized_models import (
    BLOCK,
    FP8,
    SIZES,
    deepseek_v3,
    gpt_oss,
    in_fp8_blocks,
    is_linear,
    kimi,
    loaded,
    qwen3,
    qwen3_moe,
    stored,
    with_settings,
)


def assert_equal_reports(folder: Path, model: Any) -> None:
    found = lorank.analyze(folder, progress=False)
    expected = lorank.analyze(model, progress=False)
    assert {row.name for row in found} == {row.name for row in expected}
    assert found.num_parameters == expected.num_parameters
    for row in found:
        other = expected[row.name]
        assert (row.shape, row.kind, row.mp_spikes) == (other.shape, other.kind, other.mp_spikes), row.name
        assert row.alpha_hill == pytest.approx(other.alpha_hill, rel=1e-12), row.name
        assert row.stable_rank == pytest.approx(other.stable_rank, rel=1e-12), row.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [deepseek_v3, qwen3, qwen3_moe, gpt_oss, kimi])
def test_analysis_equals_that_of_the_dequantized_model(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    assert_equal_reports(folder, loaded(folder))


@pytest.mark.filterwarnings("ignore")
def test_experts_of_llama4_with_a_scale_per_output(tmp_path: Path) -> None:
    """FBGEMM's own loader needs a GPU: the dequantized tensors are stored and loaded as a plain model."""
    config = transformers.Llama4TextConfig(
        **{**SIZES, "intermediate_size": 32},
        intermediate_size_mlp=64,
        num_local_experts=3,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )
    tensors = stored(transformers.Llama4ForCausalLM, config, tmp_path / "plain")
    packed = dict(tensors)
    for name in [name for name in tensors if "experts." in name and name.endswith("_proj")]:
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) / 448
        packed[name] = (weight / scale).to(FP8)
        packed[f"{name}_scale"] = scale
        tensors[name] = packed[name].float() * scale
    assert len(packed) > len(tensors)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    folder = with_settings(tmp_path / "small", packed, {"quant_method": "fbgemm_fp8"})
    plain_config = (tmp_path / "plain" / "config.json").read_text()
    write_model(tmp_path / "plain", tensors)
    (tmp_path / "plain" / "config.json").write_text(plain_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert_equal_reports(folder, model)


def test_compare_takes_a_quantized_checkpoint_and_its_float_original(tmp_path: Path) -> None:
    folders = [tmp_path / "float", tmp_path / "fp8"]
    for folder in folders:
        tensors = stored(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES), folder)
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    quantized = in_fp8_blocks(tensors)
    with_settings(folders[1], quantized, settings)
    report = lorank.compare(*folders, progress=False)
    rows = {row.name: row.relative_change for row in report}
    assert {f"{name}.weight" for name in rows} >= {name for name, x in tensors.items() if is_linear(name, x)}
    for name, change in rows.items():
        weight = tensors[f"{name}.weight"].double()
        if is_linear(f"{name}.weight", weight):
            scale = quantized[f"{name}.weight_scale_inv"]
            blocks = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            decoded = (quantized[f"{name}.weight"].float() * blocks).double()
            assert change == pytest.approx(float((decoded - weight).norm() / weight.norm()), rel=1e-6)
            assert 0.001 < change < 0.1
        else:
            assert change == 0
