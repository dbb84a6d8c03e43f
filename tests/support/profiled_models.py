"""Small models to profile, their batches, and both profiles with few folds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import lorank
from tests.support import tiny_models
from tests.support.devices import on
from tests.support.seeds import seeded

Batches = list[Any]
COUNT = 6
QUERY = "model.layers.0.self_attn.q_proj"


def text_batches(count: int = COUNT, length: int = 10, labels: int | None = None) -> Batches:
    """Return batches of texts of different lengths."""
    made = []
    for seed in range(count):
        ids = torch.randint(1, 64, (3, length + seed % 3), generator=seeded(seed))
        target = ids if labels is None else torch.randint(0, labels, (3,), generator=seeded(seed))
        made.append({"input_ids": ids, "labels": target})
    return made


def text_batches_on(device: str) -> Batches:
    return [on(device, batch) for batch in text_batches()]


def label_batches(count: int = COUNT) -> Batches:
    return text_batches(count, labels=2)


def picture_batches() -> Batches:
    return [
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=seeded(i)), "labels": torch.tensor([i % 2, 1])}
        for i in range(COUNT)
    ]


def images(count: int = COUNT) -> Batches:
    return [torch.randn(2, 3, 9, 8, generator=seeded(seed)) for seed in range(count)]


def vectors(count: int = COUNT, rows: int = 5, width: int = 8) -> Batches:
    return [torch.randn(rows, width, generator=seeded(seed)) for seed in range(count)]


def called(model: Any, batch: Any) -> Any:
    """Return the loss of a model that computes it."""
    return model(batch)


class Convolutions(nn.Module):
    """Stride, padding and dilation, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 5, 3, stride=(2, 1), padding=(1, 2))
        self.second = nn.Conv2d(5, 4, (3, 1), padding="same", dilation=2)
        self.third = nn.Conv2d(4, 6, (2, 3), padding="valid", dilation=(1, 2), bias=False)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.second(torch.relu(self.first(x))))
        return self.last(self.third(x).mean((2, 3))).square().mean()


class Layer(nn.Module):
    """One layer, under the name `layer`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().sum() / 10


class Recurrent(nn.Module):
    """One module, called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.enter(x))))
        return torch.tanh(self.twice(x)).square().sum()


class Readers(nn.Module):
    """Two modules that read one input, or a copy each, and a third that reads the output of the first."""

    def __init__(self, copies: bool = False, first_counts: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(6, 3)
        self.copies, self.first_counts = copies, first_counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x.clone() if self.copies else x)
        if not self.first_counts:
            a = a.detach()
        return torch.tanh(self.c(torch.tanh(a))).square().sum() + torch.tanh(b).square().sum()


def albert() -> Any:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return transformers.AlbertForSequenceClassification(config).eval()


def t5() -> Any:
    model = tiny_models.t5()
    model.config.decoder_start_token_id = 0
    return model


def adapted() -> Any:
    """Return a PEFT model whose adapter has a nonzero update."""
    model = get_peft_model(tiny_models.llama(), LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@dataclass(frozen=True)
class Case:
    """A model, its batches, and the number of modules in its profile."""

    make: Callable[[], Any]
    count: int
    batches: Callable[[], Batches] = text_batches
    loss: Any = None
    targets: Any = None
    tolerance: float = 1e-5


def run_gradients(model: Any, batches: Any, **options: Any) -> lorank.GradientReport:
    return lorank.profile_gradients(model, batches, **options)


def run_tasks(model: Any, batches: Any, **options: Any) -> lorank.TaskReport:
    return lorank.profile_tasks(model, batches, folds=2, **options)


def hooks(model: Any) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    more = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds + more]
