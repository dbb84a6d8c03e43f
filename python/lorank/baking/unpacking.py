"""The settings of a quantized model in which adapted weights are stored plain."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorank._core import FormatError
from lorank.baking.checkpoint import StoredModel
from lorank.baking.names import ModelNames
from lorank.modules import naming
from lorank.modules.model_config import QUANTIZATION_FILES, QUANTIZATION_KEYS
from lorank.sources.codes import module_of
from lorank.sources.quantization import Quantization

# The keys, by method, of the list of modules that stay plain. New lists have the first key.
_PLAIN_MODULES: Mapping[str, tuple[str, ...]] = {
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "fbgemm_fp8": ("modules_to_not_convert",),
    "mxfp4": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "awq": ("modules_to_not_convert",),
    "compressed-tensors": ("ignore",),
    "modelopt": ("ignore", "exclude_modules"),
}
# Methods that quantize every module but the output head if the settings hold no list.
_HAVE_DEFAULTS = ("fp8", "fbgemm_fp8", "bitsandbytes", "awq")
# transformers loads a checkpoint of these methods only if all of its experts are packed, or nothing is.
_UNIFORM_EXPERTS = ("compressed-tensors",)
# Libraries load all experts of a block as one module.
_EXPERTS = re.compile(r"(?:.*\.)?experts(?=\.)")


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Packed weights that a model stores plain.

    Attributes
    ----------
    adapted
        The packed weights that change.
    others
        The packed weights without a change that have to be plain, too.
    is_complete
        True if no packed weight is left.
    cause
        The reason for the packed weights without a change.
    method
        The quantization method; empty if the model declares none.
    modules
        The modules that the settings have to list as plain ones.
    heads
        The output heads, which methods leave plain only if the settings hold no list.
    """

    adapted: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    is_complete: bool = False
    cause: str = ""
    method: str = ""
    modules: tuple[str, ...] = field(default=(), repr=False)
    heads: tuple[str, ...] = ()

    @property
    def weights(self) -> set[str]:
        """The names of all packed weights that are stored plain."""
        return {*self.adapted, *self.others}

    def notes(self) -> list[str]:
        """Return remarks for the user."""
        if not self.adapted:
            return []
        notes = [f"{len(self.weights)} packed weights become plain ones"]
        if self.others:
            notes.append(f"{len(self.others)} of them have no update: {self.cause}")
        return notes

    def edited(self, file: str, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the settings in a file after the change; None if the file has lost its purpose.

        Parameters
        ----------
        file
            The name of the file.
        content
            The settings in the file.
        """
        if not self.adapted:
            return content
        if file in QUANTIZATION_FILES:
            return None if self.is_complete else self._listed(content)
        return self._edited_places(content)

    def _edited_places(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change the settings of the quantization within those of a model and of its language model."""
        new: dict[str, Any] = {}
        for key, value in content.items():
            if key == "text_config" and isinstance(value, Mapping):
                new[key] = self._edited_places(value)
            elif key not in QUANTIZATION_KEYS or not isinstance(value, Mapping):
                new[key] = value
            elif not self.is_complete:
                new[key] = self._listed(value)
        return new

    def _listed(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add the modules to the list of plain modules."""
        keys = _PLAIN_MODULES.get(self.method, ())
        nested = settings.get("quantization")
        if isinstance(nested, Mapping) and not any(key in settings for key in keys):
            return {**settings, "quantization": self._listed({"exclude_modules": [], **nested})}
        if not keys:
            return settings
        key = next((key for key in keys if isinstance(settings.get(key), list)), keys[0])
        listed = settings.get(key)
        if not isinstance(listed, list):
            listed = list(self.heads) if self.method in _HAVE_DEFAULTS else []
        return {**settings, key: list(dict.fromkeys([*listed, *self.modules]))}


def unpacking(model: StoredModel, names: ModelNames, changed: Collection[str]) -> Unpacking:
    """Find the packed weights that must be stored plain if some tensors change.

    Raises
    ------
    FormatError
        If a weight that must be plain, too, cannot be decoded.
    """
    adapted = tuple(name for name in changed if name in model.codes)
    if not adapted:
        return Unpacking()
    settings = model.config.quantization
    method = Quantization(settings).method
    has_experts = any(map(_EXPERTS.match, adapted))
    if settings and (method not in _PLAIN_MODULES or (has_experts and method in _UNIFORM_EXPERTS)):
        subject = "experts" if method in _PLAIN_MODULES else "modules"
        cause = f"{method or 'the quantization'} packs all {subject} or none"
        same, undecodable = set(model.codes), list(model.packed)
    else:
        cause = "libraries load all experts of a block as one module"
        blocks = {_unit(name) for name in adapted if _EXPERTS.match(name)} if settings else set()
        same = {name for name in model.codes if _unit(name) in blocks}
        undecodable = [name for name in model.packed if _unit(name) in blocks]
    for weight in undecodable:
        raise FormatError(
            f"{model.label}: {weight} must become plain, because {cause}, but {model.packed[weight]} codes "
            "cannot be decoded: dequantize the model with the library that made it"
        )
    others = tuple(name for name in model.codes if name in same and name not in adapted)
    is_complete = not model.packed and len(adapted) + len(others) == len(model.codes)
    modules = _modules((*adapted, *others), names)
    heads = [name for name in model.plain_shapes if naming.is_output_head(module_of(name))]
    plain_heads = dict.fromkeys((*map(module_of, heads), "lm_head"))
    return Unpacking(adapted, others, is_complete, cause, method, modules, tuple(plain_heads))


def _modules(weights: Iterable[str], names: ModelNames) -> tuple[str, ...]:
    """Return the modules of weights, by their names in the file and in the model."""
    found: dict[str, None] = {}
    for weight in weights:
        units = [_unit(weight)]
        if (live := names.live_module(weight)) is not None:
            units.append(_unit(live))
        found.update(dict.fromkeys(units))
    return tuple(found)


def _unit(weight: str) -> str:
    """Return the module of a weight, which is that of all experts of a block for a weight of experts."""
    block = _EXPERTS.match(weight)
    return block.group() if block else module_of(weight)
