"""Small GGUF files of models, written by the package `gguf` with the conversions of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

Array = np.ndarray[Any, Any]

_COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Class of the configuration and its settings, by the name of the architecture in llama.cpp.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "llama-tied": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-experts": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", _GQA),
    "smollm3": ("SmolLM3Config", _GQA),
    "qwen2": ("Qwen2Config", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 32}),
    "qwen2moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 32}),
    "gemma": ("GemmaConfig", _GQA),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 32}),
    "phi3": ("Phi3Config", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "starcoder2": ("Starcoder2Config", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "stablelm": ("StableLmConfig", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "olmo2": ("Olmo2Config", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "command-r": ("CohereConfig", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "cohere2": ("Cohere2Config", {**_GQA, "head_dim": 16}),
    "nemotron": ("NemotronConfig", {**_GQA, "tie_word_embeddings": False}),
    "gpt-oss": ("GptOssConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": (
        "GPT2Config",
        {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": 256, "vocab_size": 128},
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "hidden_size": 64, "n_head": 4, "vocab_size": 128}),
    "falcon": (
        "FalconConfig",
        {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 128,
            "multi_query": True,
            "new_decoder_architecture": False,
            "ffn_hidden_size": 96,
        },
    ),
}


def tiny_model(name: str) -> Any:
    """Return a small random model of an architecture."""
    config_class, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def write_model(
    path: Path,
    model: Any,
    name: str,
    type_of: Callable[[str, Array], str] = lambda _name, _values: "F32",
    settings: dict[str, Any] | None = None,
) -> None:
    """Write a model as llama.cpp's converter does.

    Parameters
    ----------
    path
        The file.
    model
        The model.
    name
        A key of `ARCHITECTURES`.
    type_of
        A function that returns the type of a tensor.
    settings
        Further text settings.
    """
    writer = gguf.GGUFWriter(path, _architecture(name))
    _add_settings(writer, model.config, name)
    for key, value in (settings or {}).items():
        writer.add_string(key, value)
    for tensor, values in _tensors(model, name):
        kind = gguf.GGMLQuantizationType[type_of(tensor, values) if values.ndim > 1 else "F32"]
        if kind.name == "F32":
            writer.add_tensor(tensor, values)
        else:
            writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(name: str) -> str:
    return "llama" if name.startswith("llama") else name


def _add_settings(writer: Any, config: Any, name: str) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(getattr(config, "max_position_embeddings", 32))
    writer.add_embedding_length(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = inner or getattr(config, "ffn_hidden_size", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    writer.add_head_count_kv(1 if name == "falcon" else heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    if (size := getattr(config, "head_dim", None)) and name not in ("falcon", "bloom", "gpt2"):
        writer.add_key_length(size)
        writer.add_rope_dimension_count(size)
    for key in ("num_experts", "num_local_experts"):
        if experts := getattr(config, key, None):
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            break
    if size := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(size)
    if size := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(size)


def _tensors(model: Any, name: str) -> Iterator[tuple[str, Array]]:
    """Yield names and values as llama.cpp's converter writes them."""
    config = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == _architecture(name))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    # A mapping in transformers 5, a list before.
    keys = getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ()
    tied = set(keys) if getattr(config, "tie_word_embeddings", False) else set()
    for parameter, tensor in model.state_dict().items():
        if parameter in tied:
            continue
        values = tensor.numpy()
        if ".experts." in parameter and parameter.endswith(("_proj", "_bias")):
            yield from _experts(parameter, values, name)
            continue
        spellings = (parameter, parameter.removeprefix("transformer."))
        found = next((x for y in spellings if (x := names.get_name(y, (".weight", ".bias")))), None)
        if found is None:
            raise ValueError(f"{name}: no name for {parameter}")
        yield found, _converted(found, values, config, name)


def _experts(parameter: str, values: Array, name: str) -> Iterator[tuple[str, Array]]:
    block = parameter.split(".")[2]
    suffix = "bias" if parameter.endswith("_bias") else "weight"
    if name == "gpt-oss" and suffix == "weight":
        values = np.ascontiguousarray(values.swapaxes(1, 2))
    if "down_proj" in parameter:
        yield f"blk.{block}.ffn_down_exps.{suffix}", values
        return
    half = values.shape[1] // 2
    parts = (values[:, ::2], values[:, 1::2]) if name == "gpt-oss" else (values[:, :half], values[:, half:])
    for part, found in zip(("gate", "up"), parts, strict=True):
        yield f"blk.{block}.ffn_{part}_exps.{suffix}", np.ascontiguousarray(found)


def _converted(tensor: str, values: Array, config: Any, name: str) -> Array:
    heads = config.num_attention_heads
    if name in ("granite", "smollm3") or name.startswith("llama"):
        if ".attn_q." in tensor:
            return _alternating(values, heads)
        if ".attn_k." in tensor:
            return _alternating(values, config.num_key_value_heads)
    if name in ("gemma", "gemma2", "gemma3", "nemotron") and tensor.endswith("norm.weight"):
        return values + 1
    if name == "gpt2" and any(
        f".{x}.weight" in tensor for x in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    ):
        return np.ascontiguousarray(values.T)
    if name == "bloom" and "attn_qkv" in tensor:
        by_head = values.reshape(heads, 3, -1, *values.shape[1:])
        return np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(values.shape)
    if tensor.endswith("ffn_gate_inp_shexp.weight"):
        return values.reshape(-1)
    return values


def _alternating(values: Array, heads: int) -> Array:
    """Return rows of which the halves of each head alternate."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
