"""The analysis of quantized checkpoints equals that of the dequantized model that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorank
from tests.support.decoded_matrices import random_codes, write_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
BLOCK = 16
FP8 = torch.float8_e4m3fn

Tensors = dict[str, torch.Tensor]


def stored(model: type[Any], config: Any, folder: Path) -> Tensors:
    """Return the tensors of a new model as transformers stores them, and write its configuration."""
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    others = ("embed_tokens", "lm_head", "norm", "router", "mlp.gate.")
    return tensor.ndim == 2 and name.endswith(".weight") and not any(part in name for part in others)


def in_fp8_blocks(tensors: Tensors) -> Tensors:
    """Quantize linear layers in square blocks, as DeepSeek and Qwen do."""
    found = dict(tensors)
    for name, weight in tensors.items():
        if is_linear(name, weight):
            blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax((1, 3)) / 448
            found[name] = (blocks / scale[:, None, :, None]).to(FP8).reshape(weight.shape)
            found[f"{name}_scale_inv"] = scale
    return found


def with_settings(folder: Path, tensors: Tensors, quantization: dict[str, Any]) -> Path:
    """Write the tensors beside the configuration of their model."""
    config = json.loads((folder / "config.json").read_text())
    write_model(folder, tensors)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def deepseek_v3(folder: Path) -> Path:
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        **MOE,
        **LATENT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    )
    tensors = stored(transformers.DeepseekV3ForCausalLM, config, folder)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in tensors
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return with_settings(folder, in_fp8_blocks(tensors), settings)


def qwen3(folder: Path) -> Path:
    tensors = stored(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES), folder)
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return with_settings(folder, in_fp8_blocks(tensors), settings)


def qwen3_moe(folder: Path) -> Path:
    config = transformers.Qwen3MoeConfig(**SIZES, **MOE, num_experts=4)
    tensors = stored(transformers.Qwen3MoeForCausalLM, config, folder)
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return with_settings(folder, in_fp8_blocks(tensors), settings)


def gpt_oss(folder: Path) -> Path:
    config = transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 32}, num_local_experts=3, num_experts_per_tok=2
    )
    tensors = stored(transformers.GptOssForCausalLM, config, folder)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, fan_in, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = random_codes((experts, out, fan_in // 32, 16), torch.uint8)
        scales = torch.randint(118, 124, (experts, out, fan_in // 32), dtype=torch.uint8)
        tensors[f"{name}_scales"] = scales
    return with_settings(folder, tensors, {"quant_method": "mxfp4"})


def kimi(folder: Path) -> Path:
    """Return a DeepSeek-V3 model whose routed experts are packed integers of compressed-tensors."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        **MOE,
        **LATENT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    )
    tensors = stored(transformers.DeepseekV3ForCausalLM, config, folder)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        scale = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
        state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": value for part, value in state.items()}
    group = {"targets": ["Linear"], "weights": weights}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|down)_proj.*",
        ],
    }
    return with_settings(folder, tensors, settings)


def loaded(folder: Path) -> Any:
    """Return the model that transformers loads and dequantizes, in float32."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    classes = {
        "fp8": transformers.FineGrainedFP8Config,
        "mxfp4": transformers.Mxfp4Config,
        "compressed-tensors": transformers.CompressedTensorsConfig,
    }
    options = {key: value for key, value in settings.items() if key != "quant_method"}
    options = {} if settings["quant_method"] == "mxfp4" else options
    config = classes[settings["quant_method"]](**options, dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
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
