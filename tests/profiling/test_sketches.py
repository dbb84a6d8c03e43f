"""Sketches of gradients: unbiased spectra, seeds and memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorank
from lorank.profiling.sketch import GradientSketches
from lorank.profiling.targets import find_targets
from tests.support import tiny_models
from tests.support.live_tensors import live_numbers, only_new_tensors
from tests.support.profiled_models import COUNT, Readers, called, text_batches, vectors
from tests.support.seeds import seeded


@pytest.mark.parametrize("size", [48, 10**6])
def test_sketch_as_large_as_the_module_is_exact(size: int) -> None:
    model = tiny_models.llama()
    exact = lorank.profile_gradients(model, text_batches(), sketch=None)
    large = lorank.profile_gradients(model, text_batches(), sketch=size, seed=7)
    for one, other in zip(exact, large, strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    small = lorank.profile_gradients(model, text_batches(), sketch=47)
    differ = [not np.array_equal(a.eigenvalues, b.eigenvalues) for a, b in zip(exact, small, strict=True)]
    # Only sides of 48 are projected.
    assert differ == [48 in row.shape for row in exact]


@pytest.mark.parametrize(("out", "fan_in", "size"), [(12, 12, 4), (24, 5, 8), (5, 24, 8), (30, 20, 1)])
def test_sketches_keep_inner_products_on_average(out: int, fan_in: int, size: int) -> None:
    targets = find_targets(nn.Sequential(nn.Linear(fan_in, out)), None).chosen
    rows = [torch.randn(6, fan_in + out, generator=seeded(i)) for i in range(3)]
    # A symmetric gradient for square matrices would reveal equal projections of both sides.
    rows[0][:, fan_in : 2 * fan_in] = rows[0][:, : min(fan_in, out)] if out == fan_in else 1.0
    rows[1] = rows[0] + rows[1]
    split = [(row[:, :fan_in], row[:, fan_in:]) for row in rows]
    found = []
    for seed in range(600):
        sketches = GradientSketches(targets, size, seed)
        taken = []
        for x, delta in split:
            sketches.see_gradient(0, sketches.see_input(0, x[:4]), delta[:4])
            sketches.see_gradient(0, sketches.see_input(0, x[4:]), delta[4:])
            (sketch,) = sketches.take()
            assert sketch is not None
            assert sketch.shape == (min(out, size), min(fan_in, size))
            taken.append(sketch.flatten().double().numpy())
        found.append(np.stack(taken) @ np.stack(taken).T)
    whole = np.stack([(delta.T @ x).flatten().double().numpy() for x, delta in split])
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(np.mean(found, axis=0) - whole @ whole.T) <= 4.5 * error)
    assert np.all(error < 0.15 * np.abs(np.trace(whole @ whole.T)))


def test_mean_square_of_a_sketch_is_unbiased() -> None:
    model = Readers()
    exact = lorank.profile_gradients(model, vectors(3), sketch=None, loss=called)
    found: dict[str, list[float]] = {row.name: [] for row in exact}
    for seed in range(150):
        for row in lorank.profile_gradients(model, vectors(3), sketch=3, seed=seed, loss=called):
            found[row.name].append(row.mean_square)
    for row in exact:
        error = np.std(found[row.name]) / np.sqrt(150)
        assert abs(np.mean(found[row.name]) - row.mean_square) <= 4.5 * error


def test_seed_determines_the_sketches() -> None:
    model = tiny_models.llama()

    def values(seed: int) -> list[list[float]]:
        torch.manual_seed(np.random.default_rng().integers(2**31))
        report = lorank.profile_gradients(model, text_batches(3), sketch=8, seed=seed)
        assert report.sketch == 8
        return [row.eigenvalues.tolist() for row in report]

    assert values(1) == values(1)
    assert all(one != other for one, other in zip(values(1), values(2), strict=True))


def test_profiling_keeps_the_global_random_state() -> None:
    model = tiny_models.llama()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    lorank.profile_gradients(model, text_batches(2), sketch=8)
    lorank.profile_tasks(model, text_batches(2), folds=2, targets=["q_proj"])
    assert torch.equal(state, torch.get_rng_state())


def test_every_module_has_its_own_projections() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(16, 16)
            self.b = copy.deepcopy(self.a)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) + self.b(x)).square().sum()

    batches = vectors(3, 5, 16)
    one, other = lorank.profile_gradients(Twins(), batches, sketch=None, loss=called)
    np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    one, other = lorank.profile_gradients(Twins(), batches, sketch=4, loss=called)
    assert np.abs(one.eigenvalues - other.eigenvalues).max() > 1e-3 * one.eigenvalues[0]


@only_new_tensors()
def test_memory_grows_by_the_sketches_only() -> None:
    """Between batches, `modules * M * k^2` numbers and the projections are live."""
    model, k = tiny_models.llama(), 16
    shapes = [target.info.shape for target in find_targets(model, None).chosen]
    sketches = sum(min(out, k) * min(fan_in, k) for out, fan_in in shapes)
    projections = sum(k * side for shape in shapes for side in shape if side > k)
    seen = []

    def drawn() -> Iterator[Any]:
        for batch in text_batches():
            seen.append(live_numbers())
            yield batch

    lorank.profile_gradients(model, drawn(), sketch=k)
    # Batches of a few tokens are live, too.
    few = 100 * COUNT
    for count, numbers in enumerate(seen):
        assert abs(numbers - seen[0] - count * sketches - min(count, 1) * projections) <= few < sketches
    assert live_numbers() - seen[0] <= few
