"""The configuration of a model, `config.json`: every key that lorank reads, for all libraries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorank._internal.json_files import read_json
from lorank._internal.regular_files import SETTINGS_BYTES

FILE_NAME = "config.json"
"""The file that holds the configuration of a model."""

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside `config.json` in which older libraries store the settings of a quantization."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys under which libraries keep the settings of a quantization."""

# Keys of numbers that decide how many modules are built.
_DEPTHS = re.compile(
    r".*(?:layers?|blocks?|depths?|experts?|stages?|levels?|heads?|codebooks?|quantizers?)", re.IGNORECASE
)
# A model has at least one tensor per layer, but layers may be shared, and files may hold a part of a model.
_LAYERS_PER_TENSOR = 16
_ALWAYS_ALLOWED = 4096
# transformers gives every label a name. The largest data sets have some 20,000 classes.
_LABELS = re.compile(r"(?:num|n)_(?:\w+_)?(?:labels|classes)", re.IGNORECASE)
_MOST_LABELS = 1_000_000


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The configuration of a model.

    Attributes
    ----------
    content
        The content of `config.json`; empty if there is no such file, or if it holds no JSON object.
    folder
        The folder of the file.
    origin
        The name of the place that holds the configuration, for messages. If it is not `config.json`, the
        content is complete, and no file is read.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    origin: str = FILE_NAME

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read the configuration in a folder or beside a file of weights.

        The settings of a quantization are read from a separate file if `config.json` has none.
        """
        folder = path if path.is_dir() else path.parent
        config = cls(_object_in(folder / FILE_NAME) or {}, folder)
        if config.quantization:
            return config
        for name in QUANTIZATION_FILES:
            if (settings := _object_in(folder / name)) is not None:
                return cls({**config.content, QUANTIZATION_KEYS[0]: settings}, folder)
        return config

    @property
    def is_empty(self) -> bool:
        """True if the configuration holds no settings."""
        return not self.content

    @property
    def model_type(self) -> str:
        """The name of the architecture in transformers; empty if there is none."""
        return _model_type(self.content)

    @property
    def diffusers_class(self) -> str:
        """The name of the model's class in diffusers; empty for models of other libraries."""
        return str(self.content["_class_name"]) if "_class_name" in self.content else ""

    @property
    def library(self) -> str:
        """The library that builds the model; empty if the configuration does not give the model type."""
        if "_class_name" in self.content:
            return "diffusers"
        return "transformers" if isinstance(self.content.get("model_type"), str) else ""

    @property
    def architectures(self) -> list[str]:
        """The names of the model's classes in transformers."""
        names = self.content.get("architectures")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @property
    def num_experts(self) -> Any:
        """The number of experts in a block, unchecked; None if it is not given."""
        text = self._of_text
        return text.get("num_local_experts") or text.get("num_experts")

    @property
    def text_model_type(self) -> str:
        """The name of the architecture of the language model, which may be a part of a larger model."""
        return _model_type(self._of_text)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The settings of a quantization; empty if there are none."""
        for place in (self.content, self.content.get("text_config")):
            if isinstance(place, Mapping):
                for key in QUANTIZATION_KEYS:
                    found = place.get(key)
                    if isinstance(found, Mapping) and found:
                        return found
        return {}

    def without_quantization(self) -> ModelConfig:
        """Return the configuration without the settings of a quantization."""
        content = {key: value for key, value in self.content.items() if key not in QUANTIZATION_KEYS}
        text = content.get("text_config")
        if isinstance(text, Mapping):
            content["text_config"] = {k: v for k, v in text.items() if k not in QUANTIZATION_KEYS}
        return replace(self, content=content)

    def excess(self, num_tensors: int) -> str:
        """Return a setting that needs more modules than a checkpoint can fill; empty if there is none.

        Parameters
        ----------
        num_tensors
            The number of tensors in the checkpoint.
        """
        allowed = _ALWAYS_ALLOWED + _LAYERS_PER_TENSOR * num_tensors
        for key, value in _numbers(self.content):
            if _DEPTHS.fullmatch(key) and value > allowed:
                return f"{key}={value}"
            if _LABELS.fullmatch(key) and value > _MOST_LABELS:
                return f"{key}={value}"
        return ""

    @property
    def _of_text(self) -> Mapping[str, Any]:
        text = self.content.get("text_config")
        return text if isinstance(text, Mapping) else self.content


def _object_in(file: Path) -> Mapping[str, Any] | None:
    """Return the JSON object in a file; None if the file cannot be read or holds anything else."""
    try:
        content = read_json(file, SETTINGS_BYTES)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _model_type(config: Mapping[str, Any]) -> str:
    """Return the architecture's name; empty if a damaged file holds anything but a string."""
    name = config.get("model_type")
    return name if isinstance(name, str) else ""


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer of a configuration with its key."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _numbers(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
