"""Merged adapters keep the settings and tensors beside factors of every adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import configured, loaded, saved, trained

PLAIN = {"r": 4, "target_modules": ["query"]}
BOTH_WAYS = pytest.mark.parametrize("turned", [False, True])


def merged(folder: Path, turned: bool, *settings: dict[str, Any], model: Any = None) -> lorank.LoraAdapter:
    """Merge adapters with the given settings; save them and the result in `folder`."""
    base = model or tiny_models.bert_classifier()
    parts = []
    for k, more in enumerate(settings):
        live = trained(base, LoraConfig(**{**PLAIN, **more}), seed=k)
        for name, parameter in live.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
        parts.append(saved(live, folder / f"{k}"))
    result = lorank.merge(parts[::-1] if turned else parts, rank_ratio=1.0, progress=False)
    result.save(folder / "merged")
    return result


@BOTH_WAYS
def test_saved_modules_of_either_adapter_are_merged(turned: bool, tmp_path: Path) -> None:
    merged(tmp_path, turned, {}, {"modules_to_save": ["classifier"]})
    with_head = loaded(tiny_models.bert_classifier(), tmp_path / "1")
    got = loaded(tiny_models.bert_classifier(), tmp_path / "merged")
    head = got.base_model.model.classifier.modules_to_save.default.weight
    assert torch.equal(head, with_head.base_model.model.classifier.modules_to_save.default.weight)
    both = merged(
        tmp_path / "b", turned, {"modules_to_save": ["classifier"]}, {"modules_to_save": ["pooler"]}
    )
    assert set(both.config["modules_to_save"]) == {"classifier", "pooler"}


@BOTH_WAYS
def test_task_type_of_either_adapter_is_kept(turned: bool, tmp_path: Path) -> None:
    result = merged(tmp_path, turned, {"task_type": None}, {"task_type": "SEQ_CLS"})
    assert result.config["task_type"] == "SEQ_CLS"
    got = loaded(tiny_models.bert_classifier(), tmp_path / "merged")
    assert type(got).__name__ == "PeftModelForSequenceClassification"


@BOTH_WAYS
def test_biases_of_either_adapter_are_merged(turned: bool, tmp_path: Path) -> None:
    result = merged(tmp_path, turned, {}, {"bias": "all"})
    assert result.config["bias"] == "all"
    settings = LoraConfig.from_pretrained(tmp_path / "merged")
    assert settings.bias == "all"


@BOTH_WAYS
def test_lora_biases_of_either_adapter_are_merged(turned: bool, tmp_path: Path) -> None:
    merged(tmp_path, turned, {}, {"lora_bias": True})
    theirs = PeftModel.from_pretrained(tiny_models.bert_classifier(), tmp_path / "1")
    ours = PeftModel.from_pretrained(tiny_models.bert_classifier(), tmp_path / "merged")
    for name, layer in ours.base_model.model.named_modules():
        if hasattr(layer, "lora_bias"):
            other = dict(theirs.base_model.model.named_modules())[name]
            expected = 0.5 * other.scaling["default"] * other.lora_B.default.bias
            torch.testing.assert_close(layer.scaling["default"] * layer.lora_B.default.bias, expected)


@BOTH_WAYS
def test_trained_tokens_of_either_adapter_are_merged(turned: bool, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"]}
    tokens = {**settings, "trainable_token_indices": [3, 5]}
    merged(tmp_path, turned, settings, tokens, model=tiny_models.llama())
    delta = [
        loaded(
            tiny_models.llama(), tmp_path / name
        ).base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
        for name in ("1", "merged")
    ]
    assert torch.equal(*delta)


@BOTH_WAYS
def test_exclusions_of_one_adapter_do_not_hide_modules_of_the_other(turned: bool, tmp_path: Path) -> None:
    exclusion = {"exclude_modules": ["layer.0.attention.self.query"]}
    result = merged(tmp_path, turned, exclusion, {})
    got = lorank.LoraAdapter.from_model(loaded(tiny_models.bert_classifier(), tmp_path / "merged"))
    assert got.ranks == result.ranks


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("task_type", ["SEQ_CLS", "TOKEN_CLS"]),
        ("bias", ["all", "lora_only"]),
        ("trainable_token_indices", [[1], [2]]),
        ("alora_invocation_tokens", [[1], None]),
        ("layer_replication", [None, [[0, 2], [1, 2]]]),
    ],
)
def test_contradicting_settings_raise_with_their_name(key: str, values: list[Any], tmp_path: Path) -> None:
    parts = []
    for k, value in enumerate(values):
        live = trained(tiny_models.bert_classifier(), LoraConfig(**PLAIN), seed=k)
        parts.append(configured(saved(live, tmp_path / f"{k}"), **{key: value}))
    with pytest.raises(ValueError, match=rf"{key} is .* in .*0, but .* in .*1"):
        lorank.merge(parts, rank_ratio=1.0, progress=False)


def test_other_base_models_raise_or_are_noted(tmp_path: Path) -> None:
    parts = []
    for k, base in enumerate(["org/base", None, "./base"]):
        live = trained(tiny_models.bert_classifier(), LoraConfig(**PLAIN), seed=k)
        parts.append(configured(saved(live, tmp_path / f"{k}"), base_model_name_or_path=base))
    with pytest.raises(ValueError, match=r"different names \(org/base of .*; \./base of .*force=True"):
        lorank.merge(parts, rank_ratio=1.0, progress=False)
    result = lorank.merge(parts, force=True, rank_ratio=1.0, progress=False)
    assert any("./base, org/base" in note and "one base model" in note for note in result.notes)
    assert result.base_model == "org/base"
    assert lorank.merge(parts[1:], rank_ratio=1.0, progress=False).base_model == "./base"
