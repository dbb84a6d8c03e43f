"""Files that are cut off or changed under a mapping raise an error; before, the process ended by a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lorank
from lorank import _core
from lorank.sources import arrays, open_source
from lorank.sources.mapped import unmapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lists its mappings")

SETUP = """
import os, mmap, numpy as np, torch, lorank
x = np.load('x.npy', mmap_mode='r'); y = np.load('y.npy', mmap_mode='r')
raw = np.memmap('x.npy', np.float32, 'r', 128, (200000, 16))
private = np.load('x.npy', mmap_mode='c')
shared = np.load('x.npy', mmap_mode='r+')
pages = mmap.mmap(os.open('x.npy', os.O_RDONLY), 0, access=mmap.ACCESS_READ)
buffer = np.frombuffer(pages, np.float32, 3200000, 128)
buffer = buffer.reshape(200000, 16)
tensor = torch.from_numpy(private)
cut = lambda size=4096: os.truncate('x.npy', size)
"""

USES = {
    "task": "cut(); lorank.task_spectrum(x, y)",
    "task of the targets": "cut(); lorank.task_spectrum(y, x)",
    "task of a view": "cut(); lorank.task_spectrum(x[::2, ::3], y[::2])",
    "task of a reversed view": "cut(); lorank.task_spectrum(x[::-1], y)",
    "task of a plain array": "v = np.asarray(x); cut(); lorank.task_spectrum(v, y)",
    "task of a raw map": "cut(); lorank.task_spectrum(raw, y)",
    "task of a private map": "cut(); lorank.task_spectrum(private, y)",
    "task of a writable map": "cut(); lorank.task_spectrum(shared, y)",
    "task of a buffer": "cut(); lorank.task_spectrum(buffer, y)",
    "task of a tensor": "cut(); lorank.task_spectrum(tensor, y)",
    "task in batches": "t = lorank.TaskSpectrum(); t.update(x[:9], y[:9]); cut(); t.update(x[9:], y[9:])",
    "task without the last bytes": "cut(os.path.getsize('x.npy') - 8); lorank.task_spectrum(x, y)",
    "spectrum": "cut(); lorank.spectrum(x)",
    "spectrum without the last bytes": "cut(os.path.getsize('x.npy') - 8); lorank.spectrum(x)",
    "spectrum of a tensor": "cut(); lorank.spectrum(tensor)",
    "spectrum of columns": "cut(); lorank.spectrum(x[:, 3:5])",
    "spectrum of a transpose": "cut(); lorank.spectrum(x.T)",
    "analysis": "cut(); lorank.analyze({'w': x}, progress=False)",
    "analysis of a kernel": "v = x.reshape(200, 1000, 4, 4).transpose(1, 0, 3, 2); cut(); "
    "lorank.analyze({'w': v}, progress=False)",
    "extraction": "cut(); lorank.extract({'w.weight': y[:64, :4]}, {'w.weight': x[:64, :4]}, energy=0.9)",
}


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.standard_normal((200_000, 16)).astype(np.float32))
    np.save(tmp_path / "y.npy", rng.standard_normal((200_000, 4)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_mapped_array_of_a_shortened_file_raises(samples: Path, use: str) -> None:
    done = run(samples, SETUP + use)
    assert done.returncode == 1, done
    assert "FormatError" in done.stderr
    assert "x.npy" in done.stderr
    assert "was cut off" in done.stderr


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_a_shortened_pickle_raises(tmp_path: Path, size: int) -> None:
    torch.save({f"l{i}.weight": torch.randn(300, 300) for i in range(4)}, tmp_path / "m.bin")
    code = f"""
import os, lorank
source = lorank.sources.open_source('m.bin')
loaded = [matrix.load() for matrix in source.matrices]
os.truncate('m.bin', {size})
for read in (lambda: lorank.analyze(source, progress=False), loaded[3].to_array):
    try:
        read()
    except lorank.FormatError as error:
        print(error)
"""
    done = run(tmp_path, code)
    assert done.returncode == 0, done
    first, second = done.stdout.splitlines()
    assert "m.bin: was changed after it was opened" in first
    assert "m.bin: was cut off" in second


def test_a_replaced_pickle_raises(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(30, 30)}, tmp_path / "m.bin")
    source = open_source(tmp_path / "m.bin")
    torch.save({"a.weight": torch.randn(30, 30)}, tmp_path / "n.bin")
    (tmp_path / "n.bin").replace(tmp_path / "m.bin")
    with pytest.raises(lorank.FormatError, match=r"m\.bin: was changed after it was opened"):
        lorank.analyze(source, progress=False)


def views(x: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "whole": x,
        "transposed": x.T,
        "rows": x[3:40],
        "columns": x[:, 2:5],
        "steps": x[::3, ::2],
        "reversed": x[::-1, ::-1],
        "one row": x[5:6],
        "one column": x[:, 5:6],
        "one element": x[4:5, 6:7],
        "repeated": np.broadcast_to(x[:1], x.shape),
        "kernel": x.reshape(10, 4, 5, 10).transpose(1, 3, 0, 2),
        "empty": x[:0],
    }


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "dtype", [">f4", "<f4", "f8", "f2", "i1", "u2", "i8", "bool", "c8", "S3", "M8[s]"], ids=str
)
def test_mapped_arrays_have_the_values_of_the_file(tmp_path: Path, dtype: str, order: str) -> None:
    values = (np.random.default_rng(0).standard_normal((40, 50)) * 50).astype("i1")
    values = np.asarray(values.astype(dtype), order="C" if order == "C" else "F")
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for name, view in views(mapped).items():
        expected = views(values)[name]
        copy = unmapped(view)
        np.testing.assert_array_equal(copy, expected, err_msg=name)
        if view.size:
            assert not np.shares_memory(copy, mapped), name
        if view.ndim == 2 and view.dtype.kind == "f" and view.size:
            np.testing.assert_array_equal(arrays.matrix(view).to_array(), expected, err_msg=name)


def test_an_array_that_owns_its_memory_is_not_copied() -> None:
    x = np.ones((40, 50))
    for view in views(x).values():
        assert unmapped(view) is view
        assert _core.copy_mapped(view) is None
    tensor = torch.ones(40, 50).numpy()
    assert unmapped(tensor) is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_mapped_tensors_have_the_spectra_of_their_copies(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(60, 40).to(dtype)
    fused = torch.randn(90, 40).to(dtype)
    kernel = torch.randn(8, 6, 3, 3).to(dtype)
    tensors = {
        "a.weight": weight,
        "b.weight": weight.T,
        "q.weight": fused[:30],
        "k.weight": fused[30:60],
        "conv.weight": kernel,
        "last.weight": kernel.transpose(2, 3),
    }
    torch.save(tensors, tmp_path / "m.bin")
    report = lorank.analyze(tmp_path / "m.bin", progress=False, keep_eigenvalues=True)
    expected = lorank.analyze(tensors, progress=False, keep_eigenvalues=True)
    assert [row.name for row in report] == [row.name for row in expected]
    for row, other in zip(report, expected, strict=True):
        np.testing.assert_array_equal(row.eigenvalues, other.eigenvalues, err_msg=row.name)
