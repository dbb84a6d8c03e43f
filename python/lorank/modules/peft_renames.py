"""Finds targets that PEFT renames: names of experts' layers in transformers 4, which version 5 stacks.

For some mixtures of experts, PEFT takes every target that ends with such a name for a stack of experts, even
a layer of a dense or shared block. Such a layer can be adapted only by the name of its parameter.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

# The last parts of names that PEFT 0.21 takes for experts, by family of models.
_RENAMED = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def renames_target(module: str, model_type: str) -> bool:
    """Return True if PEFT takes the name of a module for the name of a stack of experts.

    Parameters
    ----------
    module
        The module's dotted name.
    model_type
        The `model_type` of the whole model's config.
    """
    return module.rpartition(".")[2] in _RENAMED.get(_families().get(model_type, ""), ())


@cache
def _families() -> dict[str, Any]:
    """Map every model type to its family, by transformers 5's table and PEFT's addition."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    try:
        from transformers import conversion_mapping
    except ImportError:
        return {}
    table = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return {**table, "mixtral": "mixtral"} if table else {}
