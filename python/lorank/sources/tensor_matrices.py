"""Finds the matrices in a tensor: by the model's skeleton if known, else by name and shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorank.modules import naming
from lorank.modules.model_config import ModelConfig
from lorank.modules.weight import Kind, Weight
from lorank.sources.arrays import FLOAT_TYPES
from lorank.sources.base import MatrixInfo
from lorank.sources.decodings import DECODED
from lorank.sources.matrix_sequences import Mapped

# Architectures that store stacks of experts as (experts, in, out) and declare this to PEFT.
_TRANSPOSED_EXPERTS = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}

# Architectures whose linear layers are Conv1D of transformers, which stores (in, out).
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


@dataclass(frozen=True, slots=True)
class MatrixSlice:
    """A matrix in a tensor.

    Attributes
    ----------
    info
        The identity of the matrix.
    rows, cols
        The stored shape, in row-major order.
    index
        The position of the matrix among the matrices of the tensor.
    transposed
        True if the matrix is stored as ``(in, out)``.
    kernel
        Shape ``(in, kh, kw)`` of the kernel of a convolution; empty for other matrices.
    """

    info: MatrixInfo
    rows: int
    cols: int
    index: int = 0
    transposed: bool = False
    kernel: tuple[int, ...] = ()


class MatrixFinder:
    """Finds the matrices in the tensors of one model.

    Parameters
    ----------
    shapes
        The shape of every tensor by its name. The kind of some tensors depends on other tensors.
    config
        The model's configuration.
    described
        The parameter of the skeleton that a tensor is loaded into, by the name of the tensor.
    has_packed
        True if some weights are packed. Packed weights have other names than plain weights.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: ModelConfig,
        described: Mapping[str, Weight] | None = None,
        has_packed: bool = False,
    ) -> None:
        self.shapes = shapes
        self.described = described or {}
        is_gpt2 = config.is_empty and _looks_like_gpt2(shapes)
        self.conv1d = config.model_type in _CONV1D_MODELS or is_gpt2
        self.num_experts = config.num_experts
        self.transposed_experts = config.text_model_type in _TRANSPOSED_EXPERTS
        # If no name ends with `.weight`, the names are those of modules.
        self.plain_names = not has_packed and not any(
            name == "weight" or name.endswith(".weight") for name in shapes
        )

    def matrices(self, name: str, dtype: str) -> Sequence[MatrixSlice] | str:
        """Return the matrices of a tensor, or the reason why it has none."""
        shape = self.shapes[name]
        if math.prod(shape) == 0:
            return "empty tensor"
        if len(shape) < 2:
            return f"{len(shape)}-D tensor"
        if not has_spectrum(dtype):
            return f"{dtype} values have no spectrum"
        weight = self.described.get(name) or self._guessed(name)
        return matrices_of(weight, shape, type_name(dtype))

    def _guessed(self, name: str) -> Weight:
        """Guess the parameter of a tensor from its name and shape."""
        shape = self.shapes[name]
        is_weight = self.plain_names or name == "weight" or name.endswith(".weight")
        module = name.removesuffix(".weight") if not self.plain_names else name
        if len(shape) == 3 and self._is_expert_stack(module, shape):
            return Weight(name, module, "expert", shape, self.transposed_experts)
        if not is_weight:
            return Weight(name, module, None, shape)
        if len(shape) > 2:
            return Weight(name, module, "conv", shape)
        if naming.is_embedding(module):
            return Weight(name, module, "embedding", shape)
        transposed = self.conv1d and not naming.is_output_head(module)
        return Weight(name, module, "linear", shape, transposed)

    def _is_expert_stack(self, module: str, shape: tuple[int, ...]) -> bool:
        """Return True if a tensor of three dimensions stacks experts."""
        in_experts = naming.is_in_experts(module)
        return in_experts and (self.num_experts is None or shape[0] == self.num_experts)


def has_spectrum(dtype: str) -> bool:
    """Return True for a type of floating-point numbers, and for a scheme whose weights can be decoded."""
    return dtype in FLOAT_TYPES or dtype in DECODED


def type_name(dtype: str) -> str:
    """Return the name of an element type in reports; a scheme keeps its name."""
    return FLOAT_TYPES.get(dtype, dtype)


def matrices_of(weight: Weight, shape: tuple[int, ...], dtype: str) -> Sequence[MatrixSlice] | str:
    """Return the matrices of a parameter with a stored shape, or the reason why it has none."""
    if weight.kind is None:
        return "not the weight of a module"
    if weight.kind == "expert":
        return _experts(weight, shape, dtype)
    if len(shape) == 2:
        rows, cols = shape
        oriented = (cols, rows) if weight.transposed else (rows, cols)
        info = _info(weight, weight.kind, oriented, dtype)
        return [MatrixSlice(info, rows, cols, transposed=weight.transposed)]
    if len(shape) > 5 or weight.kind != "conv":
        return f"{len(shape)}-D tensor"
    out, fan_in = shape[0], math.prod(shape[1:])
    return [MatrixSlice(_info(weight, "conv", (out, fan_in), dtype), out, fan_in, kernel=shape[1:])]


def _info(weight: Weight, kind: Kind, shape: tuple[int, int], dtype: str) -> MatrixInfo:
    """Return the identity of the matrix of a module."""
    return MatrixInfo(naming.without_parameter(weight.module), weight.module, kind, shape, dtype)


def _experts(weight: Weight, shape: tuple[int, ...], dtype: str) -> Sequence[MatrixSlice] | str:
    """Return the matrices of a stack of experts, with their shapes as stored.

    Neither the spectrum nor the cost of a rank depends on the orientation.
    """
    if len(shape) != 3:
        return f"{len(shape)}-D tensor"
    module = weight.module
    experts, rows, cols = shape
    size = (rows, cols)

    def expert(index: int) -> MatrixSlice:
        info = MatrixInfo(f"{module}[{index}]", module, "expert", size, dtype, expert=index)
        return MatrixSlice(info, rows, cols, index, weight.transposed)

    return Mapped(expert, range(experts))


def _looks_like_gpt2(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True if a fused query-key-value weight has shape ``(in, 3 * in)``, as in Conv1D."""
    return any(
        name.endswith("attn.c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
        for name, shape in shapes.items()
    )
