"""Targets of allocations from files: tied heads, weights adapted by their parameter, pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

import lorank
from tests.support.architectures import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def allocated(folder: Path, targets: Any) -> lorank.RankAllocation:
    return lorank.allocate(str(folder), "uniform", r_min=1, r_max=4, targets=targets, progress=False)


def test_tied_head_is_named_with_its_embedding(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head shares the weight of model\.embed_tokens: target"):
        allocated(tmp_path, ["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="no module is named 'lm_heads'"):
        allocated(tmp_path, ["q_proj", "lm_heads"])


@pytest.mark.parametrize("targets", [["down_proj"], r".*\.down_proj"])
def test_module_adapted_by_its_parameter_is_selected_by_its_name(targets: Any, tmp_path: Path) -> None:
    model = tiny("DeepseekV3ForCausalLM")
    assert model is not None
    model.save_pretrained(tmp_path)
    allocation = allocated(tmp_path, targets)
    layers = [name for name, _ in model.named_modules() if name.endswith(".down_proj")]
    assert sorted(name.removesuffix(".weight") for name in allocation.ranks) == sorted(layers)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**allocation.lora_settings()))
    number = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert number == allocation.num_parameters


def test_pipeline_raises_with_the_names_of_its_models(tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    assert model is not None
    model.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for path in (tmp_path, tmp_path / "model_index.json"):
        with pytest.raises(lorank.FormatError, match=r"pipeline of diffusers: .*\(text_encoder\)"):
            lorank.analyze(path, progress=False)
