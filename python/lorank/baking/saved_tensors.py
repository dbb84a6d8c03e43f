"""Tensors of adapters other than factors, which replace tensors of the base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorank._core import FormatError
from lorank.adapters import carried as carried_tensors
from lorank.adapters.content import AdapterContent
from lorank.adapters.stored import Stored
from lorank.peft_format.names import INSIDE, PREFIX, TOKENS

_DELTA = "trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class TokenRows:
    """New rows of an embedding.

    Attributes
    ----------
    label
        The name of the adapter.
    parameter
        The name of the embedding's weight.
    indices
        The rows to replace.
    values
        The new rows.
    """

    label: str
    parameter: str
    indices: tuple[int, ...]
    values: Stored


@dataclass(frozen=True, slots=True)
class SavedTensors:
    """Tensors that replace those of the base model.

    Attributes
    ----------
    tensors
        The tensors by the name of the parameter.
    rows
        New rows of embeddings.
    notes
        Remarks for the user.
    """

    tensors: Mapping[str, Stored] = field(default_factory=dict)
    rows: Sequence[TokenRows] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, adapters: Sequence[AdapterContent], weights: Sequence[float]) -> SavedTensors:
        """Collect the tensors of adapters. The first adapter with a tensor provides it.

        Raises
        ------
        FormatError
            If an adapter holds tensors of an unknown role.
        """
        tensors: dict[str, Stored] = {}
        rows: list[TokenRows] = []
        shared = 0
        scaled = False
        for adapter, weight in zip(adapters, weights, strict=True):
            if not weight:
                continue
            magnitudes = carried_tensors.magnitudes(adapter.carried, adapter.modules.keys())
            for key, stored in adapter.carried.items():
                if key in magnitudes:
                    continue
                if adapter.format != "peft":
                    raise FormatError(f"{adapter.label}: tensor {key!r} is no factor of a low-rank update")
                if TOKENS in key:
                    if key.endswith(_DELTA):
                        rows.append(_rows(adapter, key, stored))
                    continue
                name = parameter_name(key)
                shared += name in tensors
                scaled |= weight != 1
                tensors.setdefault(name, stored)
        notes = [f"several adapters save {shared} tensors: the first adapter's were used"] if shared else []
        if scaled:
            notes.append(
                "tensors that adapters save replace those of the model, whatever the adapter's weight"
            )
        return cls(tensors, rows, notes)

    @property
    def parameters(self) -> Collection[str]:
        """The names of all parameters with new values."""
        return [*self.tensors, *(entry.parameter for entry in self.rows)]


def parameter_name(key: str) -> str:
    """Return the name of a parameter in the base model, from the key of a tensor in an adapter."""
    name = key.removeprefix(PREFIX).replace(f"{INSIDE}.", ".")
    for wrapper in (".modules_to_save.default.", ".modules_to_save.", ".original_module."):
        name = name.replace(wrapper, ".")
    return name


def _rows(adapter: AdapterContent, key: str, stored: Stored) -> TokenRows:
    owner = key.removeprefix(PREFIX).partition(TOKENS)[0]
    settings: Any = adapter.config.get("trainable_token_indices")
    if isinstance(settings, Mapping):
        fitting = [value for name, value in settings.items() if owner == name or owner.endswith(f".{name}")]
        settings = fitting[0] if fitting else None
    if not isinstance(settings, list) or not all(isinstance(i, int) and i >= 0 for i in settings):
        raise FormatError(f"{adapter.label}: trainable_token_indices does not list the tokens of {owner}")
    return TokenRows(adapter.label, parameter_name(f"{owner}.weight"), tuple(settings), stored)
