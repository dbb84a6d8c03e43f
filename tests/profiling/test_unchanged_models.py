"""Models are unchanged after a profile or its failure: modes, gradients, hooks and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from tests.support.profiled_models import (
    Batches,
    adapted,
    hooks,
    run_gradients,
    run_tasks,
    text_batches,
    vectors,
)


def left_of(model: Any) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "parameters": [(id(p), p.tolist(), len(p._backward_hooks or ())) for p in model.parameters()],
        "buffers": [(name, buffer.tolist()) for name, buffer in model.named_buffers()],
        "hooks": hooks(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def interrupted(batches: Batches) -> Iterator[Any]:
    yield from batches
    raise KeyboardInterrupt


def explode(model: Any, batch: Any) -> Any:
    """Return a loss that raises during the backward pass."""
    loss = model(**batch).loss
    if batch["input_ids"].shape[1] == 11:
        loss.register_hook(lambda _gradient: 1 / 0)
    return loss


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("end", ["well", "interrupted", "in backward", "no loss", "nan"])
def test_model_stays_unchanged(profile: Any, checkpointing: bool, end: str) -> None:
    model = adapted().train()
    model.get_submodule("base_model.model.model.layers.1").eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    parameters = list(model.parameters())
    parameters[0].requires_grad_(True)
    for parameter in parameters[:5]:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.get_submodule("base_model.model.model.layers.0").register_forward_hook(lambda *_args: None)
    before, batches = left_of(model), text_batches(3)
    if end == "well":
        profile(model, batches)
    elif end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            profile(model, interrupted(batches))
    elif end == "in backward":
        with pytest.raises(ZeroDivisionError):
            profile(model, batches, loss=explode)
    elif end == "no loss":
        with pytest.raises(ValueError, match="no loss"):
            profile(model, [*batches, {"input_ids": batches[0]["input_ids"]}])
    else:
        with pytest.raises(ValueError, match="batch 0: the loss is nan"):
            profile(model, batches, loss=lambda m, b: m(**b).loss * float("nan"))
    assert left_of(model) == before


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_stay_unchanged(profile: Any, training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).train(training)
    before = left_of(model)
    profile(model, vectors(), loss=lambda m, x: m(x).square().sum())
    assert left_of(model) == before


def test_no_parameter_requires_a_gradient_during_a_profile() -> None:
    model, seen = adapted(), []

    def loss(model: Any, batch: Any) -> Any:
        seen.append(any(parameter.requires_grad for parameter in model.parameters()))
        return model(**batch).loss

    lorank.profile_gradients(model, text_batches(2), loss=loss)
    assert seen == [False, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
