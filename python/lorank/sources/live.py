"""Live torch models, quantized ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lorank._core import Matrix
from lorank.sources import arrays, dequantized, quantized
from lorank.sources.base import Kind, MatrixInfo, Skipped, Source, SourceMatrix
from lorank.sources.layout import FLOAT_TYPES, Layout
from lorank.sources.live_packing import LivePacking, declared_by
from lorank.sources.packing import total

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
    weights are dequantized one matrix at a time. Adapters of PEFT are left out: the base model is
    what is analysed, under the names that it has without PEFT, a compiler or data parallelism.
    """
    weights = list(_weights(model))
    packed = LivePacking(
        {name: (x.module, x.parameter) for name, x, _ in weights if x.is_direct}, declared_by(model)
    )
    shapes = {name: shape for name, weight, shape in weights if not weight.is_buffer} | packed.shapes
    layout = Layout(shapes, {"num_experts": _num_experts(model)}, bool(packed.shapes))
    matrices: list[SourceMatrix] = []
    skipped: list[Skipped] = []
    owners: dict[int, str] = {}
    counts: list[int | str] = []
    for name, weight, shape in weights:
        if weight.is_buffer and not packed.holds(name):
            continue
        owner = owners.setdefault(id(weight.parameter), name)
        if owner != name:
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        counts.append(packed.parameters(name) if weight.is_direct else math.prod(shape))
        found = packed.reason(name) or _matrices(layout, name, weight, packed.loader(name))
        if isinstance(found, str):
            load = partial(_as_row, weight.parameter) if weight.is_readable else None
            skipped.append(Skipped(name, shape, found, load))
        else:
            matrices += found
    for hidden, count in _hidden_weights(model):
        if not packed.holds(hidden.name):
            skipped.append(hidden)
            counts.append(count)
    num_parameters, unknown = total(counts)
    return Source(
        type(model).__name__, tuple(matrices), tuple(skipped), num_parameters, unknown_parameters=unknown
    )


class _Weight:
    """A parameter or buffer and the module that owns it."""

    __slots__ = ("is_buffer", "module", "parameter")

    def __init__(self, module: Any, parameter: Any, is_buffer: bool = False) -> None:
        self.module = module
        self.parameter = parameter
        self.is_buffer = is_buffer

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
    """Every parameter and buffer of the base model, with the shape that it has when dequantized."""
    for prefix, module in named_modules(model):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = "weight" if quantized.is_hqq(module, parameter) else local
            yield prefix + name, _Weight(module, parameter), quantized.shape(parameter, module)
        for local, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield prefix + local, _Weight(module, buffer, is_buffer=True), tuple(buffer.shape)


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


def _hidden_weights(model: Any) -> Iterator[tuple[Skipped, int | str]]:
    """Yield weights behind a method or in buffers of unknown codes, and their numbers of parameters."""
    for prefix, module in named_modules(model):
        kind = type(module).__name__
        if "weight" not in module._modules and callable(getattr(module, "weight", None)):
            shape = tuple(module.weight().shape)
            reason = f"quantized ({kind}), not a parameter"
            yield Skipped(f"{prefix}weight", shape, reason), math.prod(shape)
        elif kind == "Mxfp4GptOssExperts":
            yield from _kernel_experts(prefix, module)
        elif getattr(module, "weight", None) is None:
            for local, buffer in module.named_buffers(recurse=False):
                if "weight" in local and buffer.ndim >= 2 and not buffer.dtype.is_floating_point:
                    reason = f"quantized ({kind}), and its library offers no way back"
                    unknown = f"{prefix}{local} holds codes of an unknown scheme ({kind})"
                    yield Skipped(prefix + local, tuple(buffer.shape), reason), unknown


def _kernel_experts(prefix: str, module: Any) -> Iterator[tuple[Skipped, int | str]]:
    """Yield experts that transformers has handed to a kernel, which keeps them in an order of its own."""
    hidden, inner = module.hidden_size, module.intermediate_size
    for local, sizes in (("gate_up_proj", (hidden, 2 * inner)), ("down_proj", (inner, hidden))):
        if local not in module._parameters:
            shape = (module.num_experts, *sizes)
            reason = "quantized (MXFP4, in a kernel's order), with no known way back to its values"
            yield Skipped(prefix + local, shape, reason), math.prod(shape)


def _matrices(
    layout: Layout, name: str, weight: _Weight, packed: tuple[str, dequantized.Loader] | None
) -> list[SourceMatrix] | str:
    parameter = weight.parameter
    if parameter.device.type == "meta":
        return "on the meta device: it has no values"
    load: Callable[[], Any] | None = None
    if packed is not None:
        name, dtype = packed[0], "float32"
    elif weight.is_direct:
        dtype, load = arrays.dtype_name(parameter), partial(_identity, parameter)
    else:
        dtype, load = "float32", quantized.loader(weight.module, parameter)
        if load is None:
            return f"quantized ({type(parameter).__name__}), and its library offers no way back"
    found = layout.matrices(name, dtype)
    if isinstance(found, str):
        return found
    lazy = packed is not None or not weight.is_direct or arrays.needs_copy(parameter)
    kind, transposed = _role(weight.module)
    described = []
    for stored in found:
        info = stored.info
        if kind is not None and info.expert is None:
            oriented = (stored.cols, stored.rows) if transposed else (stored.rows, stored.cols)
            info = MatrixInfo(info.name, info.module, kind, oriented, info.dtype)
        if packed is not None:
            values = partial(_load_packed, packed[1], info.expert, stored.rows, stored.cols)
        else:
            assert load is not None
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


def _load_packed(load: dequantized.Loader, expert: int | None, rows: int, cols: int) -> Matrix:
    return arrays.matrix(load(expert).reshape(rows, cols).contiguous())


def _as_row(parameter: Any) -> Matrix:
    return arrays.matrix(parameter.reshape(1, -1))


def _num_experts(model: Any) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
