"""The base model that an adapter is checked against: names, shapes and ties of its modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.module import LoraModule
from lorank.modules import naming
from lorank.modules.building import Unknown
from lorank.modules.description import describe_model
from lorank.modules.facts import ModelFacts
from lorank.modules.live_modules import is_module
from lorank.modules.loading import loaded_name
from lorank.modules.model_config import ModelConfig
from lorank.modules.skeleton import Skeleton
from lorank.modules.weight import Weight
from lorank.sources import Source, hub, open_source


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The modules of a base model, by the names that an adapter gives them.

    Attributes
    ----------
    label
        The name of the model in messages.
    shapes
        Shape ``(out, in)`` of the matrix of each module in PEFT's orientation, by the name that PEFT uses.
    containers
        The names of all modules, including modules without a matrix.
    facts
        Facts about the model other than its matrices.
    skeleton
        The skeleton of the model; None if names were guessed.
    """

    label: str
    shapes: Mapping[str, tuple[int, int]]
    containers: frozenset[str]
    facts: ModelFacts
    skeleton: Skeleton | None = None

    @classmethod
    def of(cls, base: Any, adapted: Iterable[str] = ()) -> BaseModel:
        """Describe a base model.

        Parameters
        ----------
        base
            A folder with a `config.json`, that file, a hub id, a file or folder of weights, or a live model.
        adapted
            The names of an adapter's modules. If the configuration does not give the model's class, the names
            decide whether the model has a head.

        Raises
        ------
        FileNotFoundError
            If no file, folder or hub model has that name.
        ValueError
            If neither the configuration nor the weights give the names of modules.
        """
        if is_module(base):
            return cls._by_skeleton(Skeleton.of_model(base))
        path = hub.local_path(base, hub.download_config)
        names = dict.fromkeys((f"{name}.weight" for name in adapted), ())
        found = describe_model(ModelConfig.read(path), names)
        if isinstance(found, Unknown):
            return cls._by_weights(path, found)
        return cls._by_skeleton(found.skeleton)

    @classmethod
    def _by_skeleton(cls, skeleton: Skeleton) -> BaseModel:
        """Describe a model by its skeleton."""
        shapes = {}
        for weight in skeleton.weights.values():
            if weight.kind and (shape := _as_peft_reads(weight)) is not None:
                shapes[weight.module] = shape
        firsts = {w.module for name, w in skeleton.weights.items() if name not in skeleton.owners}
        modules = frozenset(skeleton.modules)
        return cls(skeleton.label, shapes, modules, skeleton.facts(firsts & shapes.keys()), skeleton)

    @classmethod
    def _by_weights(cls, path: Path, unknown: Unknown) -> BaseModel:
        """Describe a model by the names and shapes of its weights."""
        try:
            source: Source = open_source(path)
        except (OSError, ValueError, FormatError) as error:
            reason = f"{unknown.reason}, and there are no weights to read names from"
            raise ValueError(f"{path}: {reason}") from error
        # PEFT's update of an embedding has the shape of the transposed table.
        shapes = {
            m.info.module: m.info.shape[::-1] if m.info.kind == "embedding" else m.info.shape
            for m in source.matrices
        }
        parents = {above for name in shapes for above in _above(name)}
        return cls(source.label, shapes, frozenset(parents | shapes.keys()), source.facts)

    def missing(self, modules: Iterable[LoraModule]) -> dict[str, str]:
        """Map the name of every adapted module that the model lacks to a reason."""
        absent = [module.name for module in modules if not self._has(module.name)]
        by_suffix: dict[str, str] = {}
        for own in self.shapes if absent else ():
            for suffix in naming.suffixes(own):
                by_suffix.setdefault(suffix, own)
        return {name: f"{self.label} has no {name}{_advice(name, by_suffix)}" for name in absent}

    def misfits(self, modules: Iterable[LoraModule]) -> list[str]:
        """Return a reason for every module whose update has another shape than the weight."""
        reasons = []
        for module in modules:
            shape = self.shapes.get(self._own_name(module.name))
            if shape is not None and shape != module.shape:
                reasons.append(
                    f"the update of {module.name} has shape {module.shape}, but its weight in {self.label} "
                    f"has {shape}"
                )
        return reasons

    def refused(self, modules: Iterable[LoraModule]) -> str:
        """Return the reason why PEFT cannot adapt one of the modules; empty if it can adapt all."""
        reasons = self.facts.refused
        return next((f"{m.name}: {reasons[m.name]}" for m in modules if m.name in reasons), "")

    def _has(self, name: str) -> bool:
        """Return True if the model has a module of that name, or of the name that it becomes on loading."""
        if self._own_name(name) in self.shapes or name in self.containers:
            return True
        # The model may stack experts that the adapter names one by one.
        stack, dot, _ = name.rpartition(".experts.")
        if dot and f"{stack}.experts" in self.containers:
            return True
        return self.skeleton is not None and self._loaded(name)[0] in self.skeleton.weights

    def _own_name(self, name: str) -> str:
        """Return the name of a module in the loaded model; older releases may have used another name."""
        if name in self.shapes or self.skeleton is None:
            return name
        if f"{name}.weight" in self.shapes:
            return f"{name}.weight"
        target, is_part = self._loaded(name)
        weight = self.skeleton.weights.get(target)
        return weight.module if weight is not None and weight.kind and not is_part else name

    def _loaded(self, name: str) -> tuple[str, bool]:
        """Return the parameter that holds a module's weight after loading, and True if it holds more."""
        assert self.skeleton is not None
        return loaded_name(f"{name}.weight", self.skeleton)


def _advice(name: str, by_suffix: Mapping[str, str]) -> str:
    """Return a hint with the most similar name in the model; empty if there is none."""
    suffixes = (suffix for suffix in naming.suffixes(name) if "." in suffix and suffix in by_suffix)
    return next((f" (it has {by_suffix[suffix]})" for suffix in suffixes), "")


def _as_peft_reads(weight: Weight) -> tuple[int, int] | None:
    """Return the shape ``(out, in)`` of a matrix, or of one expert in a stack; None for other weights."""
    shape = weight.shape
    if weight.kind == "expert" and len(shape) == 3:
        rows, cols = shape[1:]
    elif weight.kind == "conv":
        return shape[0], math.prod(shape[1:])
    elif len(shape) == 2:
        rows, cols = shape
    else:
        return None
    return (cols, rows) if weight.transposed or weight.kind == "embedding" else (rows, cols)


def _above(name: str) -> list[str]:
    """Return the names of a module's ancestors."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def base_weights(base: Any) -> BaseWeights:
    """Describe a base model for layouts of adapters; see `BaseModel.of` for its forms."""
    model = BaseModel.of(base)
    if is_module(base):
        config: Any = getattr(base, "config", None)
        content = dict(config or {}) if not hasattr(config, "to_dict") else config.to_dict()
        label = str(content.get("_name_or_path") or model.label)
    else:
        content, label = ModelConfig.read(hub.local_path(base, hub.download_config)).content, str(base)
    shapes: Mapping[str, tuple[int, ...]] = model.shapes
    class_name = ""
    if model.skeleton is not None:
        class_name = model.skeleton.label
        shapes = {
            weight.module: tuple(weight.shape) for weight in model.skeleton.weights.values() if weight.kind
        }
    return BaseWeights(label, shapes, content, class_name)
