"""Verdicts that depend on the base model: names, shapes and ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorank
from lorank.runtimes.rules import RUNTIMES
from tests.support.architectures import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(10, 20)[None]


def adapter_of(model: Any, folder: Path, **settings: Any) -> Path:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def renamed(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key.replace(old, new): value for key, value in load_file(file).items()}, file)


def llama() -> Any:
    model = tiny("LlamaForCausalLM")
    assert model is not None
    return model


def test_adapter_of_its_base_model_is_right(tmp_path: Path) -> None:
    folder = adapter_of(llama(), tmp_path / "a", target_modules=["q_proj", "down_proj"])
    (verdict,) = lorank.check(folder, ["peft"], base=llama())
    assert verdict.status == "right"


@pytest.mark.parametrize("base", ["folder", "config.json", "live"])
def test_unmatched_names_are_reported_for_every_runtime(base: str, tmp_path: Path) -> None:
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    folder = adapter_of(llama(), tmp_path / "a", target_modules=["q_proj"])
    renamed(folder, "model.layers", "transformer.layers")
    places = {"folder": tmp_path / "base", "config.json": tmp_path / "base" / "config.json", "live": llama()}
    for verdict in lorank.check(folder, base=places[base]):
        if verdict.reads_format:
            assert verdict.status != "right", verdict
            assert "LlamaForCausalLM has no transformer.layers.0.self_attn.q_proj" in verdict.reason
    loaded = peft.PeftModel.from_pretrained(llama(), folder)
    assert torch.equal(loaded(IDS).logits, llama()(IDS).logits)


def test_closest_name_of_the_model_is_suggested(tmp_path: Path) -> None:
    classifier = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )
    folder = adapter_of(classifier.bert, tmp_path / "a", target_modules=["query"])
    (verdict,) = lorank.check(folder, ["peft"], base=classifier)
    assert verdict.status == "wrong"
    assert "leaves out all 1 modules" in verdict.reason
    assert "it has bert.encoder.layer.0.attention.self.query" in verdict.reason


def test_unfitting_shapes_are_refused_as_in_peft(tmp_path: Path) -> None:
    config = llama().config
    config.intermediate_size = 40
    wider = transformers.LlamaForCausalLM(config)
    folder = adapter_of(llama(), tmp_path / "a", target_modules=["down_proj"])
    (verdict,) = lorank.check(folder, ["peft"], base=wider)
    assert verdict.status == "refuses"
    assert "(32, 48)" in verdict.reason
    assert "(32, 40)" in verdict.reason
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(wider, folder)


def test_modules_that_peft_cannot_adapt_are_refused(tmp_path: Path) -> None:
    mamba = tiny("MambaForCausalLM")
    assert mamba is not None
    folder = adapter_of(mamba, tmp_path / "a", target_modules=["in_proj"])
    out, fan_in = dict(mamba.named_parameters())["backbone.layers.0.mixer.out_proj.weight"].shape
    at = "base_model.model.backbone.layers.0.mixer.out_proj"
    factors = {f"{at}.lora_A.weight": torch.randn(2, fan_in), f"{at}.lora_B.weight": torch.randn(out, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"in_proj"', '"out_proj"'))
    peft_row, vllm = lorank.check(folder, ["peft", "vllm"], base=tiny("MambaForCausalLM"))
    assert "scan reads the weight itself" in peft_row.reason
    assert "scan reads" not in vllm.reason


@pytest.mark.parametrize("tied", [True, False])
def test_tied_base_model_determines_how_llama_cpp_treats_tables(tied: bool, tmp_path: Path) -> None:
    config = llama().config
    config.tie_word_embeddings = tied
    model = transformers.LlamaForCausalLM(config)
    folder = adapter_of(model, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    (verdict,) = lorank.check(folder, ["llama.cpp"], base=transformers.LlamaForCausalLM(config))
    assert verdict.status == ("refuses" if tied else "right")
    assert "if the model" not in verdict.reason


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_of_either_layout_belong_to_their_model(stacked: bool, tmp_path: Path) -> None:
    model = tiny("Qwen3MoeForCausalLM")
    assert model is not None
    names = ["gate_up_proj", "down_proj"] if stacked else ["gate_proj", "up_proj", "down_proj"]
    targets = {"target_parameters": names, "target_modules": []} if stacked else {"target_modules": names}
    folder = adapter_of(model, tmp_path / "a", **targets)
    base = tiny("Qwen3MoeForCausalLM")
    (verdict,) = lorank.check(folder, ["peft"], base=base)
    assert verdict.status == "right", verdict
    (other,) = lorank.check(folder, ["peft"], base=llama())
    assert other.status != "right"


def test_base_without_config_and_weights_raises(tmp_path: Path) -> None:
    folder = adapter_of(llama(), tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, lorank.FormatError), match=r"no weights to read names from"):
        lorank.check(folder, base=tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        lorank.check(folder, base=tmp_path / "nowhere")


def test_embedding_fits_a_base_model_with_guessed_names(tmp_path: Path) -> None:
    save_file(
        {name: value.clone() for name, value in llama().state_dict().items()},
        tmp_path / "model.safetensors",
    )
    folder = adapter_of(llama(), tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    (verdict,) = lorank.check(folder, ["peft"], base=tmp_path)
    assert verdict.status == "right", verdict.reason


def test_every_runtime_has_a_rule_for_unknown_names() -> None:
    assert {runtime.unknown for runtime in RUNTIMES.values()} <= {"ignores", "refuses"}


def test_experts_under_names_of_files_belong_to_their_model(tmp_path: Path) -> None:
    """Files of Mixtral and adapters of transformers 4 name the loaded `mlp` `block_sparse_moe`."""
    model = tiny("MixtralForCausalLM", layers=1)
    assert model is not None
    folder = adapter_of(model, tmp_path / "a", target_modules=["q_proj"])
    factors = load_file(folder / "adapter_model.safetensors")
    at = "base_model.model.model.layers.0.block_sparse_moe.experts"
    for expert in range(4):
        for part, (out, fan_in) in {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items():
            factors[f"{at}.{expert}.{part}.lora_A.weight"] = torch.randn(2, fan_in)
            factors[f"{at}.{expert}.{part}.lora_B.weight"] = torch.randn(out, 2)
    save_file(factors, folder / "adapter_model.safetensors")
    peft.LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"]).save_pretrained(folder)
    base = tiny("MixtralForCausalLM", layers=1)
    (verdict,) = lorank.check(folder, ["peft"], base=base)
    assert verdict.status == "right", verdict
    loaded = peft.PeftModel.from_pretrained(tiny("MixtralForCausalLM", layers=1), folder)
    assert not torch.equal(loaded(IDS).logits, base(IDS).logits)
