"""A lack of memory is an error of the call, and not the end of the process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")

#: Address space in bytes beyond that of the interpreter with all imports.
LITTLE = 24 << 20

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
import lorank, lorank.cli
lorank.spectrum(np.eye(8), threads=1)
weight = np.random.default_rng(0).standard_normal((2000, 2200))
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
"""


def python(code: str, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED + code, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "RUST_BACKTRACE": "0"},
    )


def test_no_call_ends_the_process_under_any_limit() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.support.memory_limits", "--few"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("call", ["lorank.spectrum(weight)", "lorank.spectrum(weight, threads=4)"])
def test_error_names_the_purpose_and_smaller_calls_succeed(call: str) -> None:
    code = f"""
before = lorank.spectrum(weight[:64], threads=1)
resource.setrlimit(resource.RLIMIT_AS, (mapped + {LITTLE},) * 2)
for _ in range(10):
    try:
        {call}
    except MemoryError as error:
        print(error)
    after = lorank.spectrum(weight[:64], threads=1)
    assert before.tobytes() == after.tobytes()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("no memory for the ") and " bytes of " in line for line in lines), lines


def test_command_line_prints_one_line(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((2000, 2200))
    save_file({"model.layers.0.self_attn.q_proj.weight": weight}, tmp_path / "model.safetensors")
    code = f"""
resource.setrlimit(resource.RLIMIT_AS, (mapped + {LITTLE},) * 2)
sys.argv = ["lorank", "analyze", "model.safetensors", "-q"]
lorank.cli.main()
"""
    done = python(code, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "no memory for the " in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_memory_that_no_system_has_is_an_error(tmp_path: Path) -> None:
    """The header of a sparse file claims 400 GB."""
    side = 320_000
    header = b'{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}' % (side, side, 4 * side * side)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * side * side)
    code = """
resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30),) * 2)
try:
    lorank.analyze("model.safetensors", progress=False)
except MemoryError as error:
    print(error)
"""
    done = python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no memory for the 409600000000 bytes of tensor `w` of" in done.stdout, done.stdout


def test_header_parsing_without_memory_is_an_error(tmp_path: Path) -> None:
    values = b"[" + b"1," * 4_000_000 + b"1]"
    header = b'{"__metadata__":{"a":%s},"w":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}' % values
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    code = """
from lorank import _core
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[1]) * 2**20,) * 2)
try:
    print(_core.Checkpoint(Path("model.safetensors")).tensors())
except MemoryError as error:
    print(error)
"""
    for extra, expected in ((50, "no memory for the "), (300, "[('w', 'F32', [1, 1])]")):
        done = python(code, extra, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected), done.stdout
