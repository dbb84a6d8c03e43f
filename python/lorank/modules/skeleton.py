"""The skeleton of a model: name, kind, shape and ties of every parameter, without values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorank.modules import quantized
from lorank.modules.facts import ModelFacts
from lorank.modules.live_modules import named_modules
from lorank.modules.weight import Weight, describe_weight


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The parameters of a model, as its code describes them.

    Attributes
    ----------
    label
        The name of the model's class.
    weights
        Every parameter by its name, in the model's order; a tied parameter has one entry per name.
    owners
        The first name of a tied parameter, by each of its other names.
    make_model
        A function that returns the model, either live or built on the meta device.
    modules
        The dotted names of all modules, including containers and layers without weights.
    model_type
        The `model_type` of the model's configuration; empty if it has none.
    """

    label: str
    weights: Mapping[str, Weight]
    owners: Mapping[str, str]
    make_model: Callable[[], Any] = field(repr=False)
    modules: tuple[str, ...] = ()
    model_type: str = ""

    @cached_property
    def model(self) -> Any:
        """The model, built at the first access, which also imports its library."""
        return self.make_model()

    @classmethod
    def of_model(cls, model: Any, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Skeleton:
        """Read the skeleton of a `torch.nn.Module`, without wrappers of PEFT and torch.

        Parameters
        ----------
        model
            The model.
        shapes
            The true shapes of weights that are stored as codes, by the name of the parameter.
        """
        weights: dict[str, Weight] = {}
        owners: dict[str, str] = {}
        first_names: dict[int, str] = {}
        modules: dict[str, Any] = {}
        model_type = str(getattr(getattr(model, "config", None), "model_type", "") or "")
        for prefix, module in named_modules(model):
            modules[prefix] = module
            parent = modules.get(_parent(prefix))
            for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                name = prefix + local
                shape = (shapes or {}).get(name) or quantized.shape(parameter, module)
                weights[name] = describe_weight(prefix, local, module, shape, parent, model_type)
                first = first_names.setdefault(id(parameter), name)
                if first != name:
                    owners[name] = first
        names = tuple(name for prefix in modules if (name := prefix.removesuffix(".")))
        return cls(type(model).__name__, weights, owners, lambda: model, names, model_type)

    def num_parameters(self, stored: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of parameters of the model; tied parameters count once.

        Parameters
        ----------
        stored
            The shapes of parameters in the files, by name. They differ from the skeleton's if the
            vocabulary was resized without a change of the configuration.
        """
        return sum(
            math.prod(stored.get(name, weight.shape))
            for name, weight in self.weights.items()
            if name not in self.owners
        )

    def facts(self, modules: Collection[str]) -> ModelFacts:
        """Return the facts about the model; `modules` are the names of modules with a row in the report."""
        groups: dict[str, list[Weight]] = defaultdict(list)
        for name, weight in self.weights.items():
            groups[self.owners.get(name, name)].append(weight)
        ties = {}
        for group in groups.values():
            with_row = [weight.module for weight in group if weight.module in modules]
            others = [weight.module for weight in group if weight.kind and weight.module not in modules]
            if with_row and others:
                ties[with_row[0]] = tuple(others)
        refused = {weight.module: weight.refused for weight in self.weights.values() if weight.refused}
        return ModelFacts(self.label, (), refused, ties, self.modules)


def _parent(prefix: str) -> str:
    """Return the prefix of a module's parent, given the prefix of the module."""
    above = prefix.removesuffix(".").rpartition(".")[0]
    return f"{above}." if above else ""
