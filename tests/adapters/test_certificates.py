"""Certificates and ranks in files: kept, or ignored if they do not fit the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from lorank.adapters.writing import write_adapter
from tests.support import tiny_models
from tests.support.adapter_files import loaded, saved
from tests.support.peft_cases import PROFILES, compressed_adapter


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_certificate_survives_saving_in_another_profile(profile: Any, dtype: Any, tmp_path: Path) -> None:
    small = replace(compressed_adapter(tmp_path / "a"), notes=["the eldest note"])
    written = write_adapter(small, tmp_path / "b", profile, dtype, overwrite=False)
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert again.certificate == written.certificate
    assert again.certificate is not None
    assert "the eldest note" in again.notes
    for other in PROFILES:
        again.save(tmp_path / other, other)
        certificate = lorank.LoraAdapter.load(tmp_path / other).certificate
        assert certificate is not None
        assert certificate.modules == again.certificate.modules
        card = (tmp_path / other / "README.md").read_text()
        assert "compress, avg_rank=1" in card
        assert "- the eldest note" in card
        assert "also holds saved modules" not in card
        # The second rounding error is added to the first.
        assert (certificate.rounding_error or 0) >= (again.certificate.rounding_error or 0)
        assert (certificate.rounding_error is None) == (dtype is None)
    fresh = lorank.compress(again, rank_ratio=1.0, progress=False).certificate
    assert fresh is not None
    assert fresh.error == 0
    assert fresh.action != again.certificate.action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "damaged"),
        ("[]", "damaged: the content is []: it should be an object"),
        ('{"action": "x"}', "the content has no 'modules'"),
        ('{"action": "x", "modules": [{}]}', "modules[0] has no 'name'"),
        ('{"action": "x", "modules": [{"name": "m", "rank_before": "8"}]}', "modules[0].rank_before is '8'"),
        ('{"action": "x", "modules": [], "rounding_error": NaN}', "rounding_error is nan"),
        ('{"action": "x", "modules": []}', "has other ranks"),
    ],
)
def test_unfitting_certificate_is_ignored(text: str, reason: str, tmp_path: Path) -> None:
    compressed_adapter(tmp_path / "a").save(tmp_path / "b")
    (tmp_path / "b" / "lorank.json").write_text(text)
    adapter = lorank.LoraAdapter.load(tmp_path / "b")
    assert adapter.certificate is None
    assert any("lorank.json was ignored" in note and reason in note for note in adapter.notes)


def test_further_training_drops_the_certificate(tmp_path: Path) -> None:
    compressed_adapter(tmp_path / "a").save(tmp_path / "b")
    saved(loaded(tiny_models.llama(), tmp_path / "b"), tmp_path / "b")
    assert (tmp_path / "b" / "lorank.json").exists()
    assert lorank.LoraAdapter.load(tmp_path / "b").certificate is None


def test_padding_does_not_count_as_rank(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    small.save(tmp_path / "b", "portable")
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert again.ranks == small.ranks
    assert again.num_parameters == small.num_parameters
    assert any("zeros that padded the ranks of" in note for note in again.notes)
    half = [lorank.compress(x, rank_ratio=0.5, progress=False).ranks for x in (small, again)]
    assert half[0] == half[1]
    assert sum(half[0].values()) == round(0.5 * sum(small.ranks.values()) + 1e-9)
    assert f"{small.num_parameters:,} parameters" in (tmp_path / "b" / "README.md").read_text()


def with_stated_ranks(folder: Path, ranks: str) -> lorank.LoraAdapter:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "lorank.ranks": ranks})
    return lorank.LoraAdapter.load(folder)


def test_wrong_ranks_in_the_metadata_are_ignored_or_raise(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    small.save(tmp_path / "b", "portable")
    largest = max(small.ranks.values())
    for ranks in (
        "{",
        "[]",
        "{}",
        json.dumps(dict.fromkeys(small.ranks, 99)),
        json.dumps(dict.fromkeys(small.ranks, "1")),
    ):
        again = with_stated_ranks(tmp_path / "b", ranks)
        assert set(again.ranks.values()) == {largest}
        assert any("do not fit the factors and were ignored" in note for note in again.notes)
    fewer = with_stated_ranks(tmp_path / "b", json.dumps(dict.fromkeys(small.ranks, 1)))
    with pytest.raises(lorank.FormatError, match="states rank 1, but the factors have a higher"):
        lorank.compress(fewer, rank_ratio=1.0, progress=False)
