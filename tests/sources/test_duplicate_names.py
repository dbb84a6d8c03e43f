"""Two tensors of one name: an error or two entries, never one of them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import lorank


def eye(size: float) -> np.ndarray[Any, Any]:
    return np.eye(5, 4, dtype=np.float32) * size


LORA = {
    "base_model.model.l.a.lora_A.default.weight": eye(1).T.copy(),
    "base_model.model.l.a.lora_B.default.weight": eye(1),
}


@pytest.mark.parametrize(
    "weights",
    [
        {"base_model.model.l.a.weight": eye(1), "l.a.weight": eye(2), **LORA},
        {"base_model.model.l.a.base_layer.weight": eye(1), "base_model.model.l.a.weight": eye(2), **LORA},
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_names_that_are_equal_without_wrappers_are_refused(
    weights: dict[str, Any], in_file: bool, tmp_path: Path
) -> None:
    source: Any = weights
    if in_file:
        source = tmp_path / "m.safetensors"
        save_file(weights, source)
    with pytest.raises(lorank.FormatError, match=r"define the same parameter 'l\.a\.weight'"):
        lorank.analyze(source, progress=False)


def test_stacks_of_one_name_are_refused() -> None:
    stack = np.ones((2, 4, 6), np.float32)
    weights = {"l.experts.gate_up_proj": stack, "l.experts.gate_up_proj.weight": 2 * stack}
    with pytest.raises(
        lorank.FormatError, match=r"two tensors define the matrix 'l\.experts\.gate_up_proj\[0\]'"
    ):
        lorank.analyze(weights, progress=False)


def test_bare_tensor_beside_a_weight_is_listed() -> None:
    report = lorank.analyze({"l.a": eye(1), "l.a.weight": eye(2)}, progress=False)
    assert [(row.name, row.spectral_norm) for row in report] == [("l.a", 2.0)]
    assert [entry.name for entry in report.skipped] == ["l.a"]


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"l.a.weight": eye(1)}, tmp_path / "1.safetensors")
    save_file({"l.a.weight": eye(2), "l.b.weight": eye(3)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"l.a.weight": "1.safetensors", "l.b.weight": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(lorank.FormatError, match=r"`l\.a\.weight`: is also in `2.safetensors`"):
        lorank.analyze(tmp_path, progress=False)
    index.write_text('{"weight_map": {"l.a.weight": "1.safetensors", "l.a.weight": "2.safetensors"}}')
    with pytest.raises(lorank.FormatError, match=r"`l\.a\.weight`: appears twice in the index"):
        lorank.analyze(tmp_path, progress=False)


def test_tensor_in_two_pickles_is_refused(tmp_path: Path) -> None:
    torch.save({"l.a.weight": torch.eye(4)}, tmp_path / "1.bin")
    torch.save({"l.a.weight": torch.eye(4) * 2, "l.b.weight": torch.eye(4)}, tmp_path / "2.bin")
    places = {"l.a.weight": "1.bin", "l.b.weight": "2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(lorank.FormatError, match=r"2\.bin: tensor 'l\.a\.weight' is also in 1\.bin"):
        lorank.analyze(tmp_path, progress=False)
