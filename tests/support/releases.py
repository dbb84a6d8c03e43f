"""Marks of tests that need releases of libraries above the lowest supported ones."""

from __future__ import annotations

from importlib.metadata import version

import pytest


def _release(library: str) -> tuple[int, int]:
    major, minor = version(library).split(".")[:2]
    return int(major), int(minor)


stacked_experts = pytest.mark.skipif(
    _release("transformers") < (5, 0), reason="transformers 5 stacks the experts of Mixtral"
)
safe_pickles = pytest.mark.skipif(_release("torch") < (2, 10), reason=".bin files need torch 2.10")
