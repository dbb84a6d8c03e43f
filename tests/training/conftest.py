"""Fixtures of trainings: one thread, and a run of Trainer from its first to its last step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dynamic_training import Run
from tests.support.torch_threads import one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Train without interruption, saving a checkpoint at every step; return the run and its folder."""
    folder = tmp_path_factory.mktemp("full_run")
    with one_thread():
        return Run(folder, save_strategy="steps", save_steps=1), folder
