"""The public packages list their public names only."""

from __future__ import annotations

import importlib

import pytest

import lorank


@pytest.mark.parametrize("name", ["lorank", "lorank.training", "lorank.profiling"])
def test_dir_lists_public_names_only(name: str) -> None:
    pytest.importorskip("torch")
    package = importlib.import_module(name)
    for public in package.__all__:
        getattr(package, public)
    listed = dir(package)
    assert [found for found in listed if not found.startswith("__")] == sorted(
        public for public in package.__all__ if not public.startswith("__")
    )
    assert {"__all__", "__doc__", "__name__"} <= set(listed)


@pytest.mark.parametrize("name", ["nothing", "analyse"])
def test_unknown_name_raises(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'lorank' has no attribute '{name}'"):
        getattr(lorank, name)
