"""Fisher importance on tiny models: adapter names and adapters that raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import trained

BATCHES = [{"input_ids": (ids := torch.arange(1, 9)[None] + k), "labels": ids} for k in range(2)]


def live(adapter_name: str = "default", **settings: Any) -> tuple[Any, lorank.LoraAdapter]:
    """Return a model with an elastic adapter of the given name, and the adapter."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **settings})
    model = trained(tiny_models.llama(), config)
    parent = lorank.elastic(lorank.LoraAdapter.from_model(model), progress=False)
    parent.into_model(model, adapter_name)
    model.set_adapter(adapter_name)
    return model, parent


@pytest.mark.parametrize("name", ["default", "model", "self_attn", "lora_A"])
def test_any_adapter_name_is_accepted(name: str) -> None:
    model, parent = live(name)
    scores = lorank.fisher_scores(model, BATCHES, adapter_name=name)
    assert {key: len(value) for key, value in scores.items()} == parent.ranks
    assert all((value > 0).all() for value in scores.values())
    expected = lorank.fisher_scores(live()[0], BATCHES)
    assert all(scores[key] == pytest.approx(expected[key], rel=1e-5) for key in expected)


def test_adapters_not_in_spectral_form_raise() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = trained(tiny_models.llama(), config)
    with pytest.raises(ValueError, match=r"module .*: .* lorank\.elastic"):
        lorank.fisher_scores(model, BATCHES)
