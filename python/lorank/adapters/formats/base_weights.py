"""The base model of an adapter, as far as layouts depend on it: names and shapes of weights, and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base model.

    Attributes
    ----------
    label
        The model's name in messages.
    shapes
        Shape of the weight of every module, as the model holds it.
    config
        The content of the model's configuration.
    class_name
        The name of the model's class; empty if names were guessed.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    class_name: str = ""

    @cached_property
    def _flattened(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.shapes:
            names.setdefault(name.replace(".", "_"), []).append(name)
        return names

    def unflattened(self, name: str) -> str | None:
        """Return the module whose name has underscores for dots in `name`; None unless there is one."""
        found = self._flattened.get(name, [])
        return found[0] if len(found) == 1 else None

    @property
    def num_experts(self) -> int | None:
        """The number of experts of a block; None if the configuration does not give it."""
        text = self.config.get("text_config")
        settings = text if isinstance(text, Mapping) else self.config
        counts = (settings.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        return next((count for count in counts if isinstance(count, int) and count > 0), None)

    def kernel(self, name: str, inputs: int) -> tuple[int, ...] | None:
        """Return the shape ``(in, kh, kw)`` of a convolution's kernel; None for other weights."""
        shape = self.shapes.get(name, ())
        return shape[1:] if len(shape) > 2 and math.prod(shape[1:]) == inputs else None
