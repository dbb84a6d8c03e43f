"""Layers whose weight or settings a model's own code reads, past the layer that PEFT puts in their place."""

from __future__ import annotations

import inspect
import re
from functools import cache

# Settings that PEFT's layer does not have, of a convolution and of an embedding.
_SETTINGS = (
    "stride|kernel_size|padding|dilation|groups|in_channels|out_channels"
    "|num_embeddings|embedding_dim|padding_idx"
)
# What a weight is asked for beside its values.
_NO_VALUES = "dtype|device|shape|size|ndim|dim|numel"
_NOT_CODE = re.compile(r"#[^\n]*|\"\"\".*?\"\"\"", re.DOTALL)


@cache
def direct_read(forward: object, leaf: str) -> str:
    """Return what a module's `forward` reads of one of its layers; empty if it only calls the layer.

    Parameters
    ----------
    forward
        The function, of the class of the module that holds the layer.
    leaf
        The attribute's name.
    """
    layer = rf"\bself\.{re.escape(leaf)}\b"
    text = _source(forward)
    if re.search(rf"{layer}\.weight\b(?!\.(?:{_NO_VALUES})\b)", text):
        return "weight"
    found = re.search(rf"{layer}\.(?P<setting>{_SETTINGS})\b", text)
    if found:
        return found["setting"]
    # A function that pads the input is handed the convolution itself.
    return "padding" if re.search(rf"padding\([^()]*{layer}(?![.(])", text) else ""


@cache
def _source(forward: object) -> str:
    """Return the source of a function without comments; empty where it is not at hand."""
    try:
        return _NOT_CODE.sub("", inspect.getsource(forward))  # type: ignore[arg-type]  # anything else raises
    except (OSError, TypeError):
        return ""
