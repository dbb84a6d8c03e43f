"""Results of training and of task spectra survive pickling and deep copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorank.task_spectra import InputMoments, TaskEstimate, TaskSpectrum
from lorank.training import DynamicRanks, RankChange, RankUpdate
from lorank.training.options import GardOptions

Copy = Callable[[Any], Any]
copies = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, *(lambda x, p=p: pickle.loads(pickle.dumps(x, p)) for p in (2, 4, 5))],
    ids=["deepcopy", "copy", "pickle 2", "pickle 4", "pickle 5"],
)


def linear_task(rows: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 6))
    return x, x[:, :3] @ rng.standard_normal((3, 4)) + 0.1 * rng.standard_normal((rows, 4))


class Branches(torch.nn.Module):  # type: ignore[misc]
    """Two layers. The gradients of `steady` have one direction in all batches, and of `varied` several."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.varied = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.steady(torch.ones_like(x)) + self.varied(x)


@pytest.fixture(scope="module")
def rank_update() -> RankUpdate:
    """A change of ranks in which a module shrinks."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["steady", "varied"], init_lora_weights=False)
    model = get_peft_model(Branches(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    update = None
    with DynamicRanks(model, optimizer, interval=4, window=4) as dynamic:
        for _ in range(4):
            model(torch.randn(4, 12)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            update = dynamic.step()
    assert update is not None
    assert len(update.changes["steady"].dropped)
    return update


@copies
def test_copies_of_a_rank_change_equal_it(copied: Copy) -> None:
    change = RankChange("0.q_proj", 8, 5, np.array([0.3, 0.2, 0.1]))
    twin = copied(change)
    assert twin == change
    assert twin.error == change.error
    assert change != replace(change, dropped=np.array([0.3, 0.2, 0.0]))


@copies
def test_copies_of_a_rank_update_equal_it(copied: Copy, rank_update: RankUpdate) -> None:
    twin = copied(rank_update)
    assert twin == rank_update
    assert twin.report["varied"].effective_rank == rank_update.report["varied"].effective_rank
    assert twin.changes["steady"].error == rank_update.changes["steady"].error > 0


@copies
def test_copies_of_a_task_estimate_have_its_numbers(copied: Copy) -> None:
    task = TaskSpectrum(folds=3)
    task.update(*linear_task(60, 1))
    estimate = task.estimate()
    twin = copied(estimate)
    for field in fields(TaskEstimate):
        np.testing.assert_equal(getattr(twin, field.name), getattr(estimate, field.name))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_task_spectrum_go_on_alone(copied: Copy) -> None:
    whole, task = TaskSpectrum(folds=3), TaskSpectrum(folds=3)
    first, second = linear_task(40, 1), linear_task(30, 2)
    whole.update(*first)
    whole.update(*second)
    task.update(*first)
    before = task.estimate()
    twin = copied(task)
    twin.update(*second)
    assert twin.num_samples == 70
    np.testing.assert_array_equal(twin.estimate().singular_values, whole.estimate().singular_values)
    # The original has not seen the second batch.
    assert task.num_samples == 40
    np.testing.assert_array_equal(task.estimate().singular_values, before.singular_values)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_input_moments_are_shared_by_the_tasks_copied_with_them(copied: Copy) -> None:
    x, y = linear_task(40, 1)
    moments = InputMoments(folds=3)
    tasks = [TaskSpectrum(inputs=moments), TaskSpectrum(inputs=moments)]
    moments.update(x)
    for task in tasks:
        task.update(x, y)
    twin_moments, twins = copied((moments, tasks))
    twin_moments.update(x)
    for twin in twins:
        twin.update(x, y)
        assert twin.estimate().num_samples == 80
    assert moments.num_samples == 40


@copies
def test_copies_of_options_equal_them(copied: Copy) -> None:
    options = GardOptions(budget="0.5%", interval=30, r_max=8)
    assert copied(options) == options
