"""Every kind of layer with every option of LoRA: reading and insertion in live models, files of PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lorank
from tests.support.adapter_files import loaded
from tests.support.live_models import MODELS, assert_same, randomised
from tests.support.outputs import outputs

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "patterns": {
        "rank_pattern": {"first": 2, "q_proj": 3, "attention": 2, "gate_up_proj": 2, "table": 5},
        "alpha_pattern": {"first": 7, "q_proj": 1, "attention": 5, "gate_up_proj": 9},
    },
    "saved_module": {"modules_to_save": ["head", "lm_head"]},
    "dropout": {"lora_dropout": 0.2},
    "gaussian": {"init_lora_weights": "gaussian"},
}

# Layers whose adapters cannot be read: the update of a grouped convolution is not a product.
REFUSED = {("groups", option) for option in OPTIONS}


def built(model: str, option: str) -> tuple[Any, Any, torch.Tensor]:
    """Return the base model, an adapted copy with random factors, and inputs; skip where PEFT refuses."""
    make, inputs, targets = MODELS[model]
    torch.manual_seed(0)
    base = make().eval()
    try:
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, **targets, **OPTIONS[option]})
        adapted = get_peft_model(copy.deepcopy(base), config).eval()
    except (ValueError, TypeError, AttributeError) as error:
        pytest.skip(f"PEFT: {error}")
    return base, randomised(adapted), inputs


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_adapter_is_read_and_inserted(model: str, option: str, tmp_path: Path) -> None:
    base, adapted, inputs = built(model, option)
    before = outputs(adapted, inputs)
    assert (before - outputs(base, inputs)).abs().max() > 1e-3
    if (model, option) in REFUSED:
        with pytest.raises(ValueError, match="groups"):
            lorank.LoraAdapter.from_model(adapted)
        return
    adapter = lorank.LoraAdapter.from_model(adapted)

    adapter.into_model(adapted)
    assert_same(outputs(adapted, inputs), before)

    cut = lorank.compress(adapter, rank_ratio=0.5, scope="module", progress=False)
    cut.save(tmp_path / "cut")
    expected = outputs(loaded(base, tmp_path / "cut"), inputs)
    assert (before - expected).abs().max() > 1e-3
    cut.into_model(adapted)
    assert_same(outputs(adapted, inputs), expected)
    assert_ties(base, adapted)

    adapted.save_pretrained(tmp_path / "by_peft")
    assert_same(
        outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "by_peft"), inputs), expected
    )

    adapter.into_model(adapted)
    assert_same(outputs(adapted, inputs), before)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", [name for name in MODELS if name != "groups"])
def test_adapter_is_added_under_another_name(model: str, option: str) -> None:
    base, adapted, inputs = built(model, option)
    before = outputs(adapted, inputs)
    cut = lorank.compress(
        lorank.LoraAdapter.from_model(adapted), rank_ratio=0.5, scope="module", progress=False
    )
    cut.into_model(adapted)
    expected = outputs(adapted, inputs)

    _, adapted, _ = built(model, option)
    if "bias_" in option:
        pytest.skip("biases are the base model's: all adapters share them")
    learns = {name: p.requires_grad for name, p in adapted.named_parameters()}
    cut.into_model(adapted, "other")
    assert_same(outputs(adapted, inputs), before)
    assert {name: p.requires_grad for name, p in adapted.named_parameters() if name in learns} == learns
    adapted.set_adapter("other")
    assert_same(outputs(adapted.eval(), inputs), expected)
    adapted.set_adapter("default")
    assert_same(outputs(adapted, inputs), before)
    assert_ties(base, adapted)


@pytest.mark.parametrize("ratio", [0.2, 0.35])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "groups"])
def test_modules_without_rank_have_no_update(model: str, ratio: float, tmp_path: Path) -> None:
    base, adapted, inputs = built(model, "plain")
    before = outputs(adapted, inputs)
    adapter = lorank.LoraAdapter.from_model(adapted)
    cut = lorank.compress(adapter, rank_ratio=ratio, progress=False)
    cut.save(tmp_path / "cut")
    expected = outputs(loaded(base, tmp_path / "cut"), inputs)
    cut.into_model(adapted)
    assert_same(outputs(adapted, inputs), expected)
    adapted.save_pretrained(tmp_path / "by_peft")
    assert_same(outputs(loaded(base, tmp_path / "by_peft"), inputs), expected)
    adapter.into_model(adapted)
    assert_same(outputs(adapted, inputs), before)
    adapted.save_pretrained(tmp_path / "whole")
    assert_same(outputs(loaded(base, tmp_path / "whole"), inputs), before)


def assert_ties(base: Any, adapted: Any) -> None:
    """Check that tied tables still share a parameter and tied layers their factors."""
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return
    table, head = adapted.get_base_model().get_input_embeddings(), adapted.get_base_model().lm_head
    if hasattr(head, "modules_to_save"):
        return
    weights = [getattr(layer, "base_layer", layer).weight for layer in (table, head)]
    assert weights[0] is weights[1]
    if hasattr(head, "lora_A") and adapted.peft_config["default"].ensure_weight_tying:
        # PEFT shares the factors of the first adapter only.
        shared = head.lora_A["default"].weight.untyped_storage().data_ptr()
        assert shared == table.lora_embedding_B["default"].untyped_storage().data_ptr()
