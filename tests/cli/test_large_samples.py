"""Samples that are large, or that expand from small archives, do not fill the memory."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

# Elements of an array that is larger than an array of an archive may be, and than the memory of `limited`.
LARGE = (1 << 25) + (1 << 17)

LIMITED = """
import resource, sys, lorank.cli
resource.setrlimit(resource.RLIMIT_DATA, (256 << 20,) * 2)
lorank.cli.main()
"""


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of little memory."""
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="limits anonymous memory")
def test_npy_files_are_not_loaded_into_memory(tmp_path: Path) -> None:
    paths = [tmp_path / "X.npy", tmp_path / "Y.npy"]
    for path in paths:
        # Sparse files of zeros, 384 MB each.
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(1_500_000, 32))
    result = limited("task", *paths, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_samples"] == 1_500_000


def write_archive(path: Path, length: int, claimed: int) -> Path:
    """Write an array X of `length` compressed zeros, whose header claims `claimed` zeros, and an array Y."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (claimed, 1)}
    )
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("X.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(8 * length // len(zeros)):
                member.write(zeros)
        with archive.open("Y.npy", "w") as member:
            np.lib.format.write_array(member, np.zeros(4))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="limits anonymous memory")
@pytest.mark.parametrize(
    ("length", "claimed", "message"),
    [
        (LARGE, LARGE, r"X in {}: expands from [\d,]+ bytes to 269,484,160: save it with numpy.save"),
        (1 << 17, 1 << 26, "X in {}: cannot be read: "),
        (1 << 17, 1 << 50, "X in {}: cannot be read: "),
        (1 << 17, 1 << 62, "X in {}: cannot be read: "),
    ],
    ids=["expands", "claims more than it holds", "claims a petabyte", "claims more than 64 bits"],
)
def test_archives_that_expand_are_refused(length: int, claimed: int, message: str, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "bomb.npz", length, claimed)
    assert path.stat().st_size < 2 << 20
    result = limited("task", path)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert re.search(message.format(re.escape(str(path))), line), line


@pytest.mark.skipif(sys.platform != "linux", reason="limits anonymous memory")
def test_understated_sizes_of_archives_are_errors(tmp_path: Path) -> None:
    """The directory of the archive states a size of 1 kB for an array of 269 MB."""
    path = write_archive(tmp_path / "bomb.npz", LARGE, LARGE)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(content)
    result = limited("task", path)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "bomb.npz" in line
