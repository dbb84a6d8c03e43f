"""The devices of this machine that tests run on."""

from __future__ import annotations

import torch

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch on a device."""
    return {name: values.to(device) for name, values in batch.items()}
