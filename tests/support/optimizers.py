"""Optimizers of the trainable parameters, one of them with a state unknown to lorank."""

from __future__ import annotations

from typing import Any

import torch


def trainable(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: Any, lr: float = 0.01, **settings: Any) -> Any:
    return torch.optim.AdamW(trainable(model), lr=lr, **settings)


class UnknownState(torch.optim.SGD):
    """SGD that keeps one more tensor of each parameter's shape."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["curvature"] = torch.ones_like(p)
        return super().step(closure)
