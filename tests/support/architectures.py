"""Tiny models of every architecture that the installed transformers builds from its default config.

Settings of sizes are found by name and reduced. A model that fails with reduced widths is built with its
default widths, a small vocabulary and few layers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "speech": "MODEL_FOR_CTC_MAPPING",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}
MOST_PARAMETERS = 40_000_000

# Errors that transformers and PEFT raise for unsupported models and settings.
MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

# Names of settings that count layers, and the reduced values of other settings.
_LAYERS = re.compile(
    r"(?:num_(?:hidden_|encoder_|decoder_)?layers|n_layers?|num_(?:en|de)coder_layers|(?:en|de)coder_layers|"
    r"depth|num_blocks|n_block|num_hidden_groups|layers)"
)
_WIDTHS = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "emb_dim": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
}


def architectures() -> list[tuple[str, str]]:
    """Return every pair of a task and the name of a model class, each class once."""
    found: dict[str, str] = {}
    for task, mapping in TASKS.items():
        for classes in getattr(modeling_auto, mapping)._model_mapping.values():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, task)
    return [(task, name) for name, task in found.items()]


def tiny(name: str, layers: int = 2) -> Any | None:
    """Return a tiny model of a class with random weights; None if no tiny config builds one.

    Parameters
    ----------
    name
        The name of a class of transformers.
    layers
        The number of layers of each stack.
    """
    model_class = getattr(transformers, name, None)
    if model_class is None or getattr(model_class, "config_class", None) is None:
        return None
    for widths in (_WIDTHS, {"vocab_size": 512}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = _shrunk(model_class.config_class(), widths, layers)
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(config).parameters())
                if size > MOST_PARAMETERS:
                    continue
                torch.manual_seed(0)
                model = model_class(_shrunk(model_class.config_class(), widths, layers))
                return model.eval().float()
        except MISFITS:
            continue
    return None


def _shrunk(config: Any, widths: dict[str, int], layers: int) -> Any:
    for part in _parts(config):
        for key, value in list(vars(part).items()):
            if isinstance(value, bool) or not isinstance(value, int | list):
                continue
            if isinstance(value, int) and value > layers and _LAYERS.fullmatch(key):
                setattr(part, key, layers)
            elif isinstance(value, int) and value > 1 and key in widths:
                setattr(part, key, widths[key])
            elif isinstance(value, list) and key == "layer_types":
                setattr(part, key, _varied(value, layers))
        for key in (
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "image_token_id",
            "decoder_start_token_id",
        ):
            if isinstance(value := getattr(part, key, None), int) and value >= 64:
                setattr(part, key, 1)
        if getattr(part, "use_timm_backbone", False):
            part.use_pretrained_backbone = False
    return config


def _varied(types: list[Any], layers: int) -> list[Any]:
    """Return the given number of layer types, distinct types first."""
    return [*dict.fromkeys(types), *types][:layers]


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            yield from _parts(value)


def perturbed(model: Any, seed: int = 1, amount: float = 0.1) -> dict[str, torch.Tensor]:
    """Return a state dict with perturbed matrices and stacks; tied parameters stay equal."""
    generator = torch.Generator().manual_seed(seed)
    state, buffers = dict(model.state_dict()), dict(model.named_buffers())
    changed: dict[int, torch.Tensor] = {}
    for name, value in state.items():
        if value.ndim < 2 or name in buffers:
            continue
        key = value.data_ptr()
        if key not in changed:
            noise = torch.randn(value.shape, generator=generator)
            changed[key] = value + amount * noise / math.sqrt(value.shape[-1])
        state[name] = changed[key]
    return state
