"""Packed weights of live models: codes in plain tensors, and the tensors beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorank.sources import arrays, dequantized
from lorank.sources.dequantized import LiveCodes
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization


class LivePacking:
    """The packed weights of a live model.

    Parameters
    ----------
    tensors
        Module and tensor by name, for every parameter and buffer that is a plain tensor.
    quantization
        The quantization that the model's configuration declares.

    Attributes
    ----------
    shapes
        The true shapes of packed weights by their full names, where the shape is known.
    """

    def __init__(self, tensors: Mapping[str, tuple[Any, Any]], quantization: Quantization) -> None:
        values = {name: tensor for name, (_, tensor) in tensors.items()}
        described = {name: (arrays.dtype_name(x), tuple(x.shape)) for name, x in values.items()}
        self._packing = Packing(described, quantization, lambda name: arrays.content(values[name]))
        self._codes = {
            name: LiveCodes(codes, name, tensors[name][0], values, quantization.block_size)
            for name, codes in self._packing.codes.items()
        }
        self.shapes = {x.codes.weight: x.shape for x in self._codes.values() if x.shape is not None}

    def holds(self, name: str) -> bool:
        """Return True for the codes and for other parts of packed weights."""
        return name in self._codes or name in self._packing.parts

    def parameters(self, name: str) -> int | str:
        """Return the number of parameters that a tensor encodes, or the reason why it is unknown."""
        codes = self._codes.get(name)
        if codes is not None and codes.shape is not None:
            return math.prod(codes.shape)
        return self._packing.parameters(name)

    def reason(self, name: str) -> str | None:
        """Return the reason for skipping a tensor; None for plain weights and codes with a known formula."""
        codes = self._codes.get(name)
        if codes is not None and dequantized.loader(codes) is None:
            kind = type(codes.module).__name__
            return f"quantized ({codes.codes.scheme.name} in {kind}), with no known formula to dequantize it"
        return self._packing.part_reason(name)

    def loader(self, name: str) -> tuple[str, dequantized.Loader] | None:
        """Return the full name of a packed weight and its dequantizing function; None for other tensors."""
        codes = self._codes.get(name)
        load = None if codes is None else dequantized.loader(codes)
        return None if codes is None or load is None else (codes.codes.weight, load)


def declared_by(model: Any) -> Quantization:
    """Return the quantization that a loaded model's configuration declares."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    to_dict = getattr(settings, "to_dict", None)
    settings = to_dict() if callable(to_dict) else settings
    return Quantization(settings if isinstance(settings, Mapping) else {})
