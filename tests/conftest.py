"""Fixtures: real models, fetched once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import material

# Tests never reach for a hub: what they need is made here or comes from packages.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (BERT, float32)."""
    return material.minilm()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (Llama, float32)."""
    return material.smollm2()
