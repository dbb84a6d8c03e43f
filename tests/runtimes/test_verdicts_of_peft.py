"""Verdicts of `check` on PEFT and transformers, compared with their outputs for the same files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import configured, edited, loaded, saved
from tests.support.outputs import outputs

PREFIX = "base_model.model."

Edit = Callable[[Path], object]


def random_adapter(model: Any, config: Any) -> Any:
    """Return a live adapter with random values, written in place so that parameters stay tied."""
    live = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "modules_to_save" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.add_(0.1)
    return live


def through_transformers(model: Any, folder: Path) -> Any:
    live = copy.deepcopy(model)
    live.load_adapter(str(folder))
    return live


LOADERS = {"peft": loaded, "transformers": through_transformers}


def seen(model: Any, folder: Path, expected: torch.Tensor, runtime: str) -> str:
    """Load an adapter in a runtime and compare its logits; return the true status."""
    try:
        got = outputs(LOADERS[runtime](model, folder).eval())
    except (RuntimeError, ValueError):
        return "refuses"
    return "right" if torch.allclose(got, expected, rtol=1e-4, atol=1e-5) else "wrong"


def renamed(change: Callable[[str], str]) -> Edit:
    def edit(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    return lambda folder: edited(folder, edit)


def rank_of(folder: Path, module: str, rank: int) -> None:
    """Cut a module's factors, and set their rank in the settings."""

    def edit(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if f".{module}.lora_" in key]:
            is_a = key.endswith(("lora_A.weight", "lora_embedding_A"))
            tensors[key] = tensors[key][:rank].copy() if is_a else tensors[key][:, :rank].copy()

    configured(edited(folder, edit), rank_pattern={module: rank}, alpha_pattern={module: rank})


def spoiled(value: float) -> Edit:
    def edit(tensors: dict[str, Any]) -> None:
        next(x for key, x in tensors.items() if "v_proj.lora_B" in key)[1, 1] = value

    return lambda folder: edited(folder, edit)


def unchanged(folder: Path) -> None:
    del folder


LLAMA, TIED = tiny_models.llama, tiny_models.llama_tied
BERT = tiny_models.bert_classifier
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], Edit]] = {
    "plain": (LLAMA, {}, unchanged),
    "rslora": (LLAMA, {"use_rslora": True}, unchanged),
    "patterns": (LLAMA, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, unchanged),
    "dora": (LLAMA, {"use_dora": True}, unchanged),
    "lora_bias": (LLAMA, {"lora_bias": True}, unchanged),
    "alora": (LLAMA, {"alora_invocation_tokens": [3, 4]}, unchanged),
    "replicated layers": (LLAMA, {"layer_replication": [[0, 2], [1, 2]]}, unchanged),
    "saved head": (LLAMA, {"modules_to_save": ["lm_head"]}, unchanged),
    "saved norm": (LLAMA, {"modules_to_save": ["norm"]}, unchanged),
    "tokens": (LLAMA, {"trainable_token_indices": [3, 5]}, unchanged),
    "embedding": (LLAMA, {"target_modules": ["q_proj", "embed_tokens"]}, unchanged),
    "head": (LLAMA, {"target_modules": ["q_proj", "lm_head"]}, unchanged),
    "biases": (BERT, {"target_modules": ["query"], "bias": "all"}, unchanged),
    "classifier": (BERT, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, unchanged),
    "pissa": (LLAMA, {"init_lora_weights": "pissa"}, unchanged),
    "olora": (LLAMA, {"init_lora_weights": "olora"}, unchanged),
    "pissa by iterations": (LLAMA, {"init_lora_weights": "pissa_niter_4"}, unchanged),
    "tied": (
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        unchanged,
    ),
    "tied, unequal": (
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        lambda folder: rank_of(folder, "lm_head", 2),
    ),
    "untied, unequal": (
        LLAMA,
        {"target_modules": ["lm_head", "embed_tokens"], "rank_pattern": {"lm_head": 2}},
        unchanged,
    ),
    "targets leave out": (LLAMA, {}, lambda f: configured(f, target_modules=["q_proj"])),
    "no targets beside parameters": (
        tiny_models.mixtral,
        {"target_parameters": ["mlp.experts.down_proj"]},
        lambda f: configured(f, target_modules=None),
    ),
    "other rank": (LLAMA, {}, lambda f: configured(f, r=3)),
    "compiled": (LLAMA, {}, renamed(lambda key: f"_orig_mod.{key}")),
    "compiled within": (LLAMA, {}, renamed(lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."))),
    "a sharded block": (
        LLAMA,
        {},
        renamed(lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    ),
    "checkpointed blocks": (
        LLAMA,
        {},
        renamed(lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")),
    ),
    "DeepSpeed": (LLAMA, {}, renamed(lambda key: f"_forward_module.{key}")),
    "data parallel": (LLAMA, {}, renamed(lambda key: f"module.{key}")),
    "data parallel within": (LLAMA, {}, renamed(lambda key: key.replace(PREFIX, f"{PREFIX}module."))),
    "no prefix": (LLAMA, {}, renamed(lambda key: key.removeprefix(PREFIX))),
    "NaN": (LLAMA, {}, spoiled(float("nan"))),
    "infinite": (LLAMA, {}, spoiled(float("inf"))),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_agree_with_peft_and_transformers(name: str, tmp_path: Path) -> None:
    build, config, edit = CASES[name]
    model = build()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
    live = random_adapter(model, LoraConfig(**settings))
    expected = outputs(live.eval())
    folder = saved(live, tmp_path)
    edit(folder)
    for verdict, runtime in zip(lorank.check(folder, list(LOADERS)), LOADERS, strict=True):
        assert verdict.status == seen(model, folder, expected, runtime), (runtime, verdict)


def test_verdicts_on_adalora_agree_with_peft(tmp_path: Path) -> None:
    model = LLAMA()
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=4, total_step=10)
    live = random_adapter(model, config)
    folder = saved(live, tmp_path)
    for verdict, runtime in zip(lorank.check(folder, list(LOADERS)), LOADERS, strict=True):
        assert verdict.status == seen(model, folder, outputs(live.eval()), runtime) == "right"


@pytest.mark.parametrize("init", ["corda", "loftq"])
def test_initialisations_that_need_data_are_refused(init: str, tmp_path: Path) -> None:
    live = random_adapter(LLAMA(), LoraConfig(r=4, target_modules=["q_proj"]))
    folder = configured(saved(live, tmp_path), init_lora_weights=init)
    (verdict,) = lorank.check(folder, ["peft"])
    assert (verdict.status, init in verdict.reason) == ("refuses", True)
    with pytest.raises(ValueError, match=r"corda|loftq"):
        loaded(LLAMA(), folder)
    with pytest.raises(lorank.FormatError, match="changes the base model"):
        lorank.LoraAdapter.load(folder)


def test_settings_incompatible_with_parameters_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    folder = saved(random_adapter(tiny_models.mixtral(), config), tmp_path)
    assert lorank.check(folder, ["peft"])[0].status == "right"
    for setting in ({"lora_dropout": 0.1}, {"fan_in_fan_out": True}):
        configured(folder, lora_dropout=0.0, fan_in_fan_out=False)
        configured(folder, **setting)
        (verdict,) = lorank.check(folder, ["peft"])
        assert (verdict.status, "adapted parameters" in verdict.reason) == ("refuses", True)
        with pytest.raises(ValueError, match="does not work with"):
            loaded(tiny_models.mixtral(), folder)


def test_tensor_with_infinite_values_is_named(tmp_path: Path) -> None:
    folder = saved(random_adapter(LLAMA(), LoraConfig(r=4, target_modules=["v_proj"])), tmp_path)
    spoiled(float("-inf"))(folder)
    verdicts = [verdict for verdict in lorank.check(folder) if verdict.reads_format]
    refusing = {verdict.runtime for verdict in verdicts if verdict.status == "refuses"}
    assert not refusing
    for verdict in verdicts:
        assert verdict.status == "wrong"
        assert "lora_B of model.layers.0.self_attn.v_proj holds Inf" in verdict.reason


def test_saved_modules_are_searched_for_nan(tmp_path: Path) -> None:
    live = random_adapter(LLAMA(), LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    folder = saved(live, tmp_path)

    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}lm_head.weight"][-1, -1] = float("nan")

    edited(folder, edit)
    (verdict,) = lorank.check(folder, ["peft"])
    assert "base_model.model.lm_head.weight holds NaN" in verdict.reason
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


class Attending(torch.nn.Module):
    """A module with torch's attention, whose input and output projections PEFT adapts under one name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.table = torch.nn.Embedding(64, 16)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        return SimpleNamespace(logits=self.attention(x, x, x)[0])


@pytest.mark.parametrize("pattern", [{}, {"attention": 2}])
def test_attention_of_torch_needs_one_rank(pattern: dict[str, int], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["attention"], rank_pattern=pattern)
    live = random_adapter(Attending(), config)
    folder = saved(live, tmp_path / "a")
    ranks = lorank.LoraAdapter.load(folder).ranks
    assert ranks == dict.fromkeys(("attention", "attention.base_layer.out_proj"), pattern.get("attention", 4))
    assert lorank.check(folder, ["peft"])[0].status == "right"
    assert seen(Attending(), folder, outputs(live.eval()), "peft") == "right"
    rank_of(folder, r"attention.base_layer.out_proj", 1)
    configured(folder, rank_pattern={**pattern, r"attention\.base_layer\.out_proj": 1})
    (verdict,) = lorank.check(folder, ["peft"])
    assert (verdict.status, "out_proj has rank 1" in verdict.reason) == ("refuses", True)
    assert seen(Attending(), folder, outputs(live.eval()), "peft") == "refuses"


@pytest.mark.parametrize("shape", [(7, 262147), (262147, 3), (524288,), (1, 131072), ()])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_last_value_is_searched_for_nan(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    folder = saved(random_adapter(LLAMA(), LoraConfig(r=4, target_modules=["v_proj"])), tmp_path)

    def edit(tensors: dict[str, Any]) -> None:
        large = np.full(shape, 3e4, dtype=dtype)
        tensors[f"{PREFIX}model.norm.weight"] = large
        tensors[f"{PREFIX}counts"] = np.arange(5)

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}model.norm.weight"].reshape(-1)[-1:] = np.nan

    edited(folder, edit)
    assert lorank.check(folder, ["peft"])[0].status == "right"
    edited(folder, spoil)
    (verdict,) = lorank.check(folder, ["peft"])
    assert "model.norm.weight holds NaN" in verdict.reason


def test_pickled_adapters_are_searched_for_nan(tmp_path: Path) -> None:
    folder = saved(random_adapter(LLAMA(), LoraConfig(r=4, target_modules=["v_proj"])), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"][2, 3] = float("inf")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    (verdict,) = lorank.check(folder, ["peft"])
    assert "lora_A of model.layers.1.self_attn.v_proj holds Inf" in verdict.reason
