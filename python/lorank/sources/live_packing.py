"""The weights of a live model that are codes in plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorank.sources import arrays, dequantized
from lorank.sources.dequantized import LiveCodes
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization


class LivePacking:
    """The weights of a live model that are codes in plain tensors.

    Parameters
    ----------
    tensors
        Name -> module and tensor, of every parameter and buffer that is not a library's own kind.
    quantization
        The quantization that the model's configuration declares.
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
        """Return True for codes and for parts of packed weights."""
        return name in self._codes or name in self._packing.parts

    def parameters(self, name: str) -> int | str:
        """Return the number of parameters that a tensor stands for, or the reason why it is unknown."""
        codes = self._codes.get(name)
        if codes is not None and codes.shape is not None:
            return math.prod(codes.shape)
        return self._packing.parameters(name)

    def reason(self, name: str) -> str | None:
        """Return the reason for skipping a tensor; None for plain tensors and codes with a formula."""
        codes = self._codes.get(name)
        if codes is not None and dequantized.loader(codes) is None:
            kind = type(codes.module).__name__
            return f"quantized ({codes.codes.scheme.name} in {kind}), with no known way back to its values"
        return self._packing.part_reason(name)

    def loader(self, name: str) -> tuple[str, dequantized.Loader] | None:
        """Return the full name of a packed weight and the function that dequantizes it."""
        codes = self._codes.get(name)
        load = None if codes is None else dequantized.loader(codes)
        return None if codes is None or load is None else (codes.codes.weight, load)


def declared_by(model: Any) -> Quantization:
    """Return the quantization that a loaded model's configuration declares."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    to_dict = getattr(settings, "to_dict", None)
    settings = to_dict() if callable(to_dict) else settings
    return Quantization(settings if isinstance(settings, Mapping) else {})
