"""A tiny Llama whose ranks change during training: its texts, a plain loop, and Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lorank.training import DynamicRanks, GardCallback
from tests.support import tiny_models
from tests.support.devices import on
from tests.support.lora_layers import layers
from tests.support.optimizers import adamw

# The gradients of steps 1 and 2, 7 and 8, 13 and 14, ... lie outside the windows and do not count.
INTERVAL, WINDOW, STEPS = 6, 4, 18
TRAINED = STEPS + 1
"""Number of steps of Trainer, where ranks stay after the last step."""
BUDGET = 5000
OPTIONS: dict[str, Any] = {
    "budget": BUDGET,
    "interval": INTERVAL,
    "window": WINDOW,
    "r_max": 12,
    "energy": 0.6,
    "sketch": 16,
    "smoothing": 0.2,
    "max_change": 2,
}


def llama(r: int = 4, targets: Any = "all-linear", prepared: Any = lambda base: base, **settings: Any) -> Any:
    """Return a PEFT model with weights as large as trained ones, so that gradients have different ranks."""
    base = tiny_models.llama()
    for parameter in base.parameters():
        if parameter.ndim == 2:
            parameter.data *= 10
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **settings)
    return get_peft_model(prepared(base), config).train()


def text(seed: int) -> torch.Tensor:
    """Return ten token ids that count up from a start and by a stride of the seed."""
    start = torch.randint(0, 64, (1,), generator=torch.Generator().manual_seed(seed))
    return (start + (seed % 5 + 1) * torch.arange(10)) % 64


def batch(step: int, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.stack([text(size * step + i) for i in range(size)])
    return {"input_ids": ids, "labels": ids}


def loss_on(device: str, model: Any, step: int) -> Any:
    """Return the loss of a step's batch on a device."""
    return model(**on(device, batch(step))).loss


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": text(index), "labels": text(index)}


def size_of(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def num_hooks(model: Any) -> int:
    return sum(len(layer.get_base_layer()._forward_hooks) for layer in layers(model).values())


def evaluated(model: Any) -> tuple[Any, float]:
    """Return logits and loss of texts that training does not use."""
    model.eval()
    with torch.no_grad():
        result = model(**batch(1000, 4))
    model.train()
    return result.logits, float(result.loss)


def trained(
    model: Any,
    steps: int = STEPS,
    *,
    loss_of: Any = lambda model, step: model(**batch(step)).loss,
    between: Any = lambda _model, _step: None,
    **options: Any,
) -> list[Any]:
    """Train in a loop with DynamicRanks; return its updates."""
    optimizer = adamw(model)
    updates = []
    with DynamicRanks(model, optimizer, **OPTIONS | options) as dynamic:
        for step in range(steps):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            updates.append(dynamic.step())
            between(model, step + 1)
    return [update for update in updates if update is not None]


def spectra(update: Any) -> Any:
    return np.array([row.eigenvalues for row in update.report])


def moved(updates: list[Any]) -> bool:
    """Return True if some modules grew and some shrank after the first update."""
    changes = [change for update in updates[1:] for change in update.changes.values()]
    return any(c.new_rank > c.old_rank for c in changes) and any(c.new_rank < c.old_rank for c in changes)


def assert_same_updates(left: list[Any], right: list[Any]) -> None:
    assert [u.step for u in left] == [u.step for u in right]
    for one, other in zip(left, right, strict=True):
        assert one.ranks == other.ranks
        np.testing.assert_array_equal(spectra(one), spectra(other))


def assert_same_weights(left: Any, right: Any) -> None:
    for (name, one), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other), name


def trainer(model: Any, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": TRAINED,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "seed": 0,
        }
        | settings,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=list(callbacks)
    )


class Run:
    """A finished training of `llama` with Trainer and GardCallback."""

    def __init__(self, folder: Path, *callbacks: Any, options: Any = None, **settings: Any) -> None:
        self.model, self.gard = llama(), GardCallback(**OPTIONS | (options or {}))
        self.trainer = trainer(self.model, folder, *callbacks, self.gard, **settings)
        self.trainer.train()
        assert num_hooks(self.model) == 0

    @property
    def updates(self) -> list[Any]:
        return self.gard.history

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
