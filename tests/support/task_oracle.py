"""Task spectra from recorded inputs and output gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lorank
from lorank.report.tasks import ModuleTask
from tests.support.gradient_oracle import Array
from tests.support.profiled_models import Batches


class Tape:
    """Records inputs of modules and gradients of their outputs, in the order of backward passes."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.x: dict[str, list[Array]] = {name: [] for name in names}
        self.delta: dict[str, list[Array]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self.listen(name))

    def listen(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].detach().clone()

            def see(gradient: torch.Tensor) -> None:
                self.x[name].append(x.double().numpy())
                self.delta[name].append(gradient.detach().double().numpy().copy())

            output.register_hook(see)

        return hook

    def rows(self, name: str) -> tuple[Array, Array]:
        x = [part.reshape(-1, part.shape[-1]) for part in self.x[name]]
        delta = [part.reshape(-1, part.shape[-1]) for part in self.delta[name]]
        return that_count(np.concatenate(x), -np.concatenate(delta))


def that_count(X: Array, Y: Array) -> tuple[Array, Array]:
    """Return the rows with a gradient above rounding errors."""
    sizes = np.abs(Y).max(1)
    counts = sizes > 1e-6 * sizes.max()
    return X[counts], Y[counts]


def recorded(model: Any, batches: Batches, names: list[str], loss: Any = None) -> Tape:
    model = copy.deepcopy(model).requires_grad_(True)
    tape = Tape(model, names)
    for batch in batches:
        (loss(model, batch) if loss else model(**batch).loss).backward()
    return tape


def assert_task(row: ModuleTask, X: Array, Y: Array, **options: Any) -> None:
    expected = lorank.task_spectrum(X, Y, **options)
    scale = expected.singular_values[0]
    np.testing.assert_allclose(row.singular_values, expected.singular_values, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(row.predicted_r2, expected.predicted_r2, rtol=1e-3, atol=1e-3)
    assert row.noise == pytest.approx(expected.noise, rel=1e-4)
    assert row.tau == pytest.approx(expected.tau, rel=1e-4)
    assert row.rho == pytest.approx(expected.rho, rel=1e-3, nan_ok=True)
    assert (row.k_star, row.num_above) == (expected.k_star, expected.num_above)
    assert row.predicted_rank == expected.predicted_rank
    assert row.flags == expected.flags
