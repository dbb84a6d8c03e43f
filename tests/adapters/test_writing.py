"""Saves that succeed completely or change nothing, and their reports of rounding and padding."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file

import lorank
from lorank import _core
from lorank._internal import atomic, staging
from lorank.adapters.writing import write_adapter
from lorank.cli import compress, family
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, saved, trained
from tests.support.command_line import ok, run
from tests.support.peft_cases import PROFILES, case, compressed_adapter


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("at", ["adapter_config.json", "lorank.json", "README.md"])
def test_full_disk_changes_no_file(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compressed_adapter(tmp_path / "a")
    small.save(tmp_path / "old")
    other = lorank.compress(small, rank_ratio=0.5, progress=False)
    before = everything(tmp_path)
    write = Path.write_text

    def full(self: Path, *arguments: Any) -> int:
        if self.name == at:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, *arguments)

    monkeypatch.setattr(Path, "write_text", full)
    for target in (tmp_path / "new", tmp_path / "made" / "new", tmp_path / "old"):
        with pytest.raises(OSError, match="No space left") as error:
            other.save(target, overwrite=True)
        assert error.value.filename == str(target / at)
        assert everything(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]
    monkeypatch.undo()
    assert lorank.LoraAdapter.load(tmp_path / "old").certificate == small.certificate


def test_overflowing_weights_change_no_file(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    small.save(tmp_path / "old")
    before = everything(tmp_path)
    huge = lorank.merge([small], [1e14], rank_ratio=1.0, progress=False)
    for target in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(lorank.NumericalError) as error:
            huge.save(target, dtype="float16", overwrite=True)
        assert str(error.value).startswith(f"{target / 'adapter_model.safetensors'}: tensor `")
        assert everything(tmp_path) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_folders_and_files_follow_the_umask(mask: int, tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    before = os.umask(mask)
    try:
        small.save(tmp_path / "b")
        atomic.write_text(tmp_path / "report.json", "{}")
        (tmp_path / "c").mkdir()
        (tmp_path / "file").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "c").stat().st_mode
    for written in (*(tmp_path / "b").iterdir(), tmp_path / "report.json"):
        assert written.stat().st_mode == (tmp_path / "file").stat().st_mode, written
    inode = (tmp_path / "c").stat().st_ino
    small.save(tmp_path / "c")
    assert (tmp_path / "c").stat().st_ino == inode, "an existing folder, even an empty one, stays the same"


def test_stale_files_are_removed_last_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("kept", "stale", "both"):
        (folder / name).write_text("old")
    with staging.staged_folder(folder, ["stale", "both"]) as prepared:
        (prepared / "both").write_text("new")
        assert (folder / "stale").exists()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"kept": "old", "both": "new"}


def narrow(folder: Path, dtype: Any) -> lorank.LoraAdapter:
    config = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3})
    return lorank.LoraAdapter.load(saved(trained(tiny_models.llama(), config).to(dtype), folder))


def test_rounding_without_a_certificate_is_noted(tmp_path: Path) -> None:
    adapter = narrow(tmp_path / "a", torch.bfloat16)
    for profile in PROFILES:
        written = write_adapter(adapter, tmp_path / profile, profile, None, overwrite=False)
        added = distance(dense(adapter), dense(lorank.LoraAdapter.load(tmp_path / profile)))
        assert added > 0
        (note,) = [note for note in written.notes if "rounding" in note]
        assert f"{added:.3g} of " in note
    # Doubling is exact, and the second save has no rounding error.
    again = lorank.LoraAdapter.load(tmp_path / "compact")
    assert not write_adapter(again, tmp_path / "again", "compact", None, overwrite=False).notes
    text = run("check", tmp_path / "a", "--for", "llama.cpp", "--fix", tmp_path / "fixed").stderr
    assert "rounding moved the updates by" in text


@pytest.mark.parametrize("dtype", ["float32", None])
def test_exact_conversion_has_no_note(dtype: Any, tmp_path: Path) -> None:
    adapter = narrow(tmp_path / "a", torch.float32)
    assert not write_adapter(adapter, tmp_path / "b", "compact", dtype, overwrite=False).notes


def test_stored_padding_is_counted(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    written = write_adapter(small, tmp_path / "b", "portable", None, overwrite=False)
    stored = sum(x.size for x in load_file(tmp_path / "b" / "adapter_model.safetensors").values())
    assert written.stored_parameters == stored > small.num_parameters
    assert f"{stored:,} parameters are stored" in (tmp_path / "b" / "README.md").read_text()
    assert any(f"portable: {stored:,} parameters are stored" in note for note in written.notes)
    exact = write_adapter(small, tmp_path / "c", "compact", None, overwrite=False)
    assert (exact.stored_parameters, exact.notes) == (small.num_parameters, [])
    to = (tmp_path / "a", "--profile", "portable", "-o")
    content = json.loads(ok("compress", *to, tmp_path / "d", "--avg-rank", 1, "--json"))
    assert content["stored_parameters"] == stored
    family = run("family", *to, tmp_path / "e", "--avg-ranks", "1", "--json")
    assert json.loads(family.stdout)["rank-1"]["stored_parameters"] == stored
    assert f"rank-1: portable: {stored:,} parameters are stored" in family.stderr
    assert "parameters are stored" in run("check", tmp_path / "c", "--fix", tmp_path / "f").stderr
    assert "by --max-rank" in run("compress", *to, tmp_path / "g", "--rank-ratio", 0.95).stderr


def test_saving_uses_the_given_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compressed_adapter(tmp_path / "source")
    asked: list[int] = []
    write = _core.write_safetensors

    def counted(*arguments: Any) -> str | None:
        asked.append(arguments[3])
        return write(*arguments)

    monkeypatch.setattr(_core, "write_safetensors", counted)
    small.save(tmp_path / "one", threads=1)
    small.save(tmp_path / "all")
    compress.compress(str(tmp_path / "source"), tmp_path / "line", avg_rank=2.0, threads=3, quiet=True)
    family.family(str(tmp_path / "source"), tmp_path / "family", "1,2", threads=2, quiet=True)
    assert asked == [1, _core.available_threads(), 3, 2, 2, 2]
    with pytest.raises(ValueError, match="threads must be at least 1"):
        small.save(tmp_path / "none", threads=0)
    assert not (tmp_path / "none").exists()


def test_saving_a_peft_adapter_as_a_file_raises(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "source")
    target = tmp_path / "small.safetensors"
    with pytest.raises(ValueError, match=r"small\.safetensors: a PEFT adapter is a folder"):
        small.save(target)
    assert not target.exists()
    assert "name a folder" in run("compress", tmp_path / "source", "-o", target, "--avg-rank", 2).stderr
    assert not target.exists()


def test_failed_writes_leave_no_empty_folders(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    name = small.adapted[0].name
    huge = replace(small.modules[name], scaling=1e9)
    adapter = replace(small, modules={**small.modules, name: huge})
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "b" / "c", tmp_path / "mine" / "c", tmp_path / "mine"):
        with pytest.raises(lorank.NumericalError):
            adapter.save(target, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]
    assert not any((tmp_path / "mine").iterdir())


def test_overwriting_removes_files_of_the_earlier_adapter(tmp_path: Path) -> None:
    model, config = case("llama")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    folder = tmp_path / "b"
    small.save(folder)
    (folder / "adapter_model.bin").write_bytes(b"old")
    (folder / "precious").write_text("")
    adapter.save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "precious",
    }
    assert "energy retained" not in (folder / "README.md").read_text()
    (folder / "README.md").write_text("Mine")
    small.save(folder, overwrite=True)
    assert (folder / "README.md").read_text() == "Mine"


def test_torch_dtypes_are_accepted_and_repr_is_short(tmp_path: Path) -> None:
    small = compressed_adapter(tmp_path / "a")
    small.save(tmp_path / "b", dtype=torch.bfloat16)
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert {module.dtype for module in again.modules.values()} == {"bfloat16"}
    assert repr(again) == (
        f"LoraAdapter('{tmp_path / 'b'}', peft, {len(again.modules)} modules, ranks 1 to "
        f"{max(again.ranks.values())}, {again.num_parameters:,} parameters)"
    )
    assert repr(again.certificate).startswith(
        "Certificate('compress, avg_rank=1, global scope', 12 modules, "
    )
    assert len(repr(again.certificate)) < 200


def test_existing_folders_are_not_overwritten(tmp_path: Path) -> None:
    model, config = case("llama")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        adapter.save(tmp_path / "b")
    adapter.save(tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "precious").exists()
    with pytest.raises(ValueError, match="profile must be one of"):
        adapter.save(tmp_path / "c", "tiny")
    with pytest.raises(ValueError, match="dtype must be"):
        adapter.save(tmp_path / "c", dtype="int8")
