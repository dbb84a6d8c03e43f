"""The changes of a model's stored tensors that add the updates of adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorank._core import FormatError, Matrix, UpdatedMatrix
from lorank.adapters import carried as carried_tensors
from lorank.adapters.content import AdapterContent
from lorank.adapters.module import LoraModule
from lorank.adapters.stored import Stored
from lorank.baking import terms
from lorank.baking.checkpoint import StoredModel, StoredTensor
from lorank.baking.names import Destination, ModelNames
from lorank.baking.saved_tensors import SavedTensors, TokenRows
from lorank.baking.terms import Addition
from lorank.baking.unpacking import Unpacking, unpacking
from lorank.peft_format.names import BIAS
from lorank.sources import arrays


@dataclass(frozen=True, slots=True)
class Norms:
    """The norms that DoRA gives to the rows or columns of a stored matrix.

    Attributes
    ----------
    values
        The norms.
    of_columns
        True for the norms of columns.
    """

    values: tuple[float, ...] = field(repr=False)
    of_columns: bool


@dataclass(slots=True)
class Change:
    """The new values of a stored tensor.

    Attributes
    ----------
    tensor
        The stored tensor; None for a tensor that the base model lacks.
    saved
        The tensor that replaces the stored one; None if there is none.
    additions
        The terms that are added to each matrix of the tensor.
    norms
        The norms of DoRA by matrix.
    shape
        The shape of each matrix.
    """

    tensor: StoredTensor | None
    saved: Stored | None = None
    additions: dict[int, list[Addition]] = field(default_factory=dict)
    norms: dict[int, Norms] = field(default_factory=dict)
    shape: tuple[int, int] = (0, 0)

    @property
    def modules(self) -> list[str]:
        """The names of the modules whose updates are added."""
        return list(dict.fromkeys(a.module for parts in self.additions.values() for a in parts))

    @property
    def is_copy(self) -> bool:
        """True if the tensor only replaces the stored one."""
        return self.saved is not None and not self.additions and not self.norms

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the tensor after the change."""
        if self.saved is not None:
            return shape_of(self.saved)
        assert self.tensor is not None
        return self.tensor.shape

    @property
    def count(self) -> int:
        """The number of matrices."""
        rows, cols = self.shape
        return math.prod(self.full_shape) // max(1, rows * cols)

    def bases(self) -> Iterator[Matrix]:
        """Yield the matrices of the tensor without their updates."""
        return map(self._base, range(self.count))

    def matrices(self) -> Iterator[UpdatedMatrix]:
        """Yield the matrices of the tensor with their updates."""
        for index, base in enumerate(self.bases()):
            loaded = [addition.load() for addition in self.additions.get(index, ())]
            norms = self.norms.get(index)
            yield UpdatedMatrix(base, loaded, (norms.values, norms.of_columns) if norms else None)

    def _base(self, index: int) -> Matrix:
        rows, cols = self.shape
        if self.saved is None:
            assert self.tensor is not None
            return self.tensor.matrix(rows, cols, index)
        if self.saved.position is not None:
            return self.saved.origin.matrix(self.saved.position, rows, cols, index)  # type: ignore[no-any-return]
        return arrays.matrix(self.saved.to_array().reshape(-1, rows, cols)[index])


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes of a model's tensors.

    Attributes
    ----------
    changes
        The changes by the name of the tensor.
    modules
        The names of all adapted modules, in the order of the adapters.
    notes
        Remarks for the user.
    settings
        New values of the model's configuration, by key; those of a part are in a mapping.
    unpacking
        The packed weights that are stored plain.
    """

    changes: Mapping[str, Change]
    modules: Sequence[str]
    notes: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    unpacking: Unpacking = field(default_factory=Unpacking)


def plan(model: StoredModel, adapters: Sequence[AdapterContent], weights: Sequence[float]) -> Plan:
    """Find the changes of a model's tensors by the weighted updates of adapters.

    Raises
    ------
    FormatError
        If a module or tensor is not in the model, or its shape differs.
    ValueError
        If the updates cannot be added to weights.
    """
    for adapter, weight in zip(adapters, weights, strict=True):
        _check_bakeable(adapter, weight, alone=len(adapters) == 1)
    modules = [module for adapter in adapters for module in adapter.modules.values() if _acts(module)]
    saved = SavedTensors.of(adapters, weights)
    names = ModelNames(model, modules, saved.parameters)
    planner = _Planner(model, names)
    planner.save(saved)
    for adapter, weight in zip(adapters, weights, strict=True):
        if weight:
            planner.add(adapter, weight)
    planner.replace_rows(saved.rows)
    unpacked = unpacking(model, names, planner.changes)
    notes = [*names.notes, *saved.notes, *planner.notes, *unpacked.notes()]
    return Plan(planner.changes, [module.name for module in modules], notes, planner.settings, unpacked)


def _acts(module: LoraModule) -> bool:
    return module.rank > 0 or bool(module.carried)


def _check_bakeable(adapter: AdapterContent, weight: float, *, alone: bool) -> None:
    """Refuse adapters that are no change of weights."""
    config = adapter.config
    if config.get("alora_invocation_tokens"):
        raise ValueError(
            f"{adapter.label}: aLoRA acts from its invocation tokens on, but a changed weight acts "
            "on all tokens"
        )
    if config.get("layer_replication"):
        raise ValueError(f"{adapter.label}: layer_replication repeats layers, which a checkpoint stores once")
    dora = carried_tensors.magnitudes(adapter.carried, adapter.modules.keys())
    if dora and not (alone and weight == 1):
        raise ValueError(
            f"{adapter.label}: DoRA magnitudes do not add up: bake this adapter alone with the weight 1, and "
            "the other adapters into the result"
        )
    if config.get("use_dora"):
        without = set(adapter.modules) - set(dora.values())
        if lost := sorted(
            name for name in without if adapter.modules[name].rank and adapter.modules[name].kind != "expert"
        ):
            raise ValueError(f"{adapter.label}: DoRA without the magnitude of module {lost[0]!r}")


class _Planner:
    """Collects changes."""

    def __init__(self, model: StoredModel, names: ModelNames) -> None:
        self.model = model
        self.names = names
        self.changes: dict[str, Change] = {}
        self.notes: list[str] = []
        self.settings: dict[str, Any] = {}
        self.recent = terms.RecentFactors()

    def save(self, saved: SavedTensors) -> None:
        """Replace tensors by the tensors that adapters save, or add new ones."""
        added = []
        for parameter, stored in saved.tensors.items():
            names = self.names.stored(parameter)
            if not names:
                name = self.names.new_name(parameter)
                self.changes[name] = Change(None, stored)
                added.append(name)
            for name in names:
                tensor = self.model.tensors[name]
                self._check_plain(tensor)
                self.changes[name] = Change(tensor, stored)
                self._check_resized(tensor, shape_of(stored))
        if added:
            more = ", ..." if len(added) > 3 else ""
            self.notes.append(
                f"{len(added)} tensors of adapters are new to the model ({', '.join(added[:3])}{more}): "
                "load it by the class that has them"
            )
        self._check_heads()

    def add(self, adapter: AdapterContent, weight: float) -> None:
        """Add the updates of an adapter."""
        magnitudes = {
            module: key
            for key, module in carried_tensors.magnitudes(adapter.carried, adapter.modules.keys()).items()
        }
        for module in adapter.modules.values():
            found = list(self.names.destinations(module)) if _acts(module) else []
            self._note_shared(module, found)
            for to in found:
                change = self._change(to)
                if module.rank:
                    change.additions.setdefault(to.index, []).append(self._addition(module, to, weight))
                if module.name in magnitudes:
                    change.norms[to.index] = self._norms(adapter, module, magnitudes[module.name], to)
            if (vector := module.carried.get(BIAS)) is not None:
                self._add_bias(module, vector, weight)

    def replace_rows(self, rows: Sequence[TokenRows]) -> None:
        """Replace the rows of trained tokens."""
        for entry in rows:
            names = self.names.stored(entry.parameter)
            if not names:
                raise FormatError(
                    f"{self.model.label}: holds no {entry.parameter}, whose rows an adapter trains"
                )
            for name in names:
                tensor = self.model.tensors[name]
                self._check_plain(tensor)
                new = entry.values.to_array()
                if (
                    not entry.indices
                    or max(entry.indices) >= tensor.shape[0]
                    or new.shape != (len(entry.indices), tensor.shape[1])
                ):
                    raise FormatError(
                        f"{entry.label}: the trained tokens do not fit {name} of shape {list(tensor.shape)}"
                    )
                change = self._change(Destination(tensor, 0, tensor.matrix_shape))
                old = tensor.rows(entry.indices)
                change.additions.setdefault(0, []).append(
                    terms.new_rows(entry.parameter, old, new, entry.indices, tensor.shape[0])
                )

    def _change(self, to: Destination) -> Change:
        self._check_plain(to.tensor)
        change = self.changes.setdefault(to.tensor.name, Change(to.tensor))
        rows, cols = to.shape
        if change.saved is not None and math.prod(change.full_shape) != math.prod(to.tensor.shape):
            rows = change.full_shape[0]
        change.shape = (rows, cols)
        return change

    def _check_plain(self, tensor: StoredTensor) -> None:
        if (reason := self.model.packing.reason(tensor.name)) is not None:
            raise FormatError(
                f"{self.model.label}: tensor {tensor.name!r} is {reason}: dequantize the model first"
            )
        if not tensor.is_float:
            raise FormatError(
                f"{self.model.label}: tensor {tensor.name!r} holds {tensor.dtype} values, not weights"
            )

    def _addition(self, module: LoraModule, to: Destination, weight: float) -> Addition:
        if to.block is None:
            return terms.product(self.recent, module, to.copy, weight, transposed=to.transposed)
        return terms.part_of_product(
            self.recent, module, to.copy, weight, to.block, to.shape, transposed=to.transposed
        )

    def _norms(self, adapter: AdapterContent, module: LoraModule, key: str, to: Destination) -> Norms:
        if to.block is not None:
            raise FormatError(
                f"module {module.name!r}: DoRA needs the whole weight, but {to.tensor.name} holds a part"
            )
        values = adapter.carried[key].to_array().astype(np.float64).ravel()
        if len(values) != module.shape[0]:
            raise FormatError(
                f"{adapter.label}: module {module.name!r} has {len(values)} magnitudes "
                f"for {module.shape[0]} outputs"
            )
        return Norms(tuple(values.tolist()), to.transposed)

    def _add_bias(self, module: LoraModule, vector: np.ndarray[Any, Any], weight: float) -> None:
        names = self.names.stored(f"{module.name}.bias")
        if not names:
            raise FormatError(
                f"{self.model.label}: {module.name} has no bias, but the adapter adds one (lora_bias)"
            )
        for name in names:
            tensor = self.model.tensors[name]
            if math.prod(tensor.shape) != len(vector):
                raise FormatError(
                    f"{module.name}: a bias of {len(vector)} does not fit {name} of shape "
                    f"{list(tensor.shape)}"
                )
            change = self._change(Destination(tensor, 0, tensor.matrix_shape))
            change.additions.setdefault(0, []).append(
                terms.vector(module.name, vector, weight * module.scaling)
            )

    def _note_shared(self, module: LoraModule, found: Sequence[Destination]) -> None:
        if not found or not (others := self.names.tied_to(module.name)):
            return
        self.notes.append(
            f"{module.name} shares its weight with {', '.join(others)}: the update changes them, too, "
            "as in PEFT's merge"
        )

    def _check_resized(self, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
        """Adapt the size of the vocabulary in the settings to a table with other rows."""
        if shape == tensor.shape:
            return
        if len(shape) != len(tensor.shape) or shape[1:] != tensor.shape[1:]:
            raise FormatError(
                f"an adapter saves {tensor.name} with shape {list(shape)}, but "
                f"{self.model.label} holds {list(tensor.shape)}"
            )
        content = self.model.config.content
        text = content.get("text_config")
        if content.get("vocab_size") == tensor.shape[0]:
            self.settings["vocab_size"] = shape[0]
        elif isinstance(text, Mapping) and text.get("vocab_size") == tensor.shape[0]:
            self.settings["text_config"] = {"vocab_size": shape[0]}
        self.notes.append(
            f"{tensor.name} grows from {tensor.shape[0]} to {shape[0]} rows"
            if shape[0] > tensor.shape[0]
            else f"{tensor.name} shrinks from {tensor.shape[0]} to {shape[0]} rows"
        )

    def _check_heads(self) -> None:
        """Refuse a resized embedding beside an output head of the old size."""
        old = self.model.config.content.get("vocab_size")
        new = self.settings.get("vocab_size")
        head = next((t for name, t in self.model.tensors.items() if name.endswith("lm_head.weight")), None)
        if new is None or head is None or head.shape[0] != old:
            return
        change = self.changes.get(head.name)
        if change is None or change.full_shape[0] != new:
            raise FormatError(
                f"an adapter resizes the vocabulary to {new}, but {head.name} of {self.model.label} has "
                f"{old} rows: save both tables with the adapter"
            )


def shape_of(stored: Stored) -> tuple[int, ...]:
    """Return the shape of a tensor of an adapter."""
    return tuple(stored.shape if stored.position is not None else stored.origin.shape)
