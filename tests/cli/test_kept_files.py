"""Commands that write over existing files keep what other programs made, and write through links."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from lorank.adapters import families
from lorank.cli import compress
from lorank.cli.analyze import analyze
from lorank.cli.check import check
from lorank.cli.errors import UsageError
from lorank.cli.family import family
from lorank.runtimes import mending
from tests.support.command_line import EXECUTABLE, run
from tests.support.image_files import write_image_adapter
from tests.support.kills import contents, leftovers

STEM = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"


def trained(folder: Path, seed: int = 0) -> Path:
    """Save an adapter as PEFT does, over another one."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = {"A": (4, 16), "B": (16, 4)}
    tensors = {
        STEM.format(name, side): rng.standard_normal(shape).astype(np.float32)
        for name in "qv"
        for side, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return trained(tmp_path / "source")


@pytest.fixture
def members(source: Path, tmp_path: Path) -> Path:
    family(str(source), tmp_path / "family", "1,2", quiet=True)
    return tmp_path / "family"


def again(source: Path, folder: Path, ranks: str) -> None:
    family(str(source), folder, ranks, overwrite=True, quiet=True)


def test_member_trained_since_stays(source: Path, members: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(members / "rank-2", seed=1)
    before = contents(members / "rank-2")
    again(source, members, "1,3")
    assert contents(members / "rank-2") == before
    assert "rank-2 was kept, because it may have been trained" in capsys.readouterr().err
    assert {path.name for path in members.iterdir()} == {"elastic", "rank-1", "rank-2", "rank-3"}


@pytest.mark.parametrize("change", ["factors", "bit", "settings", "pickle"])
def test_member_trained_since_is_not_replaced(change: str, source: Path, members: Path) -> None:
    member = members / "rank-1"
    file = member / "adapter_model.safetensors"
    if change == "factors":
        trained(member, seed=1)
    elif change == "bit":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif change == "settings":
        config = json.loads((member / "adapter_config.json").read_text())
        (member / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    else:
        (member / "adapter_model.bin").write_bytes(b"trained")
    before = contents(members)
    with pytest.raises(FileExistsError, match="rank-1 may have been trained since"):
        again(source, members, "1,3")
    assert contents(members) == before
    again(source, members, "2,3")
    assert contents(member) == {
        name.removeprefix("rank-1/"): x for name, x in before.items() if name.startswith("rank-1/")
    }


def test_reading_while_another_adapter_is_saved_is_never_mixed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapters = [lorank.compress(source, avg_rank=rank, progress=False) for rank in (1, 3)]
    adapters[0].save(out)
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for adapter in adapters:
                adapter.save(out, overwrite=True)

    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(replace)
        try:
            for _ in range(100):
                ranks = lorank.LoraAdapter.load(out).ranks  # Settings that contradict factors raise an error.
                assert ranks in [adapter.ranks for adapter in adapters]
        finally:
            stop.set()
        running.result()


def without_digests(member: Path) -> None:
    file = member / "adapter_model.safetensors"
    with safe_open(file, "np") as opened:
        metadata = {key: text for key, text in opened.metadata().items() if key != "lorank.digest"}
    save_file(load_file(file), file, metadata)


def test_members_without_digests_stay_unless_they_are_replaced(source: Path, members: Path) -> None:
    for name in ("elastic", "rank-1", "rank-2"):
        assert families.is_as_written(members / name)
        without_digests(members / name)
    again(source, members, "1,3")
    assert {path.name for path in members.iterdir()} == {"elastic", "rank-1", "rank-2", "rank-3"}
    assert families.is_as_written(members / "rank-1")
    without_digests(members / "rank-1")
    trained(members / "rank-1", seed=1)
    with pytest.raises(FileExistsError, match="may have been trained"):
        again(source, members, "1,3")


def test_families_of_image_adapters_are_replaced(tmp_path: Path) -> None:
    write_image_adapter(tmp_path / "a.safetensors", "kohya")
    family(str(tmp_path / "a.safetensors"), tmp_path / "out", "1,2", quiet=True)
    names = {"elastic.safetensors", "rank-1.safetensors", "rank-2.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    again(tmp_path / "a.safetensors", tmp_path / "out", "1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    save_file(load_file(tmp_path / "out" / "rank-1.safetensors"), tmp_path / "out" / "rank-1.safetensors")
    with pytest.raises(FileExistsError, match=r"rank-1\.safetensors may have been trained"):
        again(tmp_path / "a.safetensors", tmp_path / "out", "1")


@pytest.mark.parametrize("kind", ["pipe", "folder", "large", "link to a pipe"])
def test_card_of_another_kind_is_kept(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    card = out / "README.md"
    if kind == "folder":
        card.mkdir()
    elif kind == "large":
        card.write_text("Written by lorank " + " " * (1 << 20))
    elif kind == "pipe":
        os.mkfifo(card)
    else:
        os.mkfifo(tmp_path / "pipe")
        card.symlink_to(tmp_path / "pipe")
    mode = card.lstat().st_mode
    # A read of the pipe would not end.
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    compress.compress(str(source), out, avg_rank=1.0, overwrite=True, quiet=True)
    faulthandler.cancel_dump_traceback_later()
    assert "README.md was kept" in capsys.readouterr().err
    assert card.lstat().st_mode == mode
    assert lorank.LoraAdapter.load(out).certificate is not None


def test_image_adapter_is_written_through_a_link(tmp_path: Path) -> None:
    write_image_adapter(tmp_path / "a.safetensors", "kohya")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "real.safetensors").write_bytes(b"old")
    (tmp_path / "link.safetensors").symlink_to("b/real.safetensors")
    compress.compress(
        str(tmp_path / "a.safetensors"),
        tmp_path / "link.safetensors",
        avg_rank=1.0,
        overwrite=True,
        quiet=True,
    )
    assert (tmp_path / "link.safetensors").is_symlink()
    assert lorank.LoraAdapter.load(tmp_path / "b" / "real.safetensors").ranks
    assert not leftovers(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(OSError, match="is not a regular file"):
        lorank.LoraAdapter.load(tmp_path / "a.safetensors").save(
            tmp_path / "pipe.safetensors", overwrite=True
        )


def test_repair_that_fails_leaves_the_old_adapter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = trained(tmp_path / "out", seed=1)
    before = contents(out)

    def fail(*_: Any, **__: Any) -> None:
        raise lorank.FormatError("no verdict")

    with monkeypatch.context() as patched:
        patched.setattr(mending, "check", fail)
        with pytest.raises(lorank.FormatError, match="no verdict"):
            check(str(source), fix=out, overwrite=True)
    assert contents(out) == before
    check(str(source), runtime=["llama.cpp"], fix=out, overwrite=True)
    assert contents(out) != before
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("target", "error"), [("x" * 300, "File name too long"), ("source/adapter_config.json/a", "is a file")]
)
def test_names_are_checked_before_the_work(target: str, error: str, source: Path, tmp_path: Path) -> None:
    for command in (
        lambda: compress.compress(str(source), tmp_path / target, avg_rank=1.0),
        lambda: family("no-such-adapter", tmp_path / target, "1"),
        lambda: analyze("no-such-model", output=tmp_path / f"{target}.json"),
    ):
        with pytest.raises((OSError, UsageError), match=f"(?i){error}"):
            command()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_files_reach_the_disk_before_their_names(source: Path, tmp_path: Path) -> None:
    trained(tmp_path / "out", seed=1)
    log = tmp_path / "log"
    command = [str(EXECUTABLE), "compress", str(source), "-o", str(tmp_path / "out")]
    trace = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    done = subprocess.run(
        [*trace, *command, "--avg-rank", "1", "--overwrite", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"strace does not work here: {done.stderr}")
    lines = log.read_text().splitlines()
    exchanges = [k for k, line in enumerate(lines) if "RENAME_EXCHANGE" in line]
    assert len(exchanges) in (0, 2)
    first = exchanges[0] if exchanges else len(lines)
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorank.json", "README.md"):
        assert any("fdatasync" in line and f"/new/{name}>" in line for line in lines[:first]), name
    calls = [line for line in lines if "(" in line]
    assert "fsync" in calls[-1]


def test_allocation_beside_factors_is_refused(tmp_path: Path) -> None:
    save_file({"layers.0.q_proj.weight": np.ones((8, 8), np.float32)}, tmp_path / "model.safetensors")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        folder = tmp_path / name.removeprefix("adapter_model.")
        folder.mkdir()
        (folder / name).write_bytes(b"trained")
        done = run("allocate", tmp_path / "model.safetensors", "-o", folder, "--overwrite", "--guess")
        assert done.returncode == 2
        assert "holds the factors of an adapter" in done.stderr
        assert [path.name for path in folder.iterdir()] == [name]
