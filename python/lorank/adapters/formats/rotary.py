"""The two orders of the rows of query and key projections, under which rotary embeddings pair dimensions.

transformers pairs a dimension of a head with the one half a head away. llama.cpp and torchtune pair
neighbours in models of Llama's family, so that their rows, and the rows of B, are permuted within each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorank._core import FormatError
from lorank.adapters.factors import Factors, Pair
from lorank.adapters.formats.derived_factors import Array, changed
from lorank.adapters.module import LoraModule


def to_neighbours(b: Array, heads: int) -> Array:
    """Return rows in the order of llama.cpp and torchtune, given those of transformers."""
    rows: Array = b.reshape(heads, 2, -1, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
    return rows


def to_halves(b: Array, heads: int) -> Array:
    """Return rows in the order of transformers, given those of llama.cpp and torchtune."""
    rows: Array = b.reshape(heads, -1, 2, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
    return rows


@dataclass(frozen=True, slots=True)
class UnknownOrder:
    """Factors whose rows cannot be ordered, because the number of heads is unknown.

    Attributes
    ----------
    message
        The error message.
    """

    message: str

    def __call__(self) -> list[Pair]:
        """Raise FormatError."""
        raise FormatError(self.message)


def heads_of(config: Mapping[str, Any], name: str) -> int | None:
    """Return the number of heads of a query or key projection, given the base model's configuration.

    None for other modules, and if the configuration does not give the number.
    """
    part = name.rpartition(".")[2]
    text = config.get("text_config")
    settings = text if isinstance(text, Mapping) else config
    queries = settings.get("num_attention_heads")
    number = settings.get("num_key_value_heads") or queries if part == "k_proj" else queries
    return number if isinstance(number, int) and number > 0 else None


def is_rotated(name: str) -> bool:
    """Return True for the name of a query or key projection."""
    return name.endswith((".q_proj", ".k_proj"))


def reordered(label: str, module: LoraModule, config: Mapping[str, Any], *, neighbours: bool) -> LoraModule:
    """Return a query or key projection with the rows of B in the other order.

    Parameters
    ----------
    label
        The file's name in messages.
    module
        The module.
    config
        The base model's configuration; if it is empty, reading the factors raises an error.
    neighbours
        True for the order of llama.cpp and torchtune, False for that of transformers.
    """
    heads = heads_of(config, module.name)
    if heads is None:
        return replace(module, factors=unknown_order(label, module.name))
    if module.shape[0] % (2 * heads):
        raise FormatError(
            f"{label}: module {module.name!r}: {module.shape[0]} outputs do not fit {heads} heads "
            "of the base model"
        )
    order = to_neighbours if neighbours else to_halves
    return replace(module, factors=changed(module.factors, lambda b, a: (order(b, heads), a)))


def unknown_order(label: str, name: str) -> Factors:
    """Return factors that raise an error, because the base model is needed to order the rows."""
    return UnknownOrder(
        f"{label}: module {name!r}: its rows are permuted within heads, whose number the file does not hold: "
        "name the base model (lorank convert --base MODEL, or base= in Python)"
    )
