"""Conversions of adapters to every layout of language models and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, loaded
from tests.support.command_line import run
from tests.support.layouts import (
    DOWN,
    GATE_UP,
    assert_same_bits,
    base_folder,
    expert_adapter,
    llama_adapter,
)
from tests.support.outputs import outputs

MODELS = {"llama": tiny_models.llama, "qwen3_moe": tiny_models.qwen3_moe, "mixtral": tiny_models.mixtral}
NAMES = {"gguf": "a.gguf"}


def source(model: str, folder: Path, **settings: Any) -> Path:
    if model == "llama":
        return llama_adapter(folder, **settings)
    return expert_adapter(MODELS[model](), folder, **settings)


def there_and_back(folder: Path, to: Any, base: Any, tmp_path: Path) -> lorank.LoraAdapter:
    """Convert an adapter to a layout and back; return the result."""
    first, second = tmp_path / NAMES.get(to, f"to {to}"), tmp_path / f"from {to}"
    lorank.convert(folder, to, base=base).save(first, "exact")
    lorank.convert(first, "peft", base=base).save(second, "exact")
    return lorank.LoraAdapter.load(second)


def test_command_converts_there_and_back(tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "a")
    base = base_folder(tiny_models.llama(), tmp_path / "base")
    for arguments in (
        (folder, "-o", tmp_path / "b.gguf", "--to", "gguf"),
        (tmp_path / "b.gguf", "-o", tmp_path / "c", "--to", "peft"),
    ):
        result = run("convert", *arguments, "--base", base)
        assert result.returncode == 0, result.stderr
    assert_same_bits(lorank.LoraAdapter.load(folder), lorank.LoraAdapter.load(tmp_path / "c"))
    assert run("info", tmp_path / "b.gguf").returncode == 0
    refused = run("convert", tmp_path / "b.gguf", "-o", tmp_path / "d", "--to", "peft")
    assert (refused.returncode, "name the base model" in refused.stderr) == (1, True)
    assert run("convert", folder, "-o", tmp_path / "d", "--to", "none").returncode == 2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("to", ["peft", "peft-0.18", "per-expert", "mlx", "gguf", "torchtune"])
def test_round_trip_keeps_every_bit(to: str, model: str, tmp_path: Path) -> None:
    if to == "torchtune" and model != "llama":
        pytest.skip("torchtune has no stacks")
    folder = source(model, tmp_path / "a")
    base = MODELS[model]()
    again = there_and_back(folder, to, base, tmp_path)
    assert_same_bits(lorank.LoraAdapter.load(folder), again)
    expected = outputs(loaded(MODELS[model](), folder))
    torch.testing.assert_close(
        outputs(loaded(MODELS[model](), tmp_path / f"from {to}")), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf", "torchtune"])
def test_scalings_of_patterns_fold_or_stay(to: str, tmp_path: Path) -> None:
    settings = {"alpha_pattern": {"v_proj": 24, "layers.0.mlp.up_proj": 3}, "use_rslora": to == "mlx"}
    folder = llama_adapter(tmp_path / "a", **settings)
    base = tiny_models.llama()
    again, before = there_and_back(folder, to, base, tmp_path), lorank.LoraAdapter.load(folder)
    if to == "peft":
        assert_same_bits(before, again)
    for name, update in dense(before).items():
        np.testing.assert_allclose(dense(again)[name], update, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("to", ["mlx", "gguf", "per-expert"])
def test_ranks_of_modules_stay(to: str, tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "a", rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 4.5})
    base = tiny_models.llama()
    again = there_and_back(folder, to, base, tmp_path)
    if to == "gguf":  # One alpha holds for all ranks.
        assert {m.rank for m in again.modules.values()} == {3, 6}
        assert again.modules["model.layers.0.self_attn.v_proj"].rank == 3
    else:
        assert_same_bits(lorank.LoraAdapter.load(folder), again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("to", ["mlx", "gguf", "torchtune", "peft"])
def test_types_stay(to: str, dtype: str, tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "full")
    lorank.convert(folder, "peft").save(tmp_path / "a", "exact", dtype)
    base = tiny_models.llama()
    again = there_and_back(tmp_path / "a", to, base, tmp_path)
    assert {module.dtype for module in again.modules.values()} == {dtype}
    assert_same_bits(lorank.LoraAdapter.load(tmp_path / "a"), again)


@pytest.mark.parametrize("to", ["mlx", "torchtune"])
def test_dora_stays(to: str, tmp_path: Path) -> None:
    folder = llama_adapter(tmp_path / "a", use_dora=True)
    base = tiny_models.llama()
    assert_same_bits(lorank.LoraAdapter.load(folder), there_and_back(folder, to, base, tmp_path))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / f"from {to}"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key])
    expected = outputs(loaded(tiny_models.llama(), folder))
    torch.testing.assert_close(
        outputs(loaded(tiny_models.llama(), tmp_path / f"from {to}")), expected, rtol=1e-5, atol=1e-6
    )


def test_earlier_layout_is_read_by_its_shapes(tmp_path: Path) -> None:
    folder = expert_adapter(tiny_models.qwen3_moe(), tmp_path / "a")
    lorank.convert(folder, "peft-0.18").save(tmp_path / "b", "exact")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["peft_version"] == "0.18.1"
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    current, earlier = (load_file(tmp_path / x / "adapter_model.safetensors")[key].shape for x in "ab")
    assert current == (16, 32)
    assert earlier == (16, 48)
    (verdict,) = lorank.check(tmp_path / "b", ["peft"])
    assert verdict.status == "refuses"
    assert_same_bits(lorank.LoraAdapter.load(folder), lorank.LoraAdapter.load(tmp_path / "b"))


def test_per_expert_keys_are_those_of_transformers_4(tmp_path: Path) -> None:
    folder = expert_adapter(tiny_models.qwen3_moe(), tmp_path / "a")
    lorank.convert(folder, "per-expert").save(tmp_path / "b", "exact")
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_{}.weight"
    assert (tensors[key.format("B")].shape, tensors[key.format("A")].shape) == ((24, 4), (4, 32))
    expected = outputs(loaded(tiny_models.qwen3_moe(), folder))
    torch.testing.assert_close(
        outputs(loaded(tiny_models.qwen3_moe(), tmp_path / "b")), expected, rtol=1e-4, atol=1e-5
    )


def test_stacks_of_other_orders_are_not_split(tmp_path: Path) -> None:
    folder = expert_adapter(tiny_models.gpt_oss(), tmp_path / "a", target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "openai/gpt-oss-20b"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for to in ("per-expert", "mlx"):
        with pytest.raises(ValueError, match="gate and up are interleaved"):
            lorank.convert(folder, to)  # type: ignore[arg-type]
    again = lorank.convert(folder, "peft-0.18")
    assert (
        again.modules[f"model.layers.0.{GATE_UP}"].shape
        == lorank.LoraAdapter.load(folder).modules[f"model.layers.0.{GATE_UP}"].shape
    )
    assert f"model.layers.0.{DOWN}" in again.modules
