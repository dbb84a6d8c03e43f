"""Roles and depths of every linear layer of real architectures, against the classes of their modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from lorank.modules import roles
from lorank.modules.blocks import Block, Depth, depths_of, numbered_block

HIDDEN: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
WIDE: dict[str, Any] = {**HIDDEN, "intermediate_size": 48}
TEXT: dict[str, Any] = {**WIDE, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 32}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "vocab_size": 64,
    "pad_token_id": 0,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": 64,
}
DISTILBERT: dict[str, Any] = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 64}
OPT: dict[str, Any] = {**HIDDEN, "ffn_dim": 48, "vocab_size": 64, "word_embed_proj_dim": 16}
DEEPSEEK: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
QWEN2_MOE: dict[str, Any] = {
    **GROUPED,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
CLIP: dict[str, Any] = {
    "text_config": {**WIDE, "vocab_size": 64, "projection_dim": 16},
    "vision_config": {**WIDE, **IMAGE, "num_hidden_layers": 2},
    "projection_dim": 16,
}

# Model, configuration, stacks with their depths, by names in any release of transformers.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, int]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, {"bert.encoder.layer": 3}),
    "bert-decoder": (
        "BertLMHeadModel",
        "BertConfig",
        {**TEXT, "is_decoder": True, "add_cross_attention": True},
        {"bert.encoder.layer": 3},
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, {"roberta.encoder.layer": 3}),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**TEXT, "embedding_size": 16},
        {"electra.encoder.layer": 3},
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT,
        {"deberta.encoder.layer": 3},
    ),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", TEXT, {"model.layers": 3}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        DISTILBERT,
        {"distilbert.transformer.layer": 3},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, {"transformer.h": 3}),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}, {"transformer.h": 3}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "attention_types": [[["global", "local"], 1]],
        },
        {"transformer.h": 2},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, {"gpt_neox.layers": 3}),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, {"model.decoder.layers": 3}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, {"model.layers": 3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, {"model.layers": 3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, {"model.layers": 3}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, {"model.layers": 3}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}, {"model.layers": 3}),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT, {"model.layers": 3}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, {"model.layers": 3}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**HIDDEN, "vocab_size": 64}, {"transformer.h": 3}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64},
        {"transformer.h": 3},
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 64},
        {"transformer.blocks": 3},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {"encoder.block": 2, "decoder.block": 3}),
    "flan-t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        {"encoder.block": 2, "decoder.block": 3},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQ2SEQ,
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ,
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {**WIDE, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
        {"encoder.layers": 3},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**WIDE, **IMAGE}, {"vit.layers": 3}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        CLIP,
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {key: CLIP[key] for key in ("text_config", "vision_config")},
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4},
        {"model.layers": 3},
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN2_MOE, {"model.layers": 3}),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4},
        {"model.layers": 3},
    ),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, {"model.layers": 3}),
}


def built(name: str) -> Any:
    """Return the architecture on the meta device, as only names and classes are used."""
    model, config, settings, _ = ARCHITECTURES[name]
    with torch.device("meta"):
        return getattr(tf, model)(getattr(tf, config)(**settings))


def adaptable(model: Any) -> Iterator[str]:
    """Yield names of linear layers, Conv1D, routers, and parameters of stacked experts."""
    for name, module in model.named_modules():
        if re.search("Linear$|^Conv1D$|Router$", type(module).__name__):
            yield name
        for parameter, values in module.named_parameters(recurse=False):
            if values.dim() == 3 and "experts" in name:
                yield f"{name}.{parameter}"


def classes_inside(model: Any, name: str, stack: str) -> str:
    """Return the classes of the modules between a block and a module in it, in one string."""
    modules = dict(model.named_modules())
    parts = name.split(".")
    below = range(len(stack.split(".")) + 2, len(parts) + 1)
    paths = (".".join(parts[:i]) for i in below)
    return " ".join(type(modules[path]).__name__ for path in paths if path in modules)


def expected_role(classes: str) -> str | None:
    if "Router" in classes:
        return None
    return "attention" if "Attention" in classes else "feed-forward"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_has_its_role_and_depth(name: str) -> None:
    model, stacks = built(name), ARCHITECTURES[name][3]
    names = list(adaptable(model))
    depths, found = depths_of(names), roles.roles_of(names)
    seen = dict.fromkeys(stacks, 0)
    for module, depth, role in zip(names, depths, found, strict=True):
        stack = next((stack for stack in stacks if module.startswith(f"{stack}.")), None)
        if stack is None:
            assert (depth, role) == (None, None), module
            continue
        index = int(module[len(stack) + 1 :].split(".")[0])
        assert depth == Depth(index, stacks[stack]), module
        if module.endswith("shared_expert_gate"):
            assert role is None, "a gate weighs, like a router; it is plain nn.Linear in transformers"
            continue
        assert role == expected_role(classes_inside(model, module, stack)), module
        seen[stack] += 1
    assert all(count >= 4 * stacks[stack] for stack, count in seen.items())


def test_stages_are_numbered_consecutively() -> None:
    config = tf.SwinConfig(embed_dim=16, depths=[2, 3], num_heads=[2, 4], image_size=32, patch_size=4)
    with torch.device("meta"):
        model = tf.SwinForImageClassification(config)
    names = list(adaptable(model))
    for name, depth, role in zip(names, depths_of(names), roles.roles_of(names), strict=True):
        if found := re.search(r"layers\.(\d)\.blocks\.(\d)\.(\w+)", name):
            assert depth == Depth(2 * int(found[1]) + int(found[2]), 5), name
            assert role == ("attention" if found[3] == "attention" else "feed-forward"), name
        else:
            assert (depth, role) == (None, None), name
    assert "swin.encoder.layers.0.downsample.reduction" in names


def test_albert_has_one_shared_block() -> None:
    with torch.device("meta"):
        model = tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16))
    names = [name for name in adaptable(model) if "albert_layers" in name]
    assert len(names) == 6
    assert set(depths_of(names)) == {Depth(0, 1)}
    assert roles.roles_of(names) == ["attention"] * 4 + ["feed-forward"] * 2


def test_state_space_model_has_blocks_but_no_roles() -> None:
    config = tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with torch.device("meta"):
        names = list(adaptable(tf.MambaForCausalLM(config)))
    assert Depth(1, 2) in depths_of(names)
    with pytest.raises(ValueError, match=r"role of 'backbone.layers.0.mixer.\w+'.*roles=\{'mixer.\w+'"):
        roles.roles_of(names)
    mixers = roles.roles_of(names, {r".*\.mixer\..*": "attention"})
    assert mixers == ["attention"] * (len(names) - 1) + [None]


# Names of checkpoints and other libraries, for which no class is installed.
@pytest.mark.parametrize(
    ("name", "block", "role"),
    [
        ("vit.encoder.layer.11.attention.attention.query", ("vit.encoder.layer", 11), "attention"),
        ("vit.encoder.layer.11.attention.output.dense", ("vit.encoder.layer", 11), "attention"),
        ("vit.encoder.layer.11.output.dense", ("vit.encoder.layer", 11), "feed-forward"),
        ("model.layers.7.block_sparse_moe.experts.3.w1", ("model.layers", 7), "feed-forward"),
        ("model.layers.7.block_sparse_moe.input_linear", ("model.layers", 7), "feed-forward"),
        ("model.layers.7.experts.3.w1", ("model.layers", 7), "feed-forward"),
        ("model.layers.7.block_sparse_moe.gate", ("model.layers", 7), None),
        ("model.layers.7.mlp.experts.12.down_proj", ("model.layers", 7), "feed-forward"),
        ("model.layers.7.block_sparse_moe.router.layer", ("model.layers", 7), None),
        ("encoder.block.1.layer.1.mlp.router.classifier", ("encoder.block", 1), None),
        ("encoder.block.1.layer.1.mlp.experts.expert_3.wi", ("encoder.block", 1), "feed-forward"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", ("encoder.block", 0), None),
        ("h.3.self_attention.dense", ("h", 3), "attention"),
        ("0.auto_model.encoder.layer.3.attention.self.key", ("0.auto_model.encoder.layer", 3), "attention"),
        ("visual.transformer.resblocks.4.mlp.c_fc", ("visual.transformer.resblocks", 4), "feed-forward"),
        ("blocks.2.attn.proj", ("blocks", 2), "attention"),
        ("layers.0.linear1", ("layers", 0), "feed-forward"),
        ("model.visual.merger.mlp.0", None, None),
        ("feature_extractor.conv_layers.0.conv", None, None),
        ("attention_net.pooler.dense", None, None),
        ("embeddings.patch_embeddings.0.projection", None, None),
        ("q_proj", None, "attention"),
    ],
)
def test_names_of_other_libraries_have_blocks_and_roles(
    name: str, block: tuple[str, int] | None, role: str | None
) -> None:
    assert numbered_block(name) == (None if block is None else Block(block[0], (block[1],)))
    assert roles.roles_of([name]) == [role]


def test_innermost_part_of_a_name_determines_the_role() -> None:
    unet = "down_blocks.0.attentions.1.transformer_blocks.0"
    names = [f"{unet}.attn1.to_q", f"{unet}.attn1.to_out.0", f"{unet}.ff.net.2", "attention_moe.experts.0.w1"]
    assert roles.roles_of(names) == ["attention", "attention", "feed-forward", "feed-forward"]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("segformer.encoder.block.1.0.attention.self.query", (1, 0)),
        ("encoder.stages.2.layers.1.pwconv1", (2, 1)),
        ("layers.12.blocks.3.attn.qkv", (12, 3)),
        ("layers.12.downsample.reduction", None),
    ],
)
def test_stages_are_parts_of_the_block_number(name: str, number: tuple[int, ...] | None) -> None:
    block = numbered_block(name)
    assert (block and block.number) == number


@pytest.mark.parametrize(
    "name", ["backbone.units.3.attn.q", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "2"]
)
def test_unknown_lists_raise(name: str) -> None:
    with pytest.raises(ValueError, match=rf"the block of '{re.escape(name)}'.*blocks=r'"):
        depths_of(["layers.0.q_proj", name])


def test_option_suggested_by_the_error_works() -> None:
    with pytest.raises(ValueError, match="give blocks") as error:
        numbered_block("backbone.units.3.attn.q")
    advice = str(error.value).split("blocks=r'")[1].rstrip("'")
    assert numbered_block("backbone.units.3.attn.q", advice) == Block("backbone.units", (3,))


def test_custom_blocks_determine_depths() -> None:
    names = ["a.units.0.x", "a.units.5.x", "b.units.5.y", "a.units.5.y", "a.layers.1.x"]
    assert depths_of(names, r"units\.(\d+)") == [
        Depth(0, 2),
        Depth(1, 2),
        Depth(0, 1),
        Depth(1, 2),
        None,
    ]
    either = depths_of(["down.1.x", "up.0.x"], r"down\.(\d+)|up\.(\d+)")
    assert either == [Depth(0, 1), Depth(0, 1)]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("(", "blocks: '\\('.*not a regular expression"),
        (r"layers\.\d+", "must be a group"),
        (r"(layers)\.\d+", "must be a group"),
        (r"lairs\.(\d+)", "matches none of 1 modules"),
        (3, "must be a regular expression, not 3"),
    ],
)
def test_malformed_blocks_raise(blocks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depths_of(["layers.0.q_proj"], blocks)


def test_custom_roles_take_precedence_and_match_complete_parts() -> None:
    names = ["layers.0.mixer.in_proj", "layers.0.premixer.q_proj", "layers.0.mlp.up_proj"]
    assert roles.roles_of(names, {"mixer": "feed-forward"}) == ["feed-forward", "attention", "feed-forward"]
    own: roles.Roles = {r"mixer\.(in|out)_proj": None, "mlp": "attention", r"layers\.\d+": "feed-forward"}
    assert roles.roles_of(names, own) == [None, "feed-forward", "attention"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mixer": "mixing"}, "'mixer' must be 'attention', 'feed-forward' or None, not 'mixing'"),
        ({"(": "attention"}, "not a regular expression"),
        ("mixer", "must map"),
    ],
)
def test_malformed_roles_raise(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roles.roles_of(["q_proj"], own)


def test_placements_select_roles() -> None:
    names = ["h.0.attn.c_attn", "h.0.mlp.c_fc", "pooler.dense", "h.0.mlp.gate"]
    assert roles.in_placement(names, "attention") == [True, False, False, False]
    assert roles.in_placement(names, "feed-forward") == [False, True, False, False]
    assert roles.in_placement([*names, "h.0.mixer.x_proj"], "all") == [True] * 5
    assert roles.in_placement(["h.0.mixer.x_proj"], "attention", {"mixer": "attention"}) == [True]
    with pytest.raises(ValueError, match=r"'h.0.mixer.x_proj'"):
        roles.in_placement(["h.0.mixer.x_proj"], "attention")
    wrong: Any = "everywhere"
    with pytest.raises(ValueError, match="placement must be one of 'attention', 'feed-forward', 'all'"):
        roles.in_placement(names, wrong)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_depths_count_existing_blocks_in_numeric_order(numbers: set[int]) -> None:
    depths = depths_of([f"layers.{number}.q_proj" for number in numbers])
    order = sorted(numbers)
    assert depths == [Depth(order.index(number), len(order)) for number in numbers]


def test_depths_count_blocks_of_other_modules() -> None:
    others = [f"layers.{number}.norm" for number in range(4)] + ["parts.9.x", "decoder.layers.7.norm", "head"]
    assert depths_of(["layers.2.q_proj", "head"], others=others) == [Depth(2, 4), None]
    assert depths_of(["u.1.x"], r"u\.(\w+)", ["u.0.y", "u.out.z", "v.5.x"]) == [Depth(1, 2)]
