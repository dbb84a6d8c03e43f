"""Standard streams that are closed, full, broken or of another encoding: results and files are not lost."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorank
from tests.support.foreign_text import unprintable, write_adapter, write_model

COMMAND = [sys.executable, "-c", "import lorank.cli; lorank.cli.main()"]
NAME = "schicht.ä.[b]q"
# Control sequences of rich: colours, and those that draw a bar and show the cursor again.
SEQUENCE = re.compile(r"\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]|\r")
needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_model(folder / "m.safetensors", [NAME, "layers.0.q_proj"])
    write_model(folder / "large.safetensors", [f"layers.{i}.q_proj" for i in range(40)], (700, 800))
    write_adapter(folder / "a", ["layers.0.q_proj"])
    return folder


def run(folder: Path, *arguments: Any, env: dict[str, str] | None = None, **options: Any) -> Any:
    options = {"capture_output": True, **options}
    line = [*COMMAND, *arguments]
    return subprocess.run(
        line, cwd=folder, env={**os.environ, **(env or {})}, timeout=100, check=False, **options
    )


def closing(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_closed_streams(closed: tuple[int, ...], folder: Path) -> None:
    path = folder / f"closed{len(closed)}{closed[0]}.json"
    done = run(folder, "analyze", "m.safetensors", "-q", "-o", path, preexec_fn=closing(*closed))
    assert done.returncode == 0
    assert len(lorank.SpectralReport.load(path)) == 2
    assert b"Traceback" not in done.stderr
    assert b"saved" not in done.stdout


@needs_full_device
@pytest.mark.parametrize(
    "arguments",
    [
        ("analyze", "m.safetensors", "-q", "-o", "full.json"),
        ("allocate", "m.safetensors", "-q", "-o", "allocated", "--guess", "--json"),
        ("compress", "a", "-q", "-o", "compressed", "--avg-rank", "1"),
        ("family", "a", "-q", "-o", "family", "--avg-ranks", "1", "--json"),
        ("--version",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_full_output_is_named_and_files_are_written(arguments: tuple[str, ...], folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(folder, *arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"lorank: standard output: no space left on device"
    assert b"Traceback" not in done.stderr
    assert "-o" not in arguments or (folder / arguments[arguments.index("-o") + 1]).exists()


@needs_full_device
def test_messages_may_be_lost(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        for adapter, status in (("a", 0), ("missing", 1)):
            assert run(folder, "info", adapter, capture_output=False, stderr=full).returncode == status


@pytest.mark.parametrize("arguments", [("--json",), ()], ids=str)
def test_broken_pipe_ends_quietly(arguments: tuple[str, ...], folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    path = folder / f"broken{len(arguments)}.json"
    line = ("analyze", "m.safetensors", "-q", "-o", path, *arguments)
    done = run(folder, *line, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    assert len(lorank.SpectralReport.load(path)) == 2


@pytest.mark.parametrize(
    ("variables", "encoding", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "ascii", r"schicht.\xe4.[b]q"),
        ({"PYTHONIOENCODING": "ascii:strict"}, "ascii", r"schicht.\xe4.[b]q"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1", NAME),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii", r"schicht.\xe4.[b]q"),
        ({"PYTHONUTF8": "1"}, "utf-8", NAME),
    ],
    ids=str,
)
def test_encodings_of_terminals(variables: dict[str, str], encoding: str, shown: str, folder: Path) -> None:
    done = run(folder, "analyze", "m.safetensors", "-q", env=variables)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.decode(encoding).splitlines() if "6x8" in line]
    assert len({line.index("6x8") for line in lines}) == 1
    assert any(shown in line for line in lines)


def obey_signals() -> None:
    """Restore signals that a shell ignores for tests in the background, and that processes inherit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(
        self, folder: Path, *arguments: str, width: int = 100, env: dict[str, str] | None = None
    ) -> None:
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.environ.pop("COLUMNS", None)
            os.environ.update({"TERM": "xterm-256color", **(env or {})})
            obey_signals()
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.output = ""

    def read_until(self, text: str) -> None:
        """Read until a text is shown, or until the process ends."""
        read = b""
        while text not in read.decode("utf-8", "ignore"):
            if not (block := self._block()):
                break
            read += block
        self.output += read.decode()

    def _block(self) -> bytes:
        try:
            return os.read(self._terminal, 4096)
        except OSError:  # Linux reports the end of the process as an error.
            return b""

    def end(self) -> int:
        """Read the rest; return the exit status."""
        self.read_until("\0")
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.parametrize(
    ("width", "variables"),
    [
        (100, {}),
        (1, {}),
        (0, {}),
        (80, {"COLUMNS": "1"}),
        (80, {"TERM": "unknown", "NO_COLOR": "1"}),
    ],
    ids=str,
)
def test_terminals(width: int, variables: dict[str, str], folder: Path) -> None:
    terminal = Terminal(folder, "analyze", "m.safetensors", width=width, env=variables)
    assert terminal.end() == 0
    shown = SEQUENCE.sub("", terminal.output)
    assert NAME in shown.replace(" \n", "")
    assert not unprintable(shown)
    assert ("\x1b[" in terminal.output) == ("TERM" not in variables)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_with_one_line_and_a_cursor(number: signal.Signals, folder: Path) -> None:
    terminal = Terminal(folder, "analyze", "large.safetensors", "--threads", "1")
    terminal.read_until("analysing")
    os.kill(terminal.process, number)
    assert terminal.end() == 128 + number
    last = SEQUENCE.sub("", terminal.output).splitlines()[-1]
    assert last.endswith(
        "lorank: interrupted" if number == signal.SIGINT else f"lorank: ended by {number.name}"
    )
    assert "Traceback" not in terminal.output
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_interrupt_of_imports_prints_one_line(folder: Path) -> None:
    line = [sys.executable, "-c", IMPORTING]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, preexec_fn=obey_signals
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=100)
    assert (process.returncode, messages) == (130, b"lorank: interrupted\n")


# The import of numpy waits for the signal.
IMPORTING = """
import sys, time

class Slow:
    def find_spec(self, name, *_):
        if name == "numpy":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
import lorank.cli
"""


def test_ignored_signals_stay_ignored(folder: Path) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import lorank.cli, os\n"
    sending = "os.kill(os.getpid(), signal.SIGHUP); lorank.cli.main()"
    line = [sys.executable, "-c", ignoring + sending, "info", "a", "--json"]
    done = subprocess.run(line, capture_output=True, cwd=folder, check=False, timeout=100)
    assert done.returncode == 0
    assert json.loads(done.stdout)["format"]
