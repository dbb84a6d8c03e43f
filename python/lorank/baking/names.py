"""Finds the stored matrices that hold the weights of adapted modules."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorank._core import FormatError
from lorank.adapters.module import LoraModule
from lorank.baking.blocks import Block
from lorank.baking.checkpoint import StoredModel, StoredTensor
from lorank.baking.inversion import Portion, portions
from lorank.baking.plain_models import PLAIN_MODELS
from lorank.modules import naming
from lorank.modules.building import Unknown
from lorank.modules.description import Description, describe_model
from lorank.sources.tensor_matrices import MatrixFinder


@dataclass(frozen=True, slots=True)
class Destination:
    """A stored matrix that holds the weight of an adapted module, or a block of it.

    Attributes
    ----------
    tensor
        The stored tensor.
    index
        The matrix within the tensor.
    shape
        The stored shape of the matrix.
    copy
        The expert of the module; 0 for other modules.
    transposed
        True if the weight is stored as ``(in, out)``.
    block
        The block of the weight that the matrix holds; None for the whole weight.
    """

    tensor: StoredTensor
    index: int
    shape: tuple[int, int]
    copy: int = 0
    transposed: bool = False
    block: Block | None = None


class ModelNames:
    """The stored tensors of a model by the names that an adapter gives to modules and parameters.

    Parameters
    ----------
    model
        The stored model.
    modules
        All adapted modules.
    parameters
        The names of other parameters that adapters hold.

    Attributes
    ----------
    notes
        Remarks on the origin of names.

    Raises
    ------
    FormatError
        If a module is not in the model, or has another shape.
    """

    def __init__(
        self, model: StoredModel, modules: Sequence[LoraModule], parameters: Collection[str] = ()
    ) -> None:
        self._model = model
        self.notes: list[str] = []
        self._description: Description | None = None
        self._weights: dict[str, str] = {}
        self._stored: dict[str, list[str]] = {name: [name] for name in model.tensors}
        self._portions: Mapping[str, list[Portion]] = {}
        names = list(dict.fromkeys(module.name for module in modules))
        if not self._is_direct(modules, parameters):
            self._describe()
        self._shift = self._prefixes(names)
        self._check_present(names)
        self._invert(names)

    def _is_direct(self, modules: Iterable[LoraModule], parameters: Collection[str]) -> bool:
        """Return True if the names and shapes of stored tensors suffice, so that no model need be built."""
        if self._model.config.model_type not in PLAIN_MODELS or self._model.packing.codes:
            return False
        if any(
            naming.is_embedding(_owner(name)) or naming.is_output_head(_owner(name)) for name in parameters
        ):
            return False
        if any(module.kind == "expert" or _is_table(module) for module in modules):
            return False
        tensors = self._model.tensors
        return all(f"{module.name}.weight" in tensors for module in modules)

    def _describe(self) -> None:
        """Find the model's parameters, and the stored tensors that they are loaded from."""
        shapes = self._model.plain_shapes
        found = describe_model(self._model.config, shapes)
        if not isinstance(found, Unknown) and found.placement.misfit(shapes, found.skeleton):
            found = Unknown(f"config.json describes a {found.skeleton.label}, which the tensors do not fit")
        if isinstance(found, Unknown):
            self.notes.append(f"modules were found by the names of stored tensors: {found.reason}")
            return
        self._description = found
        by_owner: dict[str, list[str]] = defaultdict(list)
        skeleton = found.skeleton
        for stored, parameter in found.placement.renamed.items():
            by_owner[skeleton.owners.get(parameter, parameter)].append(stored)
        for parameter in skeleton.weights:
            if stored_names := by_owner.get(skeleton.owners.get(parameter, parameter)):
                self._stored[parameter] = sorted(stored_names)
        for weight in skeleton.weights.values():
            if weight.kind is not None:
                self._weights.setdefault(weight.module, weight.name)

    def _prefixes(self, names: Sequence[str]) -> tuple[int, str]:
        """Return the number of leading parts to remove from all names, and a prefix to add to them."""
        if not names or any(self._has(name) for name in names):
            return 0, ""
        for count in (1, 2, 3):
            starts = {".".join(name.split(".")[:count]) for name in names}
            rests = [".".join(name.split(".")[count:]) for name in names]
            if len(starts) == 1 and any(map(self._has, rests)):
                return count, ""
        known = [*self._weights, *(naming.without_parameter(name) for name in self._model.tensors)]
        for own in known:
            if own.endswith(f".{names[0]}"):
                prefix = own[: -len(names[0])]
                if all(self._has(prefix + name) for name in names):
                    return 0, prefix
        return 0, ""

    def _shifted(self, name: str) -> str:
        count, prefix = self._shift
        return prefix + (".".join(name.split(".")[count:]) if count else name)

    def _has(self, name: str) -> bool:
        return self._parameter(name) is not None or self._packed(name) is not None

    def _parameter(self, name: str) -> str | None:
        """Return the parameter that holds a module's weight, by the name of the module."""
        for spelled in (name, f"{name}.weight"):
            if spelled in self._weights:
                return self._weights[spelled]
        for spelled in (f"{name}.weight", name):
            if spelled in self._model.tensors and (self._description is None or spelled in self._stored):
                return spelled
        return None

    def _packed(self, name: str) -> str | None:
        return next((n for n in (f"{name}.weight", name) if n in self._model.packed), None)

    def _check_present(self, names: Iterable[str]) -> None:
        absent = [name for name in names if not self._has(self._shifted(name))]
        if not absent:
            return
        known = self._weights or {naming.without_parameter(name) for name in self._model.tensors}
        close = difflib.get_close_matches(absent[0], list(known), 3, 0.4)
        nearest = f"; the nearest names are {', '.join(close)}" if close else ""
        more = f" ({len(absent)} modules are missing)" if len(absent) > 1 else ""
        raise FormatError(
            f"{self._model.label}: has no module {absent[0]!r}{more}{nearest}: "
            "give the model that the adapter was trained on"
        )

    def _invert(self, names: Iterable[str]) -> None:
        """Find the stored matrices of parameters that transformers computes on loading."""
        if self._description is None:
            return
        converted = {t for conversion in self._description.placement.conversions for t in conversion.targets}
        owners = self._description.skeleton.owners
        wanted = set()
        for name in names:
            if (parameter := self._parameter(self._shifted(name))) is not None:
                wanted.add(owners.get(parameter, parameter))
        if wanted := wanted & converted:
            model = self._model
            self._portions = portions(model.config, model.plain_shapes, self._description, wanted)

    def stored(self, parameter: str) -> list[str]:
        """Return the names of the stored tensors that hold a parameter; none if there are none."""
        return self._stored.get(self._shifted(parameter), self._stored.get(parameter, []))

    def tied_to(self, module: str) -> list[str]:
        """Return the other modules that share a module's weight."""
        if self._description is None:
            return []
        skeleton = self._description.skeleton
        parameter = self._parameter(self._shifted(module))
        if parameter is None:
            return []
        owner = skeleton.owners.get(parameter, parameter)
        group = [name for name in skeleton.weights if skeleton.owners.get(name, name) == owner]
        return [skeleton.weights[name].module for name in group if name != parameter]

    def live_module(self, stored: str) -> str | None:
        """Return the module that a stored tensor is loaded into; None if that is unknown."""
        if self._description is None:
            return None
        parameter = self._description.placement.renamed.get(stored, "")
        weight = self._description.skeleton.weights.get(parameter)
        return None if weight is None else weight.module

    def new_name(self, parameter: str) -> str:
        """Return the name for a parameter that the stored model lacks."""
        return self._shifted(parameter) if self._shift[1] else parameter

    def destinations(self, module: LoraModule) -> Iterator[Destination]:
        """Yield the stored matrices that hold a module's weight.

        Raises
        ------
        FormatError
            If the weight has another shape than the update, or is stored in a form that cannot be changed.
        """
        name = self._shifted(module.name)
        parameter = self._parameter(name)
        if parameter is None or not (self.stored_parameter(parameter) or self._portions_of(parameter)):
            if packed := self._packed(name):
                raise FormatError(
                    f"{self._model.label}: {packed} is packed ({self._model.packed[packed]}): only plain "
                    "weights can take an update: dequantize the model first"
                )
            raise FormatError(f"{self._model.label}: holds no tensor for the module {module.name!r}")
        yield from self._of_portions(module, parameter)
        for stored in self.stored_parameter(parameter):
            yield from self._of_tensor(module, parameter, self._model.tensors[stored])

    def stored_parameter(self, parameter: str) -> list[str]:
        """Return the names of the stored tensors that are loaded unchanged into a parameter."""
        return self._stored.get(parameter, [])

    def _portions_of(self, parameter: str) -> list[Portion]:
        if self._description is None:
            return []
        return self._portions.get(self._description.skeleton.owners.get(parameter, parameter), [])

    def _of_portions(self, module: LoraModule, parameter: str) -> Iterator[Destination]:
        parts = self._portions_of(parameter)
        if not parts:
            return
        assert self._description is not None
        weight = self._description.skeleton.weights[parameter]
        transposed = weight.transposed or module.kind == "embedding"
        self._check_shape(module, parameter, weight.shape[-2:], transposed)
        for part in parts:
            tensor = self._model.tensors[part.tensor]
            shape = (tensor.shape[-2], tensor.shape[-1])
            yield Destination(tensor, part.index, shape, part.copy, transposed, part.block)

    def _of_tensor(self, module: LoraModule, parameter: str, tensor: StoredTensor) -> Iterator[Destination]:
        stack = module.copies > 1 or (module.kind == "expert" and len(tensor.shape) == 3)
        shape = (
            (tensor.shape[-2], tensor.shape[-1]) if stack and len(tensor.shape) == 3 else tensor.matrix_shape
        )
        transposed = self._is_transposed(module, parameter, tensor, shape)
        self._check_shape(module, tensor.name, shape, transposed)
        if stack and tensor.shape[0] != module.copies:
            raise FormatError(
                f"module {module.name!r} has updates of {module.copies} experts, but {tensor.name} "
                f"stacks {tensor.shape[0]}"
            )
        for copy in range(module.copies if stack else 1):
            yield Destination(tensor, copy, shape, copy, transposed)

    def _is_transposed(
        self, module: LoraModule, parameter: str, tensor: StoredTensor, shape: tuple[int, int]
    ) -> bool:
        if module.kind == "embedding":
            # The other name of a tied table is that of a linear layer.
            return True
        if module.kind == "conv" or (len(tensor.shape) > 2 and module.kind != "expert"):
            return False
        if self._description is not None and parameter in self._description.skeleton.weights:
            return self._description.skeleton.weights[parameter].transposed
        if shape[0] != shape[1]:
            return shape == module.shape[::-1]
        shapes = {name: t.shape for name, t in self._model.tensors.items()}
        finder = MatrixFinder(shapes, self._model.config)
        return finder.conv1d if module.kind == "linear" else finder.transposed_experts

    def _check_shape(
        self,
        module: LoraModule,
        name: str,
        shape: Sequence[int],
        transposed: bool,
    ) -> None:
        expected = module.shape[::-1] if transposed else module.shape
        if tuple(shape) != expected:
            raise FormatError(
                f"the update of {module.name} has shape {module.shape}, but {name} of {self._model.label} "
                f"has shape {tuple(shape)}: give the model that the adapter was trained on"
            )


def _is_table(module: LoraModule) -> bool:
    return module.kind == "embedding" or naming.is_output_head(module.name)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
