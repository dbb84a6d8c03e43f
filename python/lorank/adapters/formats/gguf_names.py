"""The names of llama.cpp's tensors, and of transformers' modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.gguf_tensors import package

# The architecture in llama.cpp by the model type in transformers.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
}

# Architectures whose converter permutes the rows of queries and keys.
_PERMUTED = ("llama", "granite", "smollm3")

_BLOCK = re.compile(r"blk\.(?P<block>\d{1,6})\.(?P<rest>.+)")
_LANGUAGE_MODEL = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")

# Names of modules if the base model is not given: those of most decoders of transformers.
_USUAL = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_PHI3 = {"ffn_up": "mlp.gate_up_proj"}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the name of a model's architecture in llama.cpp.

    Raises
    ------
    ValueError
        If lorank does not know it.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"the base model's type is {model_type!r}; adapters of llama.cpp are written for "
            f"{', '.join(_ARCHITECTURES)}: use llama.cpp's convert_lora_to_gguf.py"
        )
    return _ARCHITECTURES[model_type]


def is_permuted(architecture: str) -> bool:
    """Return True if rows of queries and keys are permuted in files of an architecture."""
    return architecture in _PERMUTED


class Names:
    """The names of an architecture's tensors."""

    def __init__(self, architecture: str, blocks: int) -> None:
        gguf = package()
        by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._architecture = architecture
        arch = by_name.get(architecture)
        self._map = gguf.get_tensor_name_map(arch, blocks) if arch is not None else None

    def tensor(self, module: str) -> str | None:
        """Return the name of a module's weight in llama.cpp; None if it has none."""
        if self._map is None:
            return None
        for name in (module, _LANGUAGE_MODEL.sub("model.", module)):
            if found := self._map.get_name(name, try_suffixes=(".weight",)):
                return f"{found}.weight"
        return None

    def modules(self, base: BaseWeights | None) -> dict[str, str]:
        """Map names of tensors to the names of the base model's modules."""
        found: dict[str, str] = {}
        for name in base.shapes if base is not None else ():
            if tensor := self.tensor(name):
                found.setdefault(tensor, name)
        return found

    def usual(self, tensor: str) -> str | None:
        """Return the usual name of the module with a tensor; None if it is unknown."""
        stem = tensor.removesuffix(".weight")
        if match := _BLOCK.fullmatch(stem):
            table = _USUAL | (_PHI3 if self._architecture == "phi3" else {})
            rest = table.get(match["rest"])
            return None if rest is None else f"model.layers.{match['block']}.{rest}"
        return _OUTSIDE.get(stem)


def blocks_in(names: Iterable[str]) -> int:
    """Return the number of blocks up to the last that a name holds."""
    numbers = [int(n) for name in names for n in re.findall(r"\.(\d{1,6})\.", f".{name}.")]
    return max(numbers, default=0) + 1
