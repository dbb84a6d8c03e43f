"""Small models with adapters to resize, and checks that a refused resize changed nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from tests.support.adapter_files import trained
from tests.support.lora_layers import ranks

LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]


class Mixed(torch.nn.Module):
    """An embedding, a convolution and linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(20, 12)
        self.kernel = torch.nn.Conv2d(3, 8, 2)
        self.first = torch.nn.Linear(7, 5)
        self.last = torch.nn.Linear(5, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.kernel(self.table(ids).reshape(-1, 3, 2, 2))
        return self.last(torch.tanh(self.first(x.reshape(-1, 8)[:, :7])))


MIXED = ["table", "kernel", "first", "last"]
MIXED_IDS = torch.arange(20)


def mixed(r: int = 4, **settings: Any) -> Any:
    config = LoraConfig(r=r, lora_alpha=6, target_modules=MIXED, **settings)
    return trained(Mixed(), config)


def linear() -> Any:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))
    return trained(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"])).double().train()


def step(model: Any, optimizer: Any, seed: int) -> None:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def saved_and_loaded(model: Any, base: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def snapshot(model: Any, optimizer: Any = None) -> tuple[Any, ...]:
    state = copy.deepcopy(optimizer.state_dict()["state"]) if optimizer else None
    config = model.peft_config["default"].to_dict()
    return {k: v.clone() for k, v in model.state_dict().items()}, repr(config), repr(state), ranks(model)


def assert_untouched(model: Any, before: tuple[Any, ...], optimizer: Any = None) -> None:
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert before[1:] == after[1:]
