"""Real architectures with tiny, seeded weights, built in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def _built(model: type[Any], config: Any) -> Any:
    torch.manual_seed(0)
    return model(config).eval()


def bert() -> Any:
    """Return a bare encoder, whose module names have no prefix."""
    return _built(transformers.BertModel, transformers.BertConfig(**_SIZES))


def bert_classifier() -> Any:
    """Return the same encoder under a classification head, whose module names begin with `bert.`."""
    return _built(transformers.BertForSequenceClassification, transformers.BertConfig(**_SIZES))


def llama() -> Any:
    """Return a decoder with grouped-query attention, whose key and value projections have fewer outputs."""
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    return _built(transformers.LlamaForCausalLM, config)


def llama_tied() -> Any:
    """Return a decoder whose input and output embeddings are one parameter."""
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return _built(transformers.LlamaForCausalLM, config)


def gpt2() -> Any:
    """Return a decoder of Conv1D layers, which store weights as (in, out)."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    return _built(transformers.GPT2LMHeadModel, config)


def mixtral() -> Any:
    """Return a decoder with stacked experts under routers."""
    config = transformers.MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4)
    return _built(transformers.MixtralForCausalLM, config)


def qwen3_moe(**sizes: int) -> Any:
    """Return a decoder with experts whose width differs from that of dense layers."""
    config = transformers.Qwen3MoeConfig(
        **_SIZES,
        **{"moe_intermediate_size": 24, **sizes},
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    return _built(transformers.Qwen3MoeForCausalLM, config)


def gpt_oss() -> Any:
    """Return a decoder with stacked experts stored as (in, out)."""
    config = transformers.GptOssConfig(
        **_SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return _built(transformers.GptOssForCausalLM, config)


def t5() -> Any:
    """Return an encoder and decoder with shared embeddings."""
    config = transformers.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64)
    return _built(transformers.T5ForConditionalGeneration, config)


def vit() -> Any:
    """Return a vision model whose patches enter through a convolution."""
    sizes = {
        key: value for key, value in _SIZES.items() if key not in ("vocab_size", "max_position_embeddings")
    }
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
    return _built(transformers.ViTForImageClassification, config)
