"""The architectures of llama.cpp: names of tensors, order of rows, and the model's class in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_BLOCK = re.compile(r"blk\.(?P<block>\d{1,6})\.(?P<rest>.+)")

# Parameters whose names have no suffix in the model.
_BARE = {"experts.gate_up_proj", "experts.down_proj", "self_attn.sinks"}

Names = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes
    ----------
    model_type
        The name of the architecture in transformers.
    model_class
        The name of the model's class in transformers; empty if lorank builds no skeleton.
    blocks
        The modules of a block, by the names of their tensors.
    others
        The modules outside of blocks, by the names of their tensors.
    block
        The name of the list of blocks.
    has_rotary_order
        True if the two halves of the rows of each head of queries and keys alternate in files.
    norm_offset
        The number that files add to the weights of norms.
    transposed
        The tensors whose weight the model stores as ``(in, out)``.
    fused_heads
        True if files store queries, keys and values of all heads one after another, the model head by head.
    is_interleaved
        True if the model stores stacks of experts as ``(in, out)``, and gate and up projections by turns.
    settings
        Settings of the configuration that differ from the defaults.
    """

    model_type: str
    model_class: str
    blocks: Names
    others: Names
    block: str = "model.layers"
    has_rotary_order: bool = False
    norm_offset: float = 0.0
    transposed: frozenset[str] = frozenset()
    fused_heads: bool = False
    is_interleaved: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    def parameter(self, tensor: str) -> str | None:
        """Return the parameter that a tensor is, or is a part of; None for an unknown tensor.

        Examples
        --------
        >>> architecture("llama", experts=0).parameter("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
        """
        name, _, suffix = tensor.rpartition(".")
        if match := _BLOCK.fullmatch(name):
            found, prefix = self.blocks.get(match["rest"]), f"{self.block}.{int(match['block'])}."
        else:
            found, prefix = self.others.get(name), ""
        if found is None or suffix not in ("weight", "bias"):
            return None
        if found.endswith(tuple(_BARE)):
            return prefix + found + ("_bias" if suffix == "bias" else "")
        return f"{prefix}{found}.{suffix}"


_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_DECODER = {**_ATTENTION, **_DENSE, **_EXPERTS}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_AROUND = {  # norms before and after both parts of a block
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {
    "attn_qkv": "query_key_value",
    "attn_output": "dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def _decoder(model_type: str, model_class: str, **changes: str) -> Architecture:
    """Return a decoder with the usual names, except for some modules of a block."""
    return Architecture(model_type, model_class, {**_DECODER, **changes}, _OUTER)


def _rotary(model_type: str, model_class: str) -> Architecture:
    return Architecture(model_type, model_class, _DECODER, _OUTER, has_rotary_order=True)


def _gemma(model_type: str, model_class: str, names: Names = _AROUND) -> Architecture:
    return Architecture(model_type, model_class, {**_DECODER, **names}, _OUTER, norm_offset=1.0)


_ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _rotary("llama", "LlamaForCausalLM"),
    "granite": _rotary("granite", "GraniteForCausalLM"),
    "smollm3": _rotary("smollm3", "SmolLM3ForCausalLM"),
    "qwen2": _decoder("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _decoder("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": _decoder("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _DECODER, _OUTER, settings={"norm_topk_prob": True}
    ),
    "gemma": _gemma("gemma", "GemmaForCausalLM", {}),
    "gemma2": _gemma("gemma2", "Gemma2ForCausalLM"),
    "gemma3": _gemma("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": _decoder("phi3", "Phi3ForCausalLM", ffn_up="mlp.gate_up_proj"),
    "starcoder2": _decoder("starcoder2", "Starcoder2ForCausalLM", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"),
    "stablelm": _decoder("stablelm", "StableLmForCausalLM"),
    "olmo2": _decoder("olmo2", "Olmo2ForCausalLM", **{k: v for k, v in _AROUND.items() if k != "ffn_norm"}),
    "command-r": _decoder("cohere", "CohereForCausalLM"),
    "cohere2": _decoder("cohere2", "Cohere2ForCausalLM"),
    "nemotron": Architecture("nemotron", "NemotronForCausalLM", _DECODER, _OUTER, norm_offset=1.0),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_DECODER,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        _OUTER,
        is_interleaved=True,
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block="transformer.h",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    "bloom": Architecture(
        "bloom",
        "BloomForCausalLM",
        {
            **_FUSED,
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        },
        {
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block="transformer.h",
        fused_heads=True,
    ),
    "falcon": Architecture(
        "falcon",
        "FalconForCausalLM",
        {
            **_FUSED,
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "attn_norm": "input_layernorm",
        },
        {
            "token_embd": "transformer.word_embeddings",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block="transformer.h",
        fused_heads=True,
    ),
    "bert": Architecture(
        "bert",
        "",
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense",
            "layer_output_norm": "output.LayerNorm",
        },
        {
            "token_embd": "embeddings.word_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        block="encoder.layer",
    ),
}

_MIXTRAL = _rotary("mixtral", "MixtralForCausalLM")


def architecture(name: str, experts: int) -> Architecture | None:
    """Return an architecture by llama.cpp's name and the number of experts; None if it is unknown."""
    return _MIXTRAL if name == "llama" and experts > 0 else _ARCHITECTURES.get(name)
