"""Live torch models, quantized ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lorank._core import Matrix
from lorank.modules.live_modules import named_modules
from lorank.sources import arrays, quantized
from lorank.sources.base import Kind, MatrixInfo, Skipped, Source, SourceMatrix
from lorank.sources.layout import FLOAT_TYPES, Layout


def from_module(model: Any) -> Source:
    """A source over a live model's parameters, which stay where they are.

    Modules that share a parameter are tied: the first counts, the others are skipped. Quantized
    weights are dequantized one matrix at a time. Adapters of PEFT are left out: the base model is
    what is analysed, under the names that it has without PEFT, a compiler or data parallelism.
    """
    weights = list(_weights(model))
    layout = Layout({name: shape for name, _, shape in weights}, {"num_experts": _num_experts(model)})
    matrices: list[SourceMatrix] = []
    skipped: list[Skipped] = []
    owners: dict[int, str] = {}
    num_parameters = 0
    for name, weight, shape in weights:
        owner = owners.setdefault(id(weight.parameter), name)
        if owner != name:
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        num_parameters += math.prod(shape)
        found = _matrices(layout, name, weight)
        if isinstance(found, str):
            load = partial(_as_row, weight.parameter) if weight.is_readable else None
            skipped.append(Skipped(name, shape, found, load))
        else:
            matrices += found
    skipped += _hidden_weights(model)
    return Source(type(model).__name__, tuple(matrices), tuple(skipped), num_parameters)


class _Weight:
    """A parameter and the module that owns it."""

    __slots__ = ("module", "parameter")

    def __init__(self, module: Any, parameter: Any) -> None:
        self.module = module
        self.parameter = parameter

    @property
    def is_direct(self) -> bool:
        """Whether the parameter is a plain tensor of floats that can be read in place."""
        return not quantized.is_quantized(self.module, self.parameter)

    @property
    def is_readable(self) -> bool:
        """Whether it is such a tensor, holds something, and lies somewhere."""
        parameter = self.parameter
        has_values = parameter.device.type != "meta" and parameter.numel() > 0
        return self.is_direct and has_values and arrays.dtype_name(parameter) in FLOAT_TYPES


def _weights(model: Any) -> Iterator[tuple[str, _Weight, tuple[int, ...]]]:
    """Every parameter of the base model, with the shape that it has when dequantized."""
    for prefix, module in named_modules(model):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + local, _Weight(module, parameter), quantized.shape(parameter)


def _hidden_weights(model: Any) -> Iterator[Skipped]:
    """Weights that are no parameters: packed behind a method, or in buffers of integers."""
    for prefix, module in named_modules(model):
        if callable(getattr(module, "weight", None)):
            shape = tuple(module.weight().shape)
            yield Skipped(f"{prefix}weight", shape, f"quantized ({type(module).__name__}), not a parameter")
        elif getattr(module, "weight", None) is None:
            for local, buffer in module.named_buffers(recurse=False):
                if "weight" in local and buffer.ndim >= 2 and not buffer.dtype.is_floating_point:
                    reason = f"quantized ({type(module).__name__}), and its library offers no way back"
                    yield Skipped(prefix + local, tuple(buffer.shape), reason)


def _matrices(layout: Layout, name: str, weight: _Weight) -> list[SourceMatrix] | str:
    parameter = weight.parameter
    if parameter.device.type == "meta":
        return "on the meta device: it has no values"
    load: Callable[[], Any] | None
    if weight.is_direct:
        dtype, load = arrays.dtype_name(parameter), partial(_identity, parameter)
    else:
        dtype, load = "float32", quantized.loader(weight.module, parameter)
        if load is None:
            return f"quantized ({type(parameter).__name__}), and its library offers no way back"
    found = layout.matrices(name, dtype)
    if isinstance(found, str):
        return found
    lazy = not weight.is_direct or arrays.needs_copy(parameter)
    kind, transposed = _role(weight.module)
    described = []
    for stored in found:
        info = stored.info
        if kind is not None and info.expert is None:
            oriented = (stored.cols, stored.rows) if transposed else (stored.rows, stored.cols)
            info = MatrixInfo(info.name, info.module, kind, oriented, info.dtype)
        values = partial(_load, load, stored.index, stored.rows, stored.cols)
        described.append(SourceMatrix(info, values, lazy, transposed, stored.kernel))
    return described


def _role(module: Any) -> tuple[Kind | None, bool]:
    """What a module's class says of its weight: its kind, and whether it is stored (in, out)."""
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


def _identity(value: Any) -> Any:
    return value


def _load(values: Callable[[], Any], index: int, rows: int, cols: int) -> Matrix:
    tensor = values()
    tensor = tensor[index] if tensor.ndim == 3 and tuple(tensor.shape[1:]) == (rows, cols) else tensor
    return arrays.matrix(tensor if tensor.ndim == 2 else tensor.reshape(rows, cols))


def _as_row(parameter: Any) -> Matrix:
    return arrays.matrix(parameter.reshape(1, -1))


def _num_experts(model: Any) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
