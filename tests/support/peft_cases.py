"""Adapters of PEFT: one per feature of its configuration, and one with mixed ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import saved, trained

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PROFILES = ("compact", "portable", "tensor-rank")
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def config_of(model: Any, **kwargs: Any) -> LoraConfig:
    return lorank.allocate(model, "uniform", r_max=6).to_lora_config(model, lora_alpha=9, **kwargs)


def case(name: str) -> tuple[Any, LoraConfig]:
    llama, bert = tiny_models.llama(), tiny_models.bert_classifier()
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    cases: dict[str, Callable[[], tuple[Any, LoraConfig]]] = {
        "llama": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear)),
        "rslora": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear, use_rslora=True)),
        "patterns": lambda: (
            llama,
            LoraConfig(
                r=6,
                lora_alpha=9,
                target_modules=linear,
                rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 8},
                alpha_pattern={"v_proj": 20, r"layers\.0\.mlp\..*": 2},
            ),
        ),
        "regex": lambda: (llama, LoraConfig(r=6, target_modules=r".*layers\.1\..*_proj")),
        "gpt2": lambda: (gpt2 := tiny_models.gpt2(), config_of(gpt2)),
        "mixtral": lambda: (mixtral := tiny_models.mixtral(), config_of(mixtral)),
        "gpt_oss": lambda: (oss := tiny_models.gpt_oss(), config_of(oss)),
        "embedding": lambda: (bert, LoraConfig(r=6, target_modules=["query", "word_embeddings"])),
        "conv": lambda: (tiny_models.vit(), LoraConfig(r=6, target_modules=["projection", "q_proj"])),
        "dora": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear, use_dora=True)),
        "lora_bias": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear, lora_bias=True)),
        "head": lambda: (bert, LoraConfig(r=6, target_modules=["query"], task_type="SEQ_CLS")),
        "biases": lambda: (bert, LoraConfig(r=6, target_modules=["query"], bias="all")),
    }
    return cases[name]()


CASES = [
    "llama",
    "rslora",
    "patterns",
    "regex",
    "gpt2",
    "mixtral",
    "gpt_oss",
    "embedding",
    "conv",
    "dora",
    "lora_bias",
    "head",
    "biases",
]


def compressed_adapter(folder: Path, **knobs: Any) -> lorank.LoraAdapter:
    """Return a compressed adapter of mixed ranks, one of them 0."""
    model, config = case("patterns")
    small = lorank.compress(
        saved(trained(model, config), folder), progress=False, **(knobs or {"avg_rank": 1})
    )
    assert len(set(small.ranks.values())) > 2
    assert 0 in small.ranks.values()
    return small
