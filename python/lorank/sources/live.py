"""Live torch models, quantized ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lorank._core import Matrix
from lorank.sources import arrays, offloaded, quantized
from lorank.sources.base import Kind, MatrixInfo, Skipped, Source, SourceMatrix
from lorank.sources.layout import FLOAT_TYPES, Layout

# How wrappers of PEFT and of torch, by the names of their base classes, keep the module that they wrap.
_WRAPPED = {
    "peft.": {
        "PeftModel": "base_model",
        "BaseTuner": "model",
        "BaseTunerLayer": "base_layer",
        "AuxiliaryTrainingWrapper": "original_module",
    },
    "torch.": {
        "OptimizedModule": "_orig_mod",
        "DataParallel": "module",
        "DistributedDataParallel": "module",
        "CheckpointWrapper": "_checkpoint_wrapped_module",
    },
}


def is_module(value: object) -> bool:
    """Whether something is a `torch.nn.Module`, without importing torch."""
    return any(
        base.__module__.startswith("torch.nn") and base.__name__ == "Module" for base in type(value).__mro__
    )


def from_module(model: Any) -> Source:
    """A source over a live model's parameters, which stay where they are.

    Modules that share a parameter are tied: the first counts, the others are skipped. Quantized
    weights are dequantized, and offloaded ones fetched, one matrix at a time. Adapters of PEFT are left
    out: the base model is what is analysed, under the names that it has without PEFT, a compiler or data
    parallelism.
    """
    weights = list(_weights(model))
    layout = Layout({name: shape for name, _, shape in weights}, {"num_experts": _num_experts(model)})
    matrices: list[SourceMatrix] = []
    skipped: list[Skipped] = []
    owners: dict[int, str] = {}
    ties = offloaded.ties(model)
    num_parameters = 0
    for name, weight, shape in weights:
        identity = id(weight.parameter)
        owner = owners.setdefault(ties.get(identity, identity), name)
        if owner != name:
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        num_parameters += math.prod(shape)
        found = _matrices(layout, name, weight)
        if isinstance(found, str):
            load = partial(_as_row, weight.values) if weight.is_readable else None
            skipped.append(Skipped(name, shape, found, load))
        else:
            matrices += found
    skipped += _hidden_weights(model)
    return Source(type(model).__name__, tuple(matrices), tuple(skipped), num_parameters)


class _Weight:
    """A parameter, the module that owns it, and the way to its values if they are offloaded."""

    __slots__ = ("elsewhere", "module", "parameter")

    def __init__(self, module: Any, parameter: Any, elsewhere: Callable[[], Any] | None) -> None:
        self.module = module
        self.parameter = parameter
        self.elsewhere = elsewhere

    def values(self) -> Any:
        """The tensor that holds the values."""
        return self.parameter if self.elsewhere is None else self.elsewhere()

    @property
    def has_values(self) -> bool:
        """Whether there are any."""
        return self.elsewhere is not None or self.parameter.device.type != "meta"

    @property
    def is_direct(self) -> bool:
        """Whether the parameter is a plain tensor of floats that can be read in place."""
        return not quantized.is_quantized(self.module, self.parameter)

    @property
    def is_readable(self) -> bool:
        """Whether it is such a tensor, holds something, and lies somewhere."""
        parameter = self.parameter
        has_values = self.has_values and parameter.numel() > 0
        return self.is_direct and has_values and arrays.dtype_name(parameter) in FLOAT_TYPES


def _weights(model: Any) -> Iterator[tuple[str, _Weight, tuple[int, ...]]]:
    """Every parameter of the base model, with the shape that it has when dequantized."""
    elsewhere = offloaded.loaders(model)
    for prefix, module in named_modules(model):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            weight = _Weight(module, parameter, elsewhere.get(id(parameter)))
            yield prefix + local, weight, quantized.shape(parameter)


def named_modules(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every module of the base model with the prefix of its parameters' names, wrappers left out."""
    module = _unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}{name}.")


def _unwrapped(module: Any) -> Any:
    for library, wrappers in _WRAPPED.items():
        classes = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith(library)}
        for wrapper, attribute in wrappers.items():
            if wrapper in classes and is_module(inner := getattr(module, attribute, None)):
                return _unwrapped(inner)
    return module


def _hidden_weights(model: Any) -> Iterator[Skipped]:
    """Weights that are no parameters: packed behind a method, or in buffers of integers."""
    for prefix, module in named_modules(model):
        if "weight" in getattr(module, "parametrizations", ()):
            reason = f"computed from other parameters ({type(module).__name__})"
            yield Skipped(f"{prefix}weight", tuple(module.weight.shape), reason)
        elif callable(weight := getattr(module, "weight", None)) and not is_module(weight):
            shape = tuple(module.weight().shape)
            yield Skipped(f"{prefix}weight", shape, f"quantized ({type(module).__name__}), not a parameter")
        elif getattr(module, "weight", None) is None:
            for local, buffer in module.named_buffers(recurse=False):
                if "weight" in local and buffer.ndim >= 2 and not buffer.dtype.is_floating_point:
                    reason = f"quantized ({type(module).__name__}), and its library offers no way back"
                    yield Skipped(prefix + local, tuple(buffer.shape), reason)


def _matrices(layout: Layout, name: str, weight: _Weight) -> list[SourceMatrix] | str:
    parameter = weight.parameter
    if not weight.has_values:
        return "on the meta device: it has no values"
    load: Callable[[], Any] | None
    if weight.is_direct:
        dtype, load = arrays.dtype_name(parameter), weight.values
    elif weight.elsewhere is not None:
        return f"quantized ({type(parameter).__name__}) and offloaded"
    else:
        dtype, load = "float32", quantized.loader(weight.module, parameter)
        if load is None:
            return f"quantized ({type(parameter).__name__}), and its library offers no way back"
    found = layout.matrices(name, dtype)
    if isinstance(found, str):
        return found
    lazy = not weight.is_direct or arrays.needs_copy(parameter) or weight.elsewhere is not None
    kind, transposed = role(weight.module)
    described = []
    for stored in found:
        info = stored.info
        if kind is not None and info.expert is None:
            oriented = (stored.cols, stored.rows) if transposed else (stored.rows, stored.cols)
            info = MatrixInfo(info.name, info.module, kind, oriented, info.dtype)
        values = partial(_load, load, stored.index, stored.rows, stored.cols)
        described.append(SourceMatrix(info, values, lazy, transposed, stored.kernel))
    return described


def role(module: Any) -> tuple[Kind | None, bool]:
    """Kind of a module's weight by the module's class, and whether it is stored (in, out)."""
    classes = {base.__name__ for base in type(module).__mro__}
    if "Embedding" in classes:
        return "embedding", False
    if "_ConvNd" in classes:
        return "conv", False
    if "Conv1D" in classes:
        return "linear", True
    if "Linear" in classes:
        return "linear", False
    # Experts say it themselves, by the attribute that PEFT looks at.
    return None, bool(getattr(module, "is_transposed", False))


def _load(values: Callable[[], Any], index: int, rows: int, cols: int) -> Matrix:
    tensor = values()
    tensor = tensor[index] if tensor.ndim == 3 and tuple(tensor.shape[1:]) == (rows, cols) else tensor
    return arrays.matrix(tensor if tensor.ndim == 2 else tensor.reshape(rows, cols))


def _as_row(values: Callable[[], Any]) -> Matrix:
    return arrays.matrix(values().reshape(1, -1))


def _num_experts(model: Any) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
