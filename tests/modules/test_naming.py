"""Names select the modules that PEFT's matching selects, and sort by their numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lorank.modules import naming

PARTS = st.sampled_from(["q_proj", "proj", "layer", "0", "1", "10", "dense"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(NAMES, st.lists(NAMES, min_size=1, max_size=3))
def test_lists_match_as_peft_does(name: str, targets: list[str]) -> None:
    expected = bool(check_target_module_exists(LoraConfig(target_modules=targets), name))
    assert naming.matcher(targets)(name) == expected


@given(NAMES, st.sampled_from([r".*proj", r"layer\.\d+\..*", "q_proj", r"(.*\.)?dense", ".*"]))
def test_strings_match_as_peft_does(name: str, targets: str) -> None:
    expected = bool(check_target_module_exists(LoraConfig(target_modules=targets), name))
    assert naming.matcher(targets)(name) == expected


def test_invalid_expression_raises() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        naming.matcher("(")


def test_include_and_exclude_select_names() -> None:
    names = ["a.q_proj", "b.q_proj", "b.k_proj"]
    assert naming.filtered(names, None, None) == names
    assert naming.filtered(names, ["q_proj"], None) == ["a.q_proj", "b.q_proj"]
    assert naming.filtered(names, ["q_proj"], r"b\..*") == ["a.q_proj"]


def test_names_sort_by_their_numbers() -> None:
    names = [f"layers.{i}.w" for i in (10, 2, 1, 0)]
    assert sorted(names, key=naming.natural_key) == [f"layers.{i}.w" for i in (0, 1, 2, 10)]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("h.11.attn.c_attn", "h.11"),
        ("pooler.dense", "pooler.dense"),
    ],
)
def test_block_of_a_name_is_found(name: str, block: str) -> None:
    assert naming.block_of(name) == block


def test_embeddings_heads_and_routers_are_recognised() -> None:
    assert naming.is_embedding("bert.embeddings.word_embeddings")
    assert naming.is_embedding("transformer.wte")
    assert not naming.is_embedding("model.layers.0.embed_proj")
    assert naming.is_output_head("lm_head")
    assert naming.is_output_head("cls.predictions.transform.dense")
    assert not naming.is_output_head("model.layers.0.mlp.up_proj")
    assert naming.is_router("model.layers.0.mlp.gate")
    assert not naming.is_router("model.layers.0.mlp.gate_proj")
