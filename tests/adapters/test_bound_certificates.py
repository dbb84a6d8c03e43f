"""Certificates and the flag of spectral form belong to the factors beside them, by a digest."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from lorank.adapters.reading import is_as_written
from tests.support.adapter_files import configured, saved, trained
from tests.support.peft_cases import PROFILES, case, compressed_adapter

WEIGHTS = "adapter_model.safetensors"


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """Edit tensors and metadata of a file."""
    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata)


def first(tensors: dict[str, Any]) -> str:
    return min(key for key, value in tensors.items() if value.ndim)


def one_bit(tensors: dict[str, Any], _: dict[str, str]) -> None:
    tensors[first(tensors)].view(np.uint8).reshape(-1)[0] ^= 1


def another_name(tensors: dict[str, Any], _: dict[str, str]) -> None:
    a, b = [key for key in tensors if "q_proj.lora_A" in key][:2]
    tensors[a], tensors[b] = tensors[b], tensors[a]


def random_values(tensors: dict[str, Any], _: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    for key, value in tensors.items():
        tensors[key] = rng.standard_normal(value.shape).astype(value.dtype)


def no_digest(_: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata["lorank.digest"]


def nothing(*_: Any) -> None:
    """Write the same tensors again."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    compressed_adapter(tmp_path / "source").save(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("edit", [one_bit, another_name, random_values, no_digest])
def test_certificate_of_other_factors_is_not_shown(edit: Any, folder: Path) -> None:
    assert is_as_written(folder)
    edited(folder / WEIGHTS, edit)
    adapter = lorank.LoraAdapter.load(folder)
    assert not adapter.is_spectral
    assert adapter.certificate is None
    assert [note for note in adapter.notes if note.startswith("lorank.json was ignored: ")]
    assert not is_as_written(folder)


def test_certificate_of_rewritten_equal_factors_is_shown(folder: Path) -> None:
    before = lorank.LoraAdapter.load(folder).certificate
    edited(folder / WEIGHTS, nothing)
    assert lorank.LoraAdapter.load(folder).certificate == before
    assert before is not None


@pytest.mark.parametrize(
    "setting", [{"lora_alpha": 3}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 7}}]
)
def test_certificate_of_other_scales_is_not_shown(setting: dict[str, Any], folder: Path) -> None:
    configured(folder, **setting)
    adapter = lorank.LoraAdapter.load(folder)
    assert adapter.certificate is None
    assert any("the factors or their scales changed" in note for note in adapter.notes)
    assert not is_as_written(folder)


def test_settings_that_do_not_change_the_update_keep_the_certificate(folder: Path) -> None:
    configured(folder, base_model_name_or_path="somebody/else", lora_dropout=0.5)
    assert lorank.LoraAdapter.load(folder).certificate is not None


def test_certificate_of_another_adapter_or_with_other_numbers_is_not_shown(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    path = folder / "lorank.json"
    content = json.loads(path.read_text())
    for edit in (
        lambda content: content["modules"][0].update(energy=content["modules"][0]["energy"] * 2),
        lambda content: content.update(notes=["all is well"]),
        lambda content: content.pop("digest"),
    ):
        other = copy.deepcopy(content)
        edit(other)
        path.write_text(json.dumps(other))
        adapter = lorank.LoraAdapter.load(folder)
        assert adapter.certificate is None
        assert "lorank.json was ignored: it belongs to other factors" in adapter.notes
        assert "all is well" not in adapter.notes
        assert adapter.is_spectral
    path.write_text(json.dumps(content, indent=4, sort_keys=True))
    assert lorank.LoraAdapter.load(folder).certificate is not None


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "name", ["rslora", "gpt2", "mixtral", "gpt_oss", "embedding", "conv", "lora_bias", "head"]
)
def test_certificate_survives_repeated_saving(name: str, profile: Any, dtype: Any, tmp_path: Path) -> None:
    model, config = case(name)
    source = saved(trained(model, config), tmp_path / "source")
    lorank.compress(source, avg_rank=2, progress=False).save(tmp_path / "0", profile, dtype)
    for k in range(2):
        adapter = lorank.LoraAdapter.load(tmp_path / str(k))
        assert adapter.certificate is not None, adapter.notes
        assert adapter.is_spectral
        assert is_as_written(tmp_path / str(k))
        adapter.save(tmp_path / str(k + 1), profile)


def image_file(path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {}
    for k in range(3):
        tensors[f"lora_unet_x{k}.lora_down.weight"] = rng.standard_normal((4, 24), dtype=np.float32)
        tensors[f"lora_unet_x{k}.lora_up.weight"] = rng.standard_normal((32, 4), dtype=np.float32)
        tensors[f"lora_unet_x{k}.alpha"] = np.array(2.0, np.float32)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_certificate_of_an_image_file_is_bound(dtype: Any, tmp_path: Path) -> None:
    small = lorank.compress(image_file(tmp_path / "a.safetensors"), avg_rank=2, progress=False)
    path = small.save(tmp_path / "b.safetensors", dtype=dtype)
    assert lorank.LoraAdapter.load(path).certificate is not None
    assert is_as_written(path)
    again = lorank.LoraAdapter.load(path).save(tmp_path / "c.safetensors")
    assert lorank.LoraAdapter.load(again).certificate is not None

    def other_alpha(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors["lora_unet_x0.alpha"] = np.array(1.5, np.float32)

    def other_certificate(_: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["lorank.certificate"] = metadata["lorank.certificate"].replace("compress", "compresz")

    if dtype is None:
        for edit in (one_bit, other_alpha, other_certificate, no_digest):
            target = tmp_path / f"{edit.__name__}.safetensors"
            shutil.copyfile(path, target)
            edited(target, edit)
            adapter = lorank.LoraAdapter.load(target)
            assert adapter.certificate is None, edit
            assert any("lorank.certificate was ignored" in note for note in adapter.notes)
            assert not is_as_written(target)


def test_loading_reads_no_factors_until_the_certificate_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorank.adapters import binding

    calls: list[int] = []
    fits = binding.fits
    monkeypatch.setattr(binding, "fits", lambda *args: calls.append(1) or fits(*args))
    adapter = lorank.LoraAdapter.load(folder)
    lorank.compress(adapter, rank_ratio=0.5, progress=False)
    lorank.merge([adapter, adapter], avg_rank=1, progress=False)
    assert adapter.num_parameters
    assert repr(adapter)
    assert not calls
    assert adapter.certificate is not None
    assert adapter.notes is not None
    assert adapter.is_spectral
    assert len(calls) == 1


def test_copies_and_pickles_keep_the_verified_certificate(folder: Path) -> None:
    expected = lorank.LoraAdapter.load(folder).certificate
    for change in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin = change(lorank.LoraAdapter.load(folder))
        assert twin.certificate == expected
        assert twin.claims is None


def test_merges_cuts_and_families_have_bound_certificates(folder: Path, tmp_path: Path) -> None:
    lorank.merge([folder, folder], avg_rank=2, progress=False).save(tmp_path / "merge")
    lorank.elastic(folder, progress=False).save(tmp_path / "elastic")
    lorank.LoraAdapter.load(tmp_path / "elastic", avg_rank=1).save(tmp_path / "cut")
    for member in lorank.family(folder, [1], progress=False).values():
        member.save(tmp_path / "member")
    for name in ("merge", "elastic", "cut", "member"):
        assert lorank.LoraAdapter.load(tmp_path / name).certificate is not None, name
        assert is_as_written(tmp_path / name), name


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_of_the_tensors_drops_the_certificate(data: st.DataObject, folder: Path) -> None:
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(start, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        assert lorank.LoraAdapter.load(folder).certificate is None
    finally:
        path.write_bytes(original)


def test_adapters_of_other_programs_are_not_as_written(tmp_path: Path) -> None:
    model, config = case("patterns")
    assert not is_as_written(saved(trained(model, config), tmp_path / "peft"))
    assert not is_as_written(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert not is_as_written(tmp_path / "empty")
