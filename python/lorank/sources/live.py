"""Sources of live torch models, with quantized and offloaded weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lorank._core import Matrix
from lorank.modules import quantized
from lorank.modules.live_modules import is_module, named_modules
from lorank.modules.model_config import ModelConfig
from lorank.modules.skeleton import Skeleton
from lorank.sources import arrays, dequantized, offloaded
from lorank.sources.base import Skipped, Source, SourceMatrix
from lorank.sources.live_packing import LivePacking, declared_by
from lorank.sources.packing import total
from lorank.sources.tensor_matrices import MatrixFinder


def from_module(model: Any) -> Source:
    """Open a source that reads the parameters of a live model without moving them.

    Modules that share a parameter are tied: the first counts and the others are skipped. Quantized weights
    are dequantized and offloaded weights are read one matrix at a time. The source is the base model
    without PEFT's adapters, and names do not depend on PEFT, compilers or data parallelism.
    """
    weights = list(_weights(model))
    packed = LivePacking(
        {name: (x.module, x.parameter) for name, x, _ in weights if x.is_direct}, declared_by(model)
    )
    shapes = {name: shape for name, weight, shape in weights if not weight.is_buffer} | packed.shapes
    skeleton = Skeleton.of_model(model, shapes)
    finder = MatrixFinder(shapes, ModelConfig(), skeleton.weights, bool(packed.shapes))
    matrices: list[SourceMatrix] = []
    skipped: list[Skipped] = []
    values: dict[str, Callable[[], Matrix]] = {}
    owners: dict[int, str] = {}
    counts: list[int | str] = []
    ties = offloaded.ties(model)
    for name, weight, shape in weights:
        if weight.is_buffer and not packed.holds(name):
            continue
        identity = id(weight.parameter)
        owner = owners.setdefault(ties.get(identity, identity), name)
        if owner != name:
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        counts.append(packed.parameters(name) if weight.is_direct else math.prod(shape))
        found = packed.reason(name) or _matrices(finder, name, weight, packed.loader(name))
        if isinstance(found, str):
            skipped.append(Skipped(name, shape, found))
            if weight.is_readable:
                values[name] = partial(_as_row, weight.values)
        else:
            matrices += found
    for hidden, count in _hidden_weights(model):
        if not packed.holds(hidden.name):
            skipped.append(hidden)
            counts.append(count)
    num_parameters, unknown = total(counts)
    facts = skeleton.facts({matrix.info.module for matrix in matrices})
    return Source(
        skeleton.label,
        tuple(matrices),
        tuple(skipped),
        num_parameters,
        unknown_parameters=unknown,
        facts=facts,
        skeleton=skeleton,
        skipped_values=values,
    )


class _Weight:
    """A parameter or buffer of a module; `elsewhere` reads its values if they are offloaded."""

    __slots__ = ("elsewhere", "is_buffer", "module", "parameter")

    def __init__(
        self,
        module: Any,
        parameter: Any,
        elsewhere: Callable[[], Any] | None = None,
        *,
        is_buffer: bool = False,
    ) -> None:
        self.module = module
        self.parameter = parameter
        self.elsewhere = elsewhere
        self.is_buffer = is_buffer

    def values(self) -> Any:
        """Return the tensor that holds the values."""
        return self.parameter if self.elsewhere is None else self.elsewhere()

    @property
    def has_values(self) -> bool:
        """True if the values are in the tensor or offloaded."""
        return self.elsewhere is not None or self.parameter.device.type != "meta"

    @property
    def is_direct(self) -> bool:
        """True for a plain tensor, which can be read in place."""
        return not quantized.is_quantized(self.module, self.parameter)

    @property
    def is_readable(self) -> bool:
        """True for a plain tensor of floating-point numbers that is not empty and has values."""
        parameter = self.parameter
        has_values = self.has_values and parameter.numel() > 0
        return self.is_direct and has_values and arrays.dtype_name(parameter) in arrays.FLOAT_TYPES


def _weights(model: Any) -> Iterator[tuple[str, _Weight, tuple[int, ...]]]:
    """Yield every parameter and buffer of the base model, with its dequantized shape."""
    elsewhere = offloaded.loaders(model)
    for prefix, module in named_modules(model):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = "weight" if quantized.is_hqq(module, parameter) else local
            weight = _Weight(module, parameter, elsewhere.get(id(parameter)))
            yield prefix + name, weight, quantized.shape(parameter, module)
        for local, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield prefix + local, _Weight(module, buffer, is_buffer=True), tuple(buffer.shape)


def _hidden_weights(model: Any) -> Iterator[tuple[Skipped, int | str]]:
    """Yield weights that are not parameters, each with its number of values or the reason why none is known.

    Such weights are returned by a method, computed from other parameters, or stored as codes in buffers.
    """
    for prefix, module in named_modules(model):
        kind = type(module).__name__
        if "weight" in getattr(module, "parametrizations", ()):
            shape = tuple(module.weight.shape)
            yield Skipped(f"{prefix}weight", shape, f"computed from other parameters ({kind})"), 0
        elif callable(weight := getattr(module, "weight", None)) and not is_module(weight):
            shape = tuple(module.weight().shape)
            reason = f"quantized ({kind}), not a parameter"
            yield Skipped(f"{prefix}weight", shape, reason), math.prod(shape)
        elif kind == "Mxfp4GptOssExperts":
            yield from _kernel_experts(prefix, module)
        elif getattr(module, "weight", None) is None:
            for local, buffer in module.named_buffers(recurse=False):
                if "weight" in local and buffer.ndim >= 2 and not buffer.dtype.is_floating_point:
                    reason = f"quantized ({kind}), and its library cannot dequantize it"
                    unknown = f"{prefix}{local} holds codes of an unknown scheme ({kind})"
                    yield Skipped(prefix + local, tuple(buffer.shape), reason), unknown


def _kernel_experts(prefix: str, module: Any) -> Iterator[tuple[Skipped, int | str]]:
    """Yield experts that transformers passed to a kernel, which stores them in its own order."""
    hidden, inner = module.hidden_size, module.intermediate_size
    for local, sizes in (("gate_up_proj", (hidden, 2 * inner)), ("down_proj", (inner, hidden))):
        if local not in module._parameters:
            shape = (module.num_experts, *sizes)
            reason = "quantized (MXFP4, in a kernel's order), with no known formula to dequantize it"
            yield Skipped(prefix + local, shape, reason), math.prod(shape)


def _matrices(
    finder: MatrixFinder, name: str, weight: _Weight, packed: tuple[str, dequantized.Loader] | None
) -> list[SourceMatrix] | str:
    """Return the matrices of a weight, or the reason why it is skipped."""
    parameter = weight.parameter
    if not weight.has_values:
        return "on the meta device: it has no values"
    load: Callable[[], Any] | None = None
    if packed is not None:
        name, dtype = packed[0], "float32"
    elif weight.is_direct:
        dtype, load = arrays.dtype_name(parameter), weight.values
    elif weight.elsewhere is not None:
        return f"quantized ({type(parameter).__name__}) and offloaded"
    else:
        dtype, load = "float32", quantized.loader(weight.module, parameter)
        if load is None:
            return f"quantized ({type(parameter).__name__}), and its library cannot dequantize it"
    found = finder.matrices(name, dtype)
    if isinstance(found, str):
        return found
    is_elsewhere = packed is not None or weight.elsewhere is not None
    lazy = is_elsewhere or not weight.is_direct or arrays.needs_copy(parameter)
    described = []
    for m in found:
        if packed is not None:
            values = partial(_load_packed, packed[1], m.info.expert, m.rows, m.cols)
        else:
            assert load is not None
            values = partial(_load, load, m.index, m.rows, m.cols)
        described.append(SourceMatrix(m.info, values, lazy, m.transposed, m.kernel))
    return described


def _load(values: Callable[[], Any], index: int, rows: int, cols: int) -> Matrix:
    """Read one matrix of a tensor."""
    tensor = values()
    tensor = tensor[index] if tensor.ndim == 3 and tuple(tensor.shape[1:]) == (rows, cols) else tensor
    return arrays.matrix(tensor, (rows, cols))


def _load_packed(load: dequantized.Loader, expert: int | None, rows: int, cols: int) -> Matrix:
    """Dequantize one matrix of a packed weight."""
    return arrays.matrix(load(expert).reshape(rows, cols).contiguous())


def _as_row(values: Callable[[], Any]) -> Matrix:
    return arrays.matrix(values().reshape(1, -1))
