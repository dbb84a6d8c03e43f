"""Files that declare their factors to be in spectral form, which is verified on loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from lorank import _core
from lorank.compression.orthogonality import are_orthogonal
from tests.support.adapter_files import configured, dense, distance, norm, saved, trained
from tests.support.peft_cases import KEY, case

B_KEY = KEY.replace("lora_A", "lora_B")


def flagged(folder: Path, edit: Callable[[dict[str, Any]], object]) -> lorank.LoraAdapter:
    """Save an elastic adapter and edit its tensors, keeping the flag."""
    model, config = case("patterns")
    lorank.elastic(saved(trained(model, config), folder / "plain"), progress=False).save(folder / "elastic")
    path = folder / "elastic" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    with safe_open(path, "np") as file:
        assert file.metadata()["lorank.spectral"]
        save_file(tensors, path, file.metadata())
    return lorank.LoraAdapter.load(folder / "elastic")


def shuffled(tensors: dict[str, Any]) -> None:
    for key in tensors:
        if "lora_A" in key:
            partner = key.replace("lora_A", "lora_B")
            tensors[key] = np.ascontiguousarray(tensors[key][::-1])
            tensors[partner] = np.ascontiguousarray(tensors[partner][:, ::-1])


def random_ones(tensors: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for key, value in tensors.items():
        tensors[key] = rng.standard_normal(value.shape).astype(value.dtype)


def one_side(tensors: dict[str, Any]) -> None:
    tensors[KEY] = np.random.default_rng(0).standard_normal(tensors[KEY].shape).astype(np.float32)


@pytest.mark.parametrize("edit", [random_ones, one_side, shuffled, lambda _: None])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_certificate_is_true_despite_a_wrong_flag(edit: Any, dtype: Any, tmp_path: Path) -> None:
    def edit_and_round(tensors: dict[str, Any]) -> None:
        edit(tensors)
        tensors.update({key: value.astype(dtype) for key, value in tensors.items()})

    adapter = flagged(tmp_path, edit_and_round)
    before = dense(adapter)
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    assert small.certificate is not None
    assert small.certificate.norm == pytest.approx(norm(before), rel=1e-5)
    assert small.certificate.error == pytest.approx(distance(before, dense(small)), rel=1e-4)
    best = np.sort(np.concatenate([np.linalg.svd(x, compute_uv=False) for x in before.values()]))
    assert small.certificate.error == pytest.approx(np.sqrt(np.square(best[: -2 * 12]).sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_flag_of_unedited_files_is_trusted(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded values over six decades need no decomposition on loading."""
    rng = np.random.default_rng(0)
    values = np.geomspace(1, 1e-6, 16)
    basis = [np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (200, 300)]
    tensors = {
        "m.lora_B.weight": (basis[0] * values).astype(np.float32),
        "m.lora_A.weight": np.ascontiguousarray(basis[1].T).astype(np.float32),
    }
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 16, "lora_alpha": 16, "target_modules": ["m"]}')
    lorank.elastic(folder, progress=False).save(tmp_path / "b", dtype=dtype)

    def refuse(updates: Any, *_: Any) -> None:
        assert not updates, "an elastic parent needs no decomposition"

    monkeypatch.setattr(_core, "decompose", refuse)
    cut = lorank.LoraAdapter.load(tmp_path / "b", avg_rank=4)
    assert cut.ranks == {"m": 4}


def test_negative_scales_under_the_flag_are_handled(tmp_path: Path) -> None:
    flagged(tmp_path, lambda _: None)
    adapter = lorank.LoraAdapter.load(configured(tmp_path / "elastic", lora_alpha=-3, alpha_pattern={}))
    before = dense(adapter)
    whole = lorank.compress(adapter, rank_ratio=1.0, progress=False)
    assert distance(before, dense(whole)) <= 1e-6 * norm(before)


def test_nan_under_the_flag_raises(tmp_path: Path) -> None:
    adapter = flagged(tmp_path, lambda tensors: tensors[KEY].__setitem__((0, 0), np.nan))
    with pytest.raises(lorank.NumericalError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        lorank.compress(adapter, avg_rank=1, progress=False)


def test_tolerance_of_orthogonality_depends_on_the_dtype() -> None:
    e = np.eye(4)[:3]
    assert are_orthogonal(e, "float32")
    assert are_orthogonal(np.zeros((3, 4)), "float32")
    assert are_orthogonal(np.zeros((0, 4)), "float32")
    tilted = e + np.array([[0, 0.003, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert are_orthogonal(tilted * 1e-30, "bfloat16")
    assert not are_orthogonal(tilted * 1e30, "float16")
    assert not are_orthogonal(np.where(e > 0, np.inf, e), "bfloat16")
