"""From a tensor's name and shape to the matrices in it.

The one place that knows how models store linear layers, convolutions, embeddings and experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorank import naming
from lorank.sources.base import Kind, MatrixInfo

# Element types with a spectrum, by the names that safetensors and torch/NumPy give them.
FLOAT_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
} | {name: name for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")}

# Architectures whose stacked experts are stored (experts, in, out).
_TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text"}

# Architectures whose linear layers are transformers' Conv1D: stored (in, out).
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix within a tensor: `rows x cols` values in row-major order, the `index`-th of its kind."""

    info: MatrixInfo
    rows: int
    cols: int
    index: int = 0
    transposed: bool = False
    kernel: tuple[int, ...] = ()


class Layout:
    """Reads the tensors of one model.

    Parameters
    ----------
    shapes
        Every tensor's shape by name; siblings decide what some tensors are.
    config
        The model's `config.json`, or an empty mapping.
    has_packed
        True where some weights are packed, under other names than those of plain weights.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], has_packed: bool = False
    ) -> None:
        self.shapes = shapes
        self.conv1d = _model_type(config) in _CONV1D_MODELS or (not config and _looks_like_gpt2(shapes))
        text = config.get("text_config")
        experts = text if isinstance(text, Mapping) else config
        self.num_experts = experts.get("num_local_experts") or experts.get("num_experts")
        self.transposed_experts = _model_type(experts) in _TRANSPOSED_EXPERTS
        # Without a single `.weight`, the mapping's keys are the modules' names themselves.
        self.plain_names = not has_packed and not any(
            name == "weight" or name.endswith(".weight") for name in shapes
        )

    def matrices(self, name: str, dtype: str) -> list[StoredMatrix] | str:
        """The matrices of a tensor, or the reason why there are none."""
        shape = self.shapes[name]
        if math.prod(shape) == 0:
            return "empty tensor"
        if len(shape) < 2:
            return f"{len(shape)}-D tensor"
        if dtype not in FLOAT_TYPES:
            return f"{dtype} values have no spectrum"
        is_weight = self.plain_names or name == "weight" or name.endswith(".weight")
        module = name.removesuffix(".weight") if not self.plain_names else name
        stored_as = FLOAT_TYPES[dtype]
        if len(shape) == 3 and self._is_expert_stack(module, shape):
            return _experts(module, shape, stored_as, self.transposed_experts)
        if not is_weight:
            return "not the weight of a module"
        if len(shape) == 2:
            return [self._matrix(module, shape, stored_as)]
        if len(shape) <= 5:
            out, fan_in = shape[0], math.prod(shape[1:])
            info = MatrixInfo(module, module, "conv", (out, fan_in), stored_as)
            return [StoredMatrix(info, out, fan_in, kernel=shape[1:])]
        return f"{len(shape)}-D tensor"

    def _matrix(self, module: str, shape: tuple[int, ...], dtype: str) -> StoredMatrix:
        rows, cols = shape
        kind: Kind = "embedding" if naming.is_embedding(module) else "linear"
        transposed = self.conv1d and kind == "linear" and not naming.is_output_head(module)
        oriented = (cols, rows) if transposed else (rows, cols)
        info = MatrixInfo(module, module, kind, oriented, dtype)
        return StoredMatrix(info, rows, cols, transposed=transposed)

    def _is_expert_stack(self, module: str, shape: tuple[int, ...]) -> bool:
        in_experts = naming.is_in_experts(module)
        return in_experts and (self.num_experts is None or shape[0] == self.num_experts)


def _experts(module: str, shape: tuple[int, ...], dtype: str, transposed: bool) -> list[StoredMatrix]:
    # Neither the spectrum nor the cost of a rank depends on the orientation: shapes are reported as
    # stored.
    experts, rows, cols = shape
    infos = (
        MatrixInfo(f"{module}[{i}]", module, "expert", (rows, cols), dtype, expert=i) for i in range(experts)
    )
    return [StoredMatrix(info, rows, cols, index, transposed) for index, info in enumerate(infos)]


def _model_type(config: Mapping[str, Any]) -> str:
    """The architecture's name; empty where a damaged file says anything else."""
    name = config.get("model_type")
    return name if isinstance(name, str) else ""


def _looks_like_gpt2(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a fused query-key-value weight is stored (in, 3 in), as Conv1D does."""
    return any(
        name.endswith("attn.c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
        for name, shape in shapes.items()
    )
