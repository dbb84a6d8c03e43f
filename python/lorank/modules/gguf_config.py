"""The configuration of a model in transformers, from the settings in the header of its GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorank.modules.gguf_architectures import Architecture

Shapes = Mapping[str, tuple[int, ...]]

# Settings of transformers by llama.cpp's settings of an architecture.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_NECESSARY = ("num_hidden_layers", "hidden_size", "num_attention_heads")

# Settings of transformers under other names, by the model type.
_RENAMED: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "mixtral": {"num_experts": "num_local_experts"},
    "gpt_oss": {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
}


class Settings:
    """The settings of a GGUF file.

    Parameters
    ----------
    texts
        The settings as JSON texts by their key.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def get(self, key: str) -> Any:
        """Return a setting; None if it is missing."""
        text = self._texts.get(key)
        return None if text is None else json.loads(text)

    @property
    def architecture(self) -> str:
        """The name of the architecture in llama.cpp; empty if there is none."""
        name = self.get("general.architecture")
        return name if isinstance(name, str) else ""

    @property
    def is_adapter(self) -> bool:
        """True if the file holds an adapter."""
        return bool(self.get("general.type") == "adapter")

    def number(self, key: str) -> int:
        """Return a setting of the architecture as a number; 0 if it is missing or differs between layers."""
        found = self.get(f"{self.architecture}.{key}")
        if isinstance(found, list) and found and found.count(found[0]) == len(found):
            found = found[0]
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0


def config_of(settings: Settings, architecture: Architecture, shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of a model; an empty one if the file does not determine it.

    Parameters
    ----------
    settings
        The settings of the file.
    architecture
        The architecture.
    shapes
        The shapes of the tensors by llama.cpp's names.
    """
    found = {key: number for source, key in _KEYS.items() if (number := settings.number(source))}
    vocabulary = (*shapes.get("token_embd.weight", ()), 0)[0]
    if not architecture.model_class or not vocabulary or any(key not in found for key in _NECESSARY):
        return {}
    if experts := settings.number("expert_count"):
        found["num_experts"] = experts
    renames = _RENAMED.get(architecture.model_type, {})
    renamed = {renames.get(key, key): number for key, number in found.items()}
    if "intermediate_size" in renames.values() and "moe_intermediate_size" not in found:
        renamed.setdefault("intermediate_size", found.get("intermediate_size", 0))
    return {
        **renamed,
        **_from_tensors(architecture, found, shapes),
        **architecture.settings,
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "vocab_size": vocabulary,
        "pad_token_id": None,
    }


def _from_tensors(architecture: Architecture, found: Mapping[str, int], shapes: Shapes) -> dict[str, Any]:
    """Return settings that only the tensors determine."""

    def has(name: str) -> bool:
        return f"blk.0.{name}" in shapes

    settings: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in shapes}
    match architecture.model_type:
        case "llama" | "granite" | "smollm3" | "mixtral" | "qwen3":
            settings["attention_bias"] = has("attn_output.bias")
            settings["mlp_bias"] = has("ffn_down.bias")
        case "stablelm":
            settings["use_qkv_bias"] = has("attn_q.bias")
            settings["use_parallel_residual"] = not has("ffn_norm.weight")
        case "starcoder2":
            settings["use_bias"] = has("attn_q.bias")
        case "command-r":
            settings["use_qk_norm"] = has("attn_q_norm.weight")
        case "falcon":
            heads, keys = found["num_attention_heads"], found.get("num_key_value_heads", 0)
            settings |= {
                "bias": has("attn_qkv.bias"),
                "multi_query": keys == 1,
                "num_kv_heads": keys or heads,
                "new_decoder_architecture": has("attn_norm_2.weight"),
                "alibi": False,
            }
    return settings
