"""Files that change between the reads of one adapter: results of two states are refused."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lorank
from lorank import _core
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, saved, trained
from tests.support.peft_cases import case

WEIGHTS = "adapter_model.safetensors"
LAYERS = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def written(folder: Path, seed: int, rank: int = 4) -> Path:
    """Write an adapter of random factors with a saved module."""
    rng = np.random.default_rng(seed)
    tensors = {"base_model.model.score.weight": rng.standard_normal((3, 24)).astype(np.float32)}
    for name in LAYERS:
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((rank, 24), dtype=np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((32, rank), dtype=np.float32)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],'
        ' "modules_to_save": ["score"]}'
    )
    return folder


def copied_over(path: Path, other: Path) -> None:
    """Copy onto the same inode, as `cp` does."""
    shutil.copyfile(other, path)


def copied_with_times(path: Path, other: Path) -> None:
    """Copy onto the same inode and restore the times, as `rsync --inplace --times` may."""
    times = path.stat()
    shutil.copyfile(other, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def mapped(path: Path, other: Path) -> None:
    """Write through a memory map, which may leave all times as they were."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:] = other.read_bytes()


def one_byte(path: Path, other: Path) -> None:
    del other
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def shortened(path: Path, other: Path) -> None:
    del other
    os.truncate(path, path.stat().st_size - 100)


def lengthened(path: Path, other: Path) -> None:
    with path.open("ab") as file:
        file.write(other.read_bytes()[:100])


@pytest.mark.parametrize("change", [copied_over, copied_with_times, mapped, one_byte, shortened])
def test_change_between_compressing_and_saving_is_refused(
    change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    a, b = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    small = lorank.compress(a, avg_rank=2, progress=False)
    change(a / WEIGHTS, b / WEIGHTS)
    with pytest.raises(lorank.FormatError, match=r"a/adapter_model.*tensor `.*`: the file (changed|was tr)"):
        small.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [copied_over, copied_with_times, lengthened])
def test_change_before_the_first_read_is_refused(
    change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """Settings and header were read before; a blend with later values is refused."""
    a, b = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    adapter = lorank.LoraAdapter.load(a)
    change(a / WEIGHTS, b / WEIGHTS)
    for use in (
        lambda: lorank.compress(adapter, avg_rank=2, progress=False),
        lambda: lorank.merge([adapter, b], avg_rank=2, progress=False),
        lambda: adapter.save(tmp_path / "out"),
        lambda: adapter.modules[LAYERS[0]].singular_values,
    ):
        with pytest.raises(lorank.FormatError, match="changed after it was opened: load it again"):
            use()


def test_replaced_removed_and_relinked_files_keep_their_values(tmp_path: Path) -> None:
    """The open file is still the old one, so the results are those of the old adapter."""
    b = written(tmp_path / "b", 2)

    def renamed(folder: Path) -> None:
        shutil.copyfile(b / WEIGHTS, folder / "new")
        (folder / "new").replace(folder / WEIGHTS)

    def removed(folder: Path) -> None:
        (folder / WEIGHTS).unlink()

    def snapshot(folder: Path) -> None:
        shutil.rmtree(folder)

    for k, change in enumerate((renamed, removed, snapshot)):
        a = written(tmp_path / f"a{k}", 1)
        expected = lorank.compress(a, avg_rank=2, progress=False)
        expected.save(tmp_path / f"expected{k}")
        small = lorank.compress(a, avg_rank=2, progress=False)
        change(a)
        small.save(tmp_path / f"out{k}")
        found = [load_file(tmp_path / f"{name}{k}" / WEIGHTS) for name in ("expected", "out")]
        assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])


def test_retargeted_link_keeps_its_values(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    link = tmp_path / "link"
    link.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (link / name).symlink_to(a / name)
    small = lorank.compress(link, avg_rank=2, progress=False)
    (link / WEIGHTS).unlink()
    (link / WEIGHTS).symlink_to(b / WEIGHTS)
    small.save(tmp_path / "out")
    lorank.compress(a, avg_rank=2, progress=False).save(tmp_path / "expected")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()


def test_new_times_of_equal_bytes_are_no_change(tmp_path: Path) -> None:
    """Factors that were read before are compared by their bytes."""
    adapter = tmp_path / "a"
    model, config = case("patterns")
    saved(trained(model, config), adapter)
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    (adapter / WEIGHTS).touch()
    (adapter / WEIGHTS).chmod(0o600)
    small.save(tmp_path / "out")
    assert lorank.LoraAdapter.load(tmp_path / "out").certificate is not None


def test_settings_that_change_while_an_adapter_is_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorank.adapters.formats import peft

    a = written(tmp_path / "a", 1)
    read = peft._weights

    def overtaken(folder: Path) -> Any:
        settings = (a / "adapter_config.json").read_text()
        (a / "adapter_config.json").unlink()
        (a / "adapter_config.json").write_text(settings)
        return read(folder)

    monkeypatch.setattr(peft, "_weights", overtaken)
    with pytest.raises(lorank.FormatError, match="changed while it was read: load it again"):
        lorank.LoraAdapter.load(a)


def test_saved_modules_of_a_live_model_are_those_of_the_compression(tmp_path: Path) -> None:
    import peft

    model = tiny_models.llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    live = trained(model, config)
    small = lorank.compress(lorank.LoraAdapter.from_model(live), avg_rank=2, progress=False)
    before = dense(small)
    small.save(tmp_path / "before")
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(1.0)
    small.save(tmp_path / "after")
    assert distance(before, dense(lorank.LoraAdapter.load(tmp_path / "after"))) == 0
    found = [load_file(tmp_path / name / WEIGHTS) for name in ("before", "after")]
    assert any("lm_head" in key for key in found[0])
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])


def test_analysis_refuses_a_file_that_changes_and_its_journal_holds_one_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name in ("m", "other"):
        weights = {f"layers.{i}.mlp.weight": rng.standard_normal((40, 50)) for i in range(6)}
        save_file(weights, tmp_path / f"{name}.safetensors")
    source, journal = tmp_path / "m.safetensors", tmp_path / "journal"
    old = {row.name: row.spectral_norm for row in lorank.analyze(source, progress=False)}
    analyze = _core.analyze

    def changing(matrices: Any, accuracy: str, threads: int, keep: bool, on_result: Any) -> None:
        analyze(matrices[:2], accuracy, threads, keep, on_result)
        copied_with_times(source, tmp_path / "other.safetensors")
        analyze(matrices[2:], accuracy, threads, keep, lambda index, x: on_result(index + 2, x))

    monkeypatch.setattr(_core, "analyze", changing)
    with pytest.raises(lorank.FormatError, match="4 of 6 matrices failed"):
        lorank.analyze(source, resume=journal, progress=False)
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert {row["name"]: row["spectral_norm"] for row in rows} == {
        row["name"]: old[row["name"]] for row in rows
    }
    assert len(rows) == 2
