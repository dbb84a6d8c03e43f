"""Reads the modules of an adapter from PEFT's settings and tensors; factors are not loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import numpy as np

from lorank._core import FormatError
from lorank.adapters.content import AdapterContent
from lorank.adapters.factors import TensorFactors
from lorank.adapters.formats import expert_layout, peft_notes
from lorank.adapters.formats.expert_layout import Parameter
from lorank.adapters.formats.peft_factors import AdaLoraFactors, StackFactors
from lorank.adapters.formats.peft_keys import FoundKeys
from lorank.adapters.metadata import SPECTRAL_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import Tensors
from lorank.modules import naming
from lorank.modules.weight import Kind
from lorank.peft_format.names import BIAS, holder, is_embedding_key
from lorank.peft_format.settings import Settings
from lorank.peft_format.validation import checked_kind

# Names of convolutions, by the last two parts of a module's name.
_CONVOLUTION = re.compile(r"(^|\.|_)(conv[^.]*|down_?sample[^.]*|patch_embed[^.]*)(\.[^.]+)?$", re.IGNORECASE)


class Scales(Protocol):
    """Looks up the rank and the scaling of a module."""

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return the rank and the scaling of a module."""
        ...


@dataclass(frozen=True, slots=True)
class Layers:
    """The ranks, scalings and parameters of live layers, in place of a file's settings.

    Attributes
    ----------
    scales
        The ranks and scalings of the layers.
    parameters
        Path -> name of the stacked parameter that a layer wraps.
    """

    scales: Scales
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter, and the stacks whose stored layout is not the current one.

    Attributes
    ----------
    adapter
        The adapter with the names and orientation of today's PEFT.
    swapped
        Stacks of experts in the layout of PEFT before 0.19.
    """

    adapter: AdapterContent
    swapped: Sequence[Parameter] = ()


def read(
    tensors: Tensors,
    config: Mapping[str, Any],
    *,
    contradictions: bool = False,
    layers: Layers | None = None,
) -> AdapterContent:
    """Read an adapter from PEFT's tensors and settings; see `read_all`."""
    return read_all(tensors, config, contradictions=contradictions, layers=layers).adapter


def read_all(
    tensors: Tensors,
    config: Mapping[str, Any],
    *,
    contradictions: bool = False,
    layers: Layers | None = None,
    changed_base: bool = False,
) -> Reading:
    """Read an adapter, and the layout of its stacks, from PEFT's tensors and settings.

    Parameters
    ----------
    tensors, config
        The contents of the two files.
    contradictions
        True to accept tensors whose ranks differ from the settings. Scales then come from the settings, as in
        the layers that such files were saved from.
    layers
        The live layers that hold the tensors; None for a file.
    changed_base
        True to accept an initialisation that changes the base model, so that the factors belong to changed
        weights.

    Raises
    ------
    FormatError
        If the adapter is not LoRA, or tensors and settings contradict each other.
    """
    kind = checked_kind(tensors.label, config, changed_base=changed_base)
    found = FoundKeys.of(tensors)
    settings = None if layers else Settings(tensors.label, config)
    if layers:
        parameters = {path: Parameter(name) for path, name in layers.parameters.items()}
    else:
        parameters = expert_layout.parameters(tensors, config, found.factors)
    if settings and kind == "ADALORA":
        _refuse_kernels(tensors.label, found.factors)
    table = layers.scales if layers else settings
    assert table is not None
    modules = []
    for path, keys in found.factors.items():
        reader = _Reader(tensors, table, path, keys, parameters.get(path), contradictions)
        module = reader.adalora() if kind == "ADALORA" else reader.module()
        if settings and kind == "ADALORA":
            module = replace(module, scaling=settings.adalora_scaling(module.rank))
        if path in found.biases:
            module = replace(module, carried={BIAS: reader.bias(found.biases[path])})
        modules.append(module)
    modules.sort(key=lambda module: naming.natural_key(module.name))
    stacks = {module.name for module in modules if module.copies > 1}
    swapped = [p for p in parameters.values() if p.layout == "earlier" and p.name in stacks]
    notes = peft_notes.of_settings(config, found.carried, kind, found.factors)
    notes += peft_notes.of_experts(config, swapped)
    has_ranks = contradictions and kind == "LORA"
    if has_ranks and (other := sum(table.rank_and_scaling(holder(m.name))[0] != m.rank for m in modules)):
        notes.append(
            f"{other} modules have other ranks than the settings state: the settings' scale was kept"
        )
    adapter = AdapterContent(
        {module.name: module for module in modules},
        dict(config),
        found.carried,
        notes,
        label=tensors.label,
        is_spectral=SPECTRAL_KEY in tensors.metadata,
    )
    return Reading(adapter, swapped)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the factors of one path within the adapter."""

    tensors: Tensors
    table: Scales
    path: str
    keys: Mapping[str, str]
    parameter: Parameter | None
    contradictions: bool = False

    def module(self) -> LoraModule:
        if "E" in self.keys:
            self._fail("has lora_E, a tensor of AdaLoRA, but peft_type is LORA")
        a_shape, b_shape = self._shapes()
        name = self.parameter.name if self.parameter else self.path
        # A projection inside a module has the rank and scale of that module.
        rank, scaling = self.table.rank_and_scaling(name if self.parameter else holder(name))
        if self.parameter is not None:
            return self._stack(self.parameter, rank, scaling, a_shape, b_shape)
        if len(b_shape) > 2 and a_shape[0] != b_shape[1] and a_shape[0] % b_shape[1] == 0:
            self._fail(
                f"is a convolution in {a_shape[0] // b_shape[1]} groups, whose update is not a product of "
                "two matrices: leave it out of the adapter"
            )
        if a_shape[0] != b_shape[1] or math.prod(b_shape[2:]) != 1:
            self._fail(f"factors of shapes {list(b_shape)} and {list(a_shape)} do not fit each other")
        if a_shape[0] != rank and not self.contradictions:
            self._fail(
                f"has rank {a_shape[0]}, but the settings state {rank}: `lorank check --fix` writes the "
                "ranks of the tensors"
            )
        rank = a_shape[0]
        return LoraModule(
            name,
            self._kind(a_shape),
            (b_shape[0], math.prod(a_shape[1:])),
            rank,
            scaling,
            self._dtype(),
            self._factors((b_shape[0], math.prod(a_shape[1:])), rank),
            a_tail=a_shape[1:],
            b_tail=b_shape[2:],
        )

    def _kind(self, a_shape: Sequence[int]) -> Kind:
        embeds = set(map(is_embedding_key, self.keys.values()))
        if len(embeds) > 1:
            self._fail("has one factor of an embedding and one of another layer")
        return "embedding" if embeds.pop() else "linear" if len(a_shape) == 2 else "conv"

    def _stack(
        self,
        parameter: Parameter,
        rank: int,
        scaling: float,
        a_shape: Sequence[int],
        b_shape: Sequence[int],
    ) -> LoraModule:
        """Return the module of a stack of experts; see `StackFactors` for the stored layout."""
        copies, rest = divmod(a_shape[0], rank)
        if rest or len(a_shape) != 2 or len(b_shape) != 2 or b_shape[1] != a_shape[0]:
            self._fail(f"factors of shapes {b_shape} and {a_shape} do not fit experts of rank {rank}")
        stored = (b_shape[0], a_shape[1])
        # A parameter of two dimensions had the same orientation in every release.
        swapped = copies > 1 and parameter.layout == "earlier"
        factors = StackFactors(self._factors(stored, a_shape[0]), copies, swapped)
        shape = (stored[1], stored[0]) if swapped else stored
        return LoraModule(parameter.name, "expert", shape, rank, scaling, self._dtype(), factors, copies)

    def adalora(self) -> LoraModule:
        """Return a module of AdaLoRA, whose masks may have left rank 0."""
        if "E" not in self.keys:
            self._fail("has no lora_E, but peft_type is ADALORA in the settings")
        a_shape, b_shape = self._shapes(least=0)
        rank, shape = a_shape[0], (b_shape[0], a_shape[1])
        e_shape = self.tensors.shapes()[self.keys["E"]]
        if len(b_shape) != 2 or len(a_shape) != 2 or b_shape[1] != rank or e_shape != (rank, 1):
            shapes = " and ".join(str(list(shape)) for shape in (b_shape, e_shape, a_shape))
            self._fail(f"factors of shapes {shapes} do not fit each other")
        factors = AdaLoraFactors(self._factors(shape, rank), self.keys["E"])
        scaling = self.table.rank_and_scaling(self.path)[1]
        return LoraModule(
            self.path, "linear", shape, rank, scaling, self._dtype(), factors, a_tail=a_shape[1:]
        )

    def bias(self, key: str) -> np.ndarray[Any, Any]:
        """Return the bias of `lora_bias`, ``(out,)``."""
        outputs = self.tensors.shapes()[self.keys["B"]][0]
        if self.tensors.shapes()[key] != (outputs,):
            self._fail(f"a bias of shape {list(self.tensors.shapes()[key])} does not fit {outputs} outputs")
        vector: np.ndarray[Any, Any] = self.tensors.matrix(key, 1, outputs).to_array()[0]
        return vector

    def _shapes(self, least: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B; `least` is the smallest allowed rank."""
        for factor in "AB":
            if factor not in self.keys:
                self._fail(f"has no lora_{factor}")
        shapes = self.tensors.shapes()
        a, b = shapes[self.keys["A"]], shapes[self.keys["B"]]
        if len(a) < 2 or len(b) < 2 or 0 in (*a[1:], b[0], *b[2:]) or min(a[0], b[1]) < least:
            self._fail(
                f"factors of shapes {list(b)} and {list(a)} are not matrices, as if a sharded model was saved"
            )
        return a, b

    def _factors(self, shape: tuple[int, int], rank: int) -> TensorFactors:
        return TensorFactors(self.tensors, self.keys["B"], self.keys["A"], shape, rank)

    def _dtype(self) -> str:
        return self.tensors.dtype(self.keys["B"])

    def _fail(self, reason: str) -> NoReturn:
        raise FormatError(f"{self.tensors.label}: module {self.path!r}: {reason}")


def _refuse_kernels(label: str, paths: Iterable[str]) -> None:
    """Refuse AdaLoRA of convolutions: its factors are flat, and the file does not hold the kernel's shape."""
    for path in paths:
        if _CONVOLUTION.search(path):
            raise FormatError(
                f"{label}: module {path!r}: AdaLoRA of a convolution does not store the kernel's shape: load "
                "the adapter with PEFT and read it from the live model with LoraAdapter.from_model"
            )
