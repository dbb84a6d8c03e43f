"""Skeletons of models from diffusers and transformers before 5, and the places of loaded tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorank
from lorank.modules.loading import place
from lorank.modules.skeleton import Skeleton
from lorank.sources import open_source
from tests.support.architectures import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def test_names_follow_the_model_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.save_pretrained(tmp_path)
    stored, live = lorank.analyze(tmp_path, progress=False), lorank.analyze(model, progress=False)
    assert stored.facts == live.facts
    assert stored.facts.class_name == "UNet2DConditionModel"
    assert {(row.name, row.kind) for row in stored.modules} == {(row.name, row.kind) for row in live.modules}


def test_other_classes_of_diffusers_are_not_built(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text('{"_class_name": "DDPMScheduler"}')
    torch.save({"a.weight": torch.randn(4, 4)}, tmp_path / "pytorch_model.bin")
    facts = open_source(tmp_path).facts
    assert facts.are_guessed
    assert "DDPMScheduler" in facts.remark


@pytest.fixture
def older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the interfaces that are new in transformers 5."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)


def model_of(name: str) -> Any:
    model = tiny(name, layers=1)
    assert model is not None
    return model


@pytest.mark.usefixtures("older_transformers")
def test_base_model_prefix_is_optional_before_transformers_5() -> None:
    bert = model_of("BertForMaskedLM")
    skeleton = Skeleton.of_model(bert)
    at = "encoder.layer.0.attention.self.query.weight"
    shapes = {at: (32, 32), "bert.encoder.layer.0.output.LayerNorm.gamma": (32,), "other.weight": (2, 2)}
    found = place(shapes, skeleton)
    assert found.renamed == {
        at: f"bert.{at}",
        "bert.encoder.layer.0.output.LayerNorm.gamma": "bert.encoder.layer.0.output.LayerNorm.weight",
    }
    assert list(found.strangers) == ["other.weight"]
    inner = place({f"bert.{at}": (32, 32)}, Skeleton.of_model(bert.bert))
    assert inner.renamed == {f"bert.{at}": at}


@pytest.mark.usefixtures("older_transformers")
def test_classes_rename_by_their_own_table_before_transformers_5(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = model_of("LlamaForCausalLM")
    table = {r"^language_model\.(layers)": r"model.\1"}
    monkeypatch.setattr(type(llama), "_checkpoint_conversion_mapping", table, raising=False)
    name = "language_model.layers.0.self_attn.q_proj.weight"
    found = place({name: (32, 32)}, Skeleton.of_model(llama))
    assert found.renamed == {name: "model.layers.0.self_attn.q_proj.weight"}


def test_base_model_accepts_names_of_a_model_with_a_head(tmp_path: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    model = model_of("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("BertForMaskedLM", "BertModel"))
    source = open_source(tmp_path)
    assert source.facts.class_name == "BertModel"
    names = {matrix.info.module for matrix in source.matrices}
    assert "encoder.layer.0.attention.self.query" in names
    assert any("BertModel has no such parameter" in skipped.reason for skipped in source.skipped)
