"""Tiny models with every kind of layer that PEFT adapts, their inputs, and comparisons of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support import tiny_models


class Perceptron(nn.Module):
    """Two linear layers with biases, and a head to save."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


class Tables(nn.Module):
    """An embedding and a layer that stores its weight ``(in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense = nn.Embedding(10, 6), Conv1D(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.table(x))


class Kernels(nn.Module):
    """A convolution in 1, 2 or 3 dimensions, and a head."""

    def __init__(self, dimensions: int, groups: int = 1) -> None:
        super().__init__()
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv, self.head = layer(4, 6, 3, groups=groups), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).flatten(2).mean(-1))


class Attention(nn.Module):
    """Attention whose projections are parts of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


class Experts(nn.Module):
    """Two stacks of expert weights in one module, and a linear layer beside it."""

    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 8) * 0.3)
            self.down_proj = nn.Parameter(torch.randn(3, 8, 16) * 0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.tanh(torch.einsum("eoi,bi->ebo", self.gate_up_proj, x))
            return torch.einsum("eoi,ebi->bo", self.down_proj, inner)

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = Experts.Stacks(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x))


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IDS = torch.arange(8)[None]

# Model, inputs and settings of its targets.
MODELS: dict[str, tuple[Callable[[], Any], torch.Tensor, dict[str, Any]]] = {
    "perceptron": (Perceptron, _floats(2, 8), {"target_modules": ["first", "second"]}),
    "tables": (Tables, IDS, {"target_modules": ["table", "dense"], "fan_in_fan_out": True}),
    "conv1d": (lambda: Kernels(1), _floats(2, 4, 7), {"target_modules": ["conv", "head"]}),
    "conv2d": (lambda: Kernels(2), _floats(2, 4, 5, 5), {"target_modules": ["conv", "head"]}),
    "conv3d": (lambda: Kernels(3), _floats(2, 4, 4, 4, 4), {"target_modules": ["conv", "head"]}),
    "groups": (lambda: Kernels(2, 2), _floats(2, 4, 5, 5), {"target_modules": ["conv", "head"]}),
    "attention": (Attention, _floats(2, 5, 8), {"target_modules": ["attention", "head"]}),
    "experts": (
        Experts,
        _floats(2, 8),
        {"target_modules": ["head"], "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
    "one_stack": (
        Experts,
        _floats(2, 8),
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    ),
    "llama": (tiny_models.llama, IDS, {"target_modules": ["q_proj", "down_proj"]}),
    "tied": (tiny_models.llama_tied, IDS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_once": (
        tiny_models.llama_tied,
        IDS,
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "replicated": (
        tiny_models.llama,
        IDS,
        {"target_modules": ["q_proj", "up_proj"], "layer_replication": [(0, 2), (0, 2)]},
    ),
    "mixtral": (
        tiny_models.mixtral,
        IDS,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "down_proj"]},
    ),
    "gpt_oss": (
        tiny_models.gpt_oss,
        IDS,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ),
}


def randomised(adapted: Any) -> Any:
    """Change every trained parameter of an adapted model by random values."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        elif "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
