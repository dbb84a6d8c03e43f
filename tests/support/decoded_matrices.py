"""Writes packed tensors to a model folder and reads the decoded matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from lorank.sources import Source, open_source

Array = npt.NDArray[np.float32]


def write_model(
    folder: Path, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any] | None = None
) -> Path:
    """Write the tensors and the settings of a quantization."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, folder / "model.safetensors")
    config = {"quantization_config": dict(quantization)} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decoded(
    folder: Path, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any] | None = None
) -> dict[str, Array]:
    """Write the tensors; return the matrices that are read from the files by name."""
    return matrices(open_source(write_model(folder, tensors, quantization)))


def matrices(source: Source) -> dict[str, Array]:
    """Return the matrices of a source by name, in their stored orientation."""
    return {m.info.name: m.load().to_array() for m in source.matrices}


def assert_same(found: Array, expected: torch.Tensor | npt.NDArray[Any]) -> None:
    """Assert that all float32 numbers have the same bits; NaN equals NaN, and -0 equals 0."""
    values = expected.detach().float().numpy() if isinstance(expected, torch.Tensor) else expected
    assert found.dtype == np.float32
    assert found.shape == values.shape
    np.testing.assert_array_equal(found, values.astype(np.float32))


def random_codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits."""
    bits = np.random.default_rng(seed).integers(0, 256, size=(*shape, dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(bits).view(dtype).reshape(shape)
