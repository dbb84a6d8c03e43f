"""Profiles of wrapped models and under switched-off gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorank
from tests.support import tiny_models
from tests.support.profiled_models import run_gradients, run_tasks, text_batches


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_profiles_enable_gradients(profile: Any, mode: Any) -> None:
    expected = profile(tiny_models.llama(), text_batches(2))
    model = tiny_models.llama()
    with mode():
        found = profile(model, text_batches(2))
        assert not torch.is_grad_enabled()
    assert found == expected


def placed(model: Any) -> Any:
    """Move a model to a GPU if there is one, as DataParallel expects."""
    return model.cuda() if torch.cuda.is_available() else model


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_profiles_of_wrapped_models_have_plain_names(profile: Any) -> None:
    model = placed(tiny_models.llama())
    expected = profile(model, text_batches(2))
    compiled = torch.compile(model)
    for wrapped in (compiled, nn.DataParallel(model), nn.DataParallel(compiled)):
        assert list(profile(wrapped, text_batches(2))) == list(expected)


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_data_parallel_models_are_not_copied(profile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies would share the hooks of the model while running at the same time on other devices."""
    model = placed(tiny_models.llama())
    expected = profile(model, text_batches(2))
    monkeypatch.setattr(nn.DataParallel, "forward", lambda *_, **__: pytest.fail("the wrapper was called"))
    assert profile(nn.DataParallel(model), text_batches(2)) == expected


def test_names_contain_the_prefix_of_a_custom_wrapper() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_models.llama()

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    report = lorank.profile_gradients(Outer(), text_batches(2), sketch=None)
    plain = lorank.profile_gradients(tiny_models.llama(), text_batches(2), sketch=None)
    assert [row.name for row in report] == [f"inner.{row.name}" for row in plain]
    for one, other in zip(report, plain, strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
