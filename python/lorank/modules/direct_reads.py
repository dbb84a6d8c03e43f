"""Finds layers whose weight or settings a model's code reads directly, bypassing PEFT's layer."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from functools import cache

# Settings of convolutions and embeddings that PEFT's layers lack.
_SETTINGS = (
    "stride|kernel_size|padding|dilation|groups|in_channels|out_channels"
    "|num_embeddings|embedding_dim|padding_idx"
)
# Attributes of a weight that are not its values.
_NO_VALUES = "dtype|device|shape|size|ndim|dim|numel|requires_grad"
# Methods that initialise, exchange or resize weights instead of computing with weights.
_NOT_FORWARD = re.compile(r"^__|init|tie|reset|resize|[gs]et_|prune|weight_norm|interpolate")
_LIBRARIES = (
    "torch.",
    "transformers.modeling_utils",
    "transformers.generation",
    "diffusers.models.modeling_utils",
)
_NOT_CODE = re.compile(r"#[^\n]*|\"\"\".*?\"\"\"", re.DOTALL)


@cache
def direct_read(holder: object, leaf: str, *, despite_calls: bool = False) -> str:
    """Return the attribute of a layer that a module's code reads; empty if the code only calls the layer.

    Parameters
    ----------
    holder
        The class of the module that holds the layer. Methods that initialise or resize weights are ignored.
    leaf
        The name of the layer in the module.
    despite_calls
        True if a read counts even though the code also calls the layer.
    """
    layer = rf"\bself\.{re.escape(leaf)}\b"
    text = _source(holder)
    is_read = re.search(rf"(?<!isinstance\(){layer}\.weight\b(?!\.(?:{_NO_VALUES})\b)", text)
    # Some code reads the weight only for some settings or devices, and calls the layer otherwise.
    if is_read and (despite_calls or not re.search(rf"{layer}\(", text)):
        return "weight"
    found = re.search(rf"{layer}\.(?P<setting>{_SETTINGS})\b", text)
    if found:
        return found["setting"]
    # Some code passes the convolution to a function that pads the input.
    return "padding" if re.search(rf"padding\([^()]*{layer}(?![.(])", text) else ""


@cache
def _source(holder: object) -> str:
    """Return the source of a class's computations without comments; empty if it is not available."""
    texts = []
    for name, method in inspect.getmembers(holder, inspect.isfunction):
        if not _NOT_FORWARD.search(name) and not method.__module__.startswith(_LIBRARIES):
            with suppress(OSError, TypeError):
                texts.append(_NOT_CODE.sub("", inspect.getsource(method)))
    return "\n".join(texts)
