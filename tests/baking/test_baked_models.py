"""A baked model equals the model that PEFT merges, for many architectures and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lorank
from tests.baking.merged_models import assert_equal_models, baked_beside, logits, merged, saved_pair
from tests.support import architectures, tiny_models
from tests.support.peft_cases import CASES, case


def assert_baked(model: Any, config: Any, folder: Path) -> None:
    """Assert that transformers loads the baked model as PEFT's merged model, with the same outputs."""
    base, adapter, adapted = saved_pair(model, config, folder)
    baked_beside(base, adapter)
    found = type(model).from_pretrained(folder / "baked").eval()
    expected = merged(adapted).eval()
    assert_equal_models(found, expected)
    before = logits(model)
    assert torch.allclose(logits(found), logits(expected), atol=2e-5)
    assert not torch.allclose(before, logits(found), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "lora_bias"])
def test_baked_adapter_equals_merged_model(name: str, tmp_path: Path) -> None:
    model, config = case(name)
    assert_baked(model, config, tmp_path)


ARCHITECTURES = {
    "OPTForCausalLM": ["q_proj", "fc1"],
    "BloomForCausalLM": ["query_key_value", "dense_h_to_4h"],
    "GPTNeoXForCausalLM": ["query_key_value", "dense_4h_to_h"],
    "PhiForCausalLM": ["q_proj", "fc2"],
    "Phi3ForCausalLM": ["qkv_proj", "gate_up_proj"],
    "FalconForCausalLM": ["query_key_value"],
    "MambaForCausalLM": ["x_proj", "in_proj"],
    "Qwen2ForCausalLM": ["q_proj", "down_proj"],
    "Gemma2ForCausalLM": ["q_proj", "o_proj"],
    "BertForMaskedLM": ["query", "dense"],
    "RobertaForSequenceClassification": ["query", "value"],
    "Qwen2MoeForCausalLM": ["q_proj", "gate_proj"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_baked_architecture_equals_merged_model(name: str, tmp_path: Path) -> None:
    model = architectures.tiny(name)
    assert model is not None
    assert_baked(model, LoraConfig(r=4, lora_alpha=9, target_modules=ARCHITECTURES[name]), tmp_path)


@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "Llama4ForCausalLM", "OlmoeForCausalLM"])
def test_baked_experts_equal_merged_model(name: str, tmp_path: Path) -> None:
    model = architectures.tiny(name)
    assert model is not None
    parameters = [n for n, p in model.named_parameters() if "experts" in n and p.ndim == 3]
    assert parameters
    assert_baked(
        model, LoraConfig(r=2, lora_alpha=4, target_parameters=parameters, target_modules=[]), tmp_path
    )


def test_baked_biases_of_factors_equal_merged_model(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=["query", "dense"], lora_bias=True, modules_to_save=["classifier"]
    )
    assert_baked(tiny_models.bert_classifier(), config, tmp_path)


def test_bias_of_factors_without_a_bias_in_the_model_raises(tmp_path: Path) -> None:
    model, config = case("lora_bias")
    base, adapter, _ = saved_pair(model, config, tmp_path)
    with pytest.raises(lorank.FormatError, match="has no bias, but the adapter adds one"):
        baked_beside(base, adapter)


def test_baked_t5_equals_merged_model(tmp_path: Path) -> None:
    assert_baked(tiny_models.t5(), LoraConfig(r=4, target_modules=["q", "wo", "shared"]), tmp_path)


def test_baked_sum_of_adapters_equals_the_sum_of_updates(tmp_path: Path) -> None:
    model = tiny_models.llama()
    base, first, a = saved_pair(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path / "a")
    _, second, b = saved_pair(
        model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_rslora=True), tmp_path / "b"
    )
    lorank.bake(base, [first, second], tmp_path / "baked", [0.7, -0.4], progress=False)
    found = type(model).from_pretrained(tmp_path / "baked")
    before, a, b = model.state_dict(), merged(a).state_dict(), merged(b).state_dict()
    for name, value in found.state_dict().items():
        expected = before[name] + 0.7 * (a[name] - before[name]) - 0.4 * (b[name] - before[name])
        assert torch.allclose(value, expected, atol=2e-6), name


def test_baked_tied_head_changes_the_embedding(tmp_path: Path) -> None:
    model = tiny_models.llama_tied()
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    base, adapter, adapted = saved_pair(model, config, tmp_path)
    baked = baked_beside(base, adapter)
    assert any("shares its weight with" in note for note in baked.notes)
    assert_equal_models(type(model).from_pretrained(tmp_path / "baked"), merged(adapted))
