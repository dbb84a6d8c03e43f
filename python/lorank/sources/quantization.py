"""The settings of the quantization that a model's configuration declares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = ("bits", "w_bit", "num_bits", "nbits", "weight_bits")
_GROUPS = ("group_size", "q_group_size", "groupsize")
_ACTIVATIONS = {"input_activations", "output_activations", "kv_cache_scheme"}
_FLOAT8 = ("fp8", "float8", "e4m3", "float-quantized")
# Names of layouts that libraries use for the layout of another library.
_LAYOUTS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "gemm", "auto_round:gptq": "gptq"}
# Beginnings of the names of schemes that a declared method uses. Other methods use any scheme.
_SCHEMES: Mapping[str, tuple[str, ...]] = {
    "gptq": ("GPTQ", "AWQ", "Marlin"),
    "awq": ("AWQ",),
    "bitsandbytes": ("bitsandbytes",),
    "mxfp4": ("MXFP4", "MXFP8"),
    "fp8": ("fp8", "MXFP", "NVFP4"),
    "fbgemm_fp8": ("fp8",),
}
_TYPES = {"int2": 2, "int4": 4, "int8": 8, "float8": 8}


class Quantization:
    """The settings of a quantization, which every library spells in its own way.

    Parameters
    ----------
    settings
        The mapping in the configuration; empty for a model that is not quantized.

    Attributes
    ----------
    method
        The name of the library or method in lower case; empty if it is not declared.
    is_declared
        True if the configuration declares a quantization.

    Examples
    --------
    >>> Quantization({"quant_method": "gptq", "bits": 4}).bits("layers.0.q_proj")
    4
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.is_declared = bool(settings)
        nested = settings.get("quantization")
        names = [settings.get("quant_method"), settings.get("quant_algo")]
        names += [nested.get("quant_algo")] if isinstance(nested, Mapping) else []
        self.method = next((name.lower() for name in names if isinstance(name, str)), "")
        self._text = json.dumps(settings, default=str).lower()

    @property
    def is_float8(self) -> bool:
        """True if some weights are declared to be 8-bit floats."""
        return any(word in self._text for word in _FLOAT8) or any(
            group.get("type") == "float" and group.get("num_bits") == 8 for group in _mappings(self._settings)
        )

    @property
    def is_bitsandbytes_4bit(self) -> bool:
        """True if 4-bit quantization of bitsandbytes is declared."""
        return self._settings.get("load_in_4bit") is True

    @property
    def is_bitsandbytes_8bit(self) -> bool:
        """True if 8-bit quantization of bitsandbytes is declared."""
        return self._settings.get("load_in_8bit") is True

    @property
    def block_size(self) -> tuple[int, int] | None:
        """Shape ``(out, in)`` of the blocks that share a scale; None if it is not declared."""
        found = self._settings.get("weight_block_size")
        if isinstance(found, (list, tuple)) and len(found) == 2:
            rows, cols = found
            if isinstance(rows, int) and isinstance(cols, int) and rows > 0 and cols > 0:
                return rows, cols
        return None

    @property
    def layout(self) -> str:
        """The layout of packed integers within a method (`gptq_v2`, `gemm`); empty if it is not declared."""
        names = (self._settings.get(key) for key in ("checkpoint_format", "version", "packing_format"))
        found = next((name.lower() for name in names if isinstance(name, str)), "")
        return _LAYOUTS.get(found, found)

    def contradiction(self, scheme: str) -> str:
        """Return the reason why the configuration excludes a scheme; empty if it allows the scheme."""
        allowed = _SCHEMES.get(self.method)
        if allowed is None or scheme.startswith(allowed):
            return ""
        return (
            f"its type, shape and neighbours are those of {scheme}, but the configuration declares the "
            f"quantization {self.method}: correct quantization_config in config.json"
        )

    def all_bits(self, module: str) -> set[int]:
        """Return every number of bits per code that the settings name for a module or for all modules."""
        return _bits_within(self._of(module))

    def group_sizes(self, module: str) -> set[int]:
        """Return every size of a group that the settings name for a module or for all modules."""
        sizes = (place.get(key) for place in _mappings(self._of(module)) for key in _GROUPS)
        return {size for size in sizes if type(size) is int and size > 0}

    def _of(self, module: str) -> Mapping[str, Any]:
        """Return the module's own settings; all settings if it has none."""
        own = (place.get(module) for place in _mappings(self._settings))
        return next((found for found in own if isinstance(found, Mapping)), self._settings)

    def bits(self, module: str) -> int | None:
        """Return the number of bits per code of a module; None if the settings do not determine it."""
        for place in _mappings(self._settings):
            own = place.get(module)
            if isinstance(own, Mapping) and (found := _bits_within(own)):
                return found.pop() if len(found) == 1 else None
        found = _bits_within(self._settings)
        return found.pop() if len(found) == 1 else None

    def features(self, module: str) -> tuple[int, int] | None:
        """Return ``(out, in)`` of a module, by its `out_features` and `in_features`; None if unknown."""
        for place in _mappings(self._settings):
            own = place.get(module)
            if isinstance(own, Mapping):
                sizes = own.get("out_features"), own.get("in_features")
                if all(isinstance(size, int) and size > 0 for size in sizes):
                    return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]  # checked the line before
        return None


def _mappings(settings: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield the settings and every mapping in them, except those about activations."""
    yield settings
    for key, value in settings.items():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, Mapping) and key not in _ACTIVATIONS and depth < 8:
                yield from _mappings(entry, depth + 1)


def _bits_within(settings: Mapping[str, Any]) -> set[int]:
    """Return all numbers of bits per code in the settings."""
    found = set()
    for place in _mappings(settings):
        found |= {place[key] for key in _BITS if type(place.get(key)) is int and 1 <= place[key] <= 16}
        if isinstance(place.get("weights"), str):
            found |= {_TYPES[place["weights"]]} if place["weights"] in _TYPES else set()
    return found
