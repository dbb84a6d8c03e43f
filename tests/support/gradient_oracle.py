"""Gradients of base weights by autograd, and comparisons of gradient spectra."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import lorank
from lorank.report.gradients import effective_rank
from tests.support.profiled_models import Batches

Array = npt.NDArray[np.float64]


def base_weights(model: Any) -> dict[str, Any]:
    """Return the parameters of the base model by their names without PEFT."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def true_gradients(model: Any, batches: Batches, loss: Any = None) -> dict[str, Array]:
    """Return flat gradients of every base weight, a row per batch."""
    model = copy.deepcopy(model).requires_grad_(True)
    weights = base_weights(model)
    found: dict[str, list[Array]] = {name: [] for name in weights}
    for batch in batches:
        model.zero_grad()
        value = loss(model, batch) if loss else model(**batch).loss
        value.backward()
        for name, weight in weights.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            found[name].append(gradient.double().flatten().numpy().copy())
    return {name: np.stack(rows) for name, rows in found.items()}


def true_spectrum(gradients: Array) -> Array:
    values = np.linalg.eigvalsh(gradients @ gradients.T / len(gradients))
    return np.asarray(values[::-1], dtype=np.float64)


def assert_true(report: lorank.GradientReport, gradients: dict[str, Array], tolerance: float = 1e-5) -> None:
    assert len(report) > 0
    for row in report:
        expected = true_spectrum(gradients[f"{row.module}.weight"])
        assert expected[0] > 0
        np.testing.assert_allclose(row.eigenvalues, expected, rtol=0, atol=tolerance * expected[0])
        assert np.all(np.diff(row.eigenvalues) <= 0)
        assert row.mean_square == pytest.approx(expected.sum(), rel=10 * tolerance)
        assert row.effective_rank == effective_rank(row.eigenvalues, report.energy)


def same_spectra(report: lorank.GradientReport, other: lorank.GradientReport, tolerance: float) -> bool:
    assert [row.name for row in report] == [row.name for row in other]
    return all(
        np.allclose(a.eigenvalues, b.eigenvalues, rtol=0, atol=tolerance * a.eigenvalues[0])
        for a, b in zip(report, other, strict=True)
    )
