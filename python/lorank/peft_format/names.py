"""Names of PEFT's files, of the tensors in them, and of modules inside PEFT's layers.

The key of a tensor is the prefix, the path of a layer, and the tensor's name within that layer. PEFT replaces
a module that it adapts by a layer, which holds the module as its `base_layer`.
"""

from __future__ import annotations

import re

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"

PREFIX = "base_model.model."
"""The start of every key in a PEFT file."""

BASE_LAYER = "base_layer"
"""The name of a module inside the layer that adapts it."""

INSIDE = f".{BASE_LAYER}"
BASE_WEIGHT = f"{INSIDE}.weight"
"""The end of the key of a base weight, which PEFT saves with the factors of embeddings and heads."""

BIAS = "lora_B.bias"
"""The name within a layer of the bias that `lora_bias` adds to the outputs of B."""

MAGNITUDE = "lora_magnitude_vector"
"""The name within a layer of the magnitudes of DoRA."""

TOKENS = ".token_adapter."
"""A part of the keys of `trainable_token_indices`."""

FACTOR_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[ABE])(\.weight)?")
BIAS_KEY = re.compile(rf"(?P<path>.+)\.{re.escape(BIAS)}")
LIVE_FACTOR_KEY = re.compile(r".+\.lora_(?:embedding_)?[AB]\.(?P<adapter>[^.]+)(?:\.weight|\.bias)?")
"""A key with an adapter's name, as in the state dict of a live model."""

_LAYER_PART = ".lora_"


def factor_keys(path: str, *, is_embedding: bool = False) -> tuple[str, str]:
    """Return the keys of B and A of the layer at a path."""
    if is_embedding:
        return f"{PREFIX}{path}.lora_embedding_B", f"{PREFIX}{path}.lora_embedding_A"
    return f"{PREFIX}{path}.lora_B.weight", f"{PREFIX}{path}.lora_A.weight"


def is_embedding_key(key: str) -> bool:
    """Return True for the key of a factor of an embedding."""
    return ".lora_embedding_" in key


def adalora_keys(path: str) -> tuple[str, str, str]:
    """Return the keys of B, A and E of an AdaLoRA layer."""
    return f"{PREFIX}{path}.lora_B", f"{PREFIX}{path}.lora_A", f"{PREFIX}{path}.lora_E"


def layer_key(path: str, name: str) -> str:
    """Return the key of a tensor within the layer at a path, such as `BIAS` or `MAGNITUDE`."""
    return f"{PREFIX}{path}.{name}"


def layer_path(key: str) -> str:
    """Return the path of the layer in the key of a layer's own tensor."""
    return key.removeprefix(PREFIX).partition(_LAYER_PART)[0]


def is_in_layer(key: str) -> bool:
    """Return True for the key of a layer's own tensor: a factor, bias or magnitude."""
    return _LAYER_PART in key


def factor_pattern(adapter_name: str) -> re.Pattern[str]:
    """Return an expression for the names of factors among a live model's parameters.

    Groups 1 and 2 are the factor's key in a file, without the adapter's name.
    """
    return re.compile(rf"(.+\.lora_(?:embedding_)?[ABE])\.{re.escape(adapter_name)}(\.weight)?")


def innermost(path: str) -> str:
    """Return a path without `base_layer` at its end: the path of the module inside nested layers."""
    while path.endswith(INSIDE):
        path = path.removesuffix(INSIDE)
    return path


def holder(name: str) -> str:
    """Return the module whose rank PEFT gives to a projection inside it, as in `nn.MultiheadAttention`."""
    return name.partition(f"{INSIDE}.")[0]
