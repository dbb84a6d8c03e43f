"""Fixtures: folders of real models, fetched once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import material

# Tests never access a hub: models are built here or come from packages.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (BERT, float32)."""
    return material.minilm()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Llama, float32)."""
    return material.smollm2()
