"""Task spectra of live models, compared with recorded inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorank
from tests.support import tiny_models
from tests.support.profiled_models import (
    COUNT,
    QUERY,
    Case,
    Convolutions,
    Readers,
    Recurrent,
    adapted,
    called,
    images,
    label_batches,
    t5,
    text_batches,
    vectors,
)
from tests.support.task_oracle import assert_task, recorded, that_count

TASKS = {
    "llama": Case(tiny_models.llama, 14),
    "llama, float64": Case(lambda: tiny_models.llama().double(), 4, targets=["q_proj", "down_proj"]),
    "bert": Case(tiny_models.bert_classifier, 7, label_batches, targets=r".*\.(0\..*|pooler\.dense)"),
    "gpt2": Case(tiny_models.gpt2, 2, targets=["attn.c_attn"]),
    "t5": Case(t5, 10, targets=["SelfAttention.v", "EncDecAttention.k", "wo"]),
    "called twice": Case(Recurrent, 2, vectors, called),
    "readers of one input": Case(Readers, 3, vectors, called),
}


@pytest.mark.parametrize("space", ["weights", "prediction"])
@pytest.mark.parametrize("name", TASKS)
def test_tasks_equal_those_of_recorded_inputs_and_gradients(name: str, space: Any) -> None:
    case = TASKS[name]
    model, batches = case.make(), case.batches()
    report = lorank.profile_tasks(model, batches, loss=case.loss, targets=case.targets, folds=3, space=space)
    assert len(report) == case.count
    tape = recorded(model, batches, [row.name for row in report], case.loss)
    for row in report:
        assert_task(row, *tape.rows(row.name), folds=3, space=space)
    assert report.num_samples == max(len(tape.rows(row.name)[0]) for row in report)


def test_prediction_space_and_five_folds_are_the_default() -> None:
    report = lorank.profile_tasks(tiny_models.llama(), text_batches())
    tape = recorded(tiny_models.llama(), text_batches(), [QUERY])
    assert_task(report[QUERY], *tape.rows(QUERY), folds=5, space="prediction")


def test_tasks_of_an_adapted_model_equal_those_of_its_base_modules() -> None:
    name = f"base_model.model.{QUERY}.base_layer"
    tape = recorded(adapted(), text_batches(), [name])
    report = lorank.profile_tasks(adapted(), text_batches(), targets=["q_proj"])
    assert_task(report[QUERY], *tape.rows(name), folds=5, space="prediction")


def patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return rows of `in * kh * kw` inputs, one per position, for layers without dilation."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    windows = nn.functional.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, layer.in_channels * kh * kw)


def test_tasks_of_a_convolution_equal_those_of_its_patches() -> None:
    model = Convolutions()
    batches = images(8)
    report = lorank.profile_tasks(model, batches, loss=called, targets=["first"], folds=3)
    tape = recorded(model, batches, ["first"], called)
    X = np.concatenate([patches(model.first, torch.from_numpy(x)).numpy() for x in tape.x["first"]])
    Y = np.concatenate([-delta.transpose(0, 2, 3, 1).reshape(-1, 5) for delta in tape.delta["first"]])
    assert_task(report["first"], *that_count(X, Y), folds=3, space="prediction")


@pytest.mark.parametrize("make", [tiny_models.bert_classifier, tiny_models.llama])
def test_padding_does_not_change_tasks(make: Callable[[], Any]) -> None:
    batches = label_batches() if make is tiny_models.bert_classifier else text_batches()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    fill = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    padded = [
        {
            name: nn.functional.pad(value, (0, 9), value=fill[name]) if value.ndim == 2 else value
            for name, value in batch.items()
        }
        for batch in batches
    ]
    plain = lorank.profile_tasks(make(), batches, folds=2)
    report = lorank.profile_tasks(make(), padded, folds=2)
    assert report.num_samples == plain.num_samples
    for row, expected in zip(report, plain, strict=True):
        assert (row.k_star, row.predicted_rank) == (expected.k_star, expected.predicted_rank)
        # The first token of a causal model attends only to itself, so the gradient of its query is a
        # rounding error. One of the two runs may round it to zero and drop the sample.
        assert row.noise == pytest.approx(expected.noise, rel=1e-2)
        np.testing.assert_allclose(
            row.singular_values, expected.singular_values, rtol=1e-2, atol=1e-2 * expected.singular_values[0]
        )


def test_modules_with_a_shared_input_and_different_rows_are_separated() -> None:
    # In the second batch, one row of `b` has no gradient.
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

    def loss(model: Any, x: torch.Tensor) -> Any:
        weight = torch.ones(len(x), 1)
        weight[0] = 0.0 if torch.equal(x, vectors()[1]) else 1.0
        return torch.tanh(model["a"](x)).square().sum() + (weight * torch.tanh(model["b"](x))).square().sum()

    tape = recorded(model, vectors(), ["a", "b"], loss)
    assert len(tape.rows("b")[0]) == len(tape.rows("a")[0]) - 1
    sums = 32 * 8 * 8 + 2 * 16 * 8 * 4
    # Without memory for separate inputs, `b` needs another pass.
    for memory, passes in ((sums + 32 * 8 * 8, 1), (sums, 2)):
        counted = Counted(loss)
        report = lorank.profile_tasks(model, vectors(), loss=counted, folds=2, memory=memory)
        assert counted.calls == 1 + passes * COUNT
        for name in ("a", "b"):
            assert_task(report[name], *tape.rows(name), folds=2, space="prediction")


def test_shared_inputs_give_the_tasks_of_separate_inputs() -> None:
    shared = lorank.profile_tasks(Readers(), vectors(), loss=called, folds=3)
    apart = lorank.profile_tasks(Readers(copies=True), vectors(), loss=called, folds=3)
    assert shared.to_json() == apart.to_json()


def test_module_sharing_an_input_with_one_without_gradients_is_profiled() -> None:
    model = Readers(first_counts=False)
    report = lorank.profile_tasks(model, vectors(), loss=called, folds=3)
    assert report["a"].flags == ("no gradient reached it",)
    tape = recorded(model, vectors(), ["b", "c"], called)
    for name in ("b", "c"):
        assert_task(report[name], *tape.rows(name), folds=3, space="prediction")


def test_modules_sharing_an_input_in_the_first_batch_only_are_separated() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

    def loss(model: Any, x: torch.Tensor) -> Any:
        other = x if torch.equal(x, vectors()[0]) else x.flip(0) + 1
        return torch.tanh(model["a"](x)).square().sum() + torch.tanh(model["b"](other)).square().sum()

    report = lorank.profile_tasks(model, vectors(), loss=loss, folds=3)
    tape = recorded(model, vectors(), ["a", "b"], loss)
    for name in ("a", "b"):
        assert_task(report[name], *tape.rows(name), folds=3, space="prediction")


class Counted:
    """A loss that counts its calls."""

    def __init__(self, loss: Any = None) -> None:
        self.calls = 0
        self._loss = loss

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        if self._loss is not None:
            return self._loss(model, batch)
        return model(batch) if isinstance(batch, torch.Tensor) else model(**batch).loss


def test_shared_inputs_are_stored_once() -> None:
    # Two folds: 16 * 2 * 8^2 bytes for the inputs, 8 * 2 * 8 * (6 + 4) for the products with them.
    memory = 2048 + 1280
    for copies, passes in ((False, 1), (True, 2)):
        loss = Counted()
        targets = ["a", "b"]
        lorank.profile_tasks(Readers(copies), vectors(), loss=loss, folds=2, targets=targets, memory=memory)
        assert loss.calls == 1 + passes * COUNT


@pytest.mark.parametrize("name", ["llama", "bert", "called twice", "readers of one input"])
def test_several_passes_equal_one_pass(name: str) -> None:
    case = TASKS[name]
    model, batches = case.make(), case.batches()
    options: dict[str, Any] = {"targets": case.targets, "folds": 2}
    loss = Counted()
    whole = lorank.profile_tasks(model, batches, loss=loss, **options)
    assert loss.calls == 1 + COUNT
    widest = max(32 * row.shape[1] ** 2 + 16 * row.shape[0] * row.shape[1] for row in whole)
    for memory in (widest, 2 * widest, 5 * widest):
        loss = Counted()
        parts = lorank.profile_tasks(model, batches, loss=loss, **options, memory=memory)
        assert loss.calls > 1 + COUNT or memory > widest
        assert parts.to_json() == whole.to_json()
    with pytest.raises(
        ValueError, match=rf"memory {widest - 1:,}: the sums of .* alone need {widest:,} bytes"
    ):
        lorank.profile_tasks(model, batches, loss=loss, **options, memory=widest - 1)
    with pytest.raises(ValueError, match=r"needs \d+ passes, and batches is an iterator: pass a list"):
        lorank.profile_tasks(model, iter(batches), loss=loss, **options, memory=widest)
    assert lorank.profile_tasks(model, iter(batches), **options, loss=loss).to_json() == whole.to_json()


def test_shuffling_loader_is_accepted() -> None:
    loader: Any = torch.utils.data.DataLoader(torch.cat(vectors()), batch_size=7, shuffle=True)
    report = lorank.profile_tasks(Readers(), loader, loss=called, folds=2)
    assert report.num_samples == 5 * COUNT
