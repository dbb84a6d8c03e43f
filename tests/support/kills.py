"""Processes that are killed at every step of a write, or at random moments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorank._internal.folder_view import MARK
from lorank._internal.hidden import is_hidden_name

# The program forks a child for each line of its input, "STEP SECONDS FOLDER". The child calls `work(folder)`.
# It is killed before its STEP-th system call that changes files, as far as Python or the core's functions
# make it, or after SECONDS.
_PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import lorank
from lorank import _core
EVENTS = {{
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown",
    "tests.core",
}}
inside = ""
# Commands print to standard output.
statuses = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

def audited(call):
    def wrapped(*arguments):
        sys.audit("tests.core", inside)
        result = call(*arguments)
        sys.audit("tests.core", inside)
        return result
    return wrapped

for name in ("exchange", "write_safetensors"):
    setattr(_core, name, audited(getattr(_core, name)))
{work}
for line in sys.stdin:
    step, seconds, inside = line.rstrip("\\n").split(" ", 2)
    child = os.fork()
    if not child:
        left = int(step)
        def step_of(event, arguments):
            global left
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if event in EVENTS and not reads and any(inside in str(x) for x in arguments):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
        sys.addaudithook(step_of)
        try:
            work(Path(inside))
        except SystemExit as error:
            os._exit(error.code or 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if float(seconds):
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=statuses, flush=True)
"""

Runner = Callable[..., int]

NEVER = 1 << 30
"""The number of a step that no run reaches."""


@contextmanager
def forked_runs(work: str) -> Iterator[Runner]:
    """Yield a function that runs `work(folder)`, kills it at a step or a time, and returns its exit status.

    Parameters
    ----------
    work
        Source of the function `work`, and of what it needs.
    """
    line = [sys.executable, "-c", _PROGRAM.format(work=work)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        into, out = server.stdin, server.stdout

        def run(folder: Path, step: int, seconds: float = 0.0) -> int:
            into.write(f"{step} {seconds} {folder}\n")
            into.flush()
            return int(out.readline())

        yield run
        into.close()


def kill_at_every_step(
    work: str, folder: Path, prepare: Callable[[], object], check: Callable[[], object], every: int = 1
) -> int:
    """Kill runs of `work(folder)` before each of their steps, and return the number of kills.

    Parameters
    ----------
    work
        Source of the function `work`.
    folder
        The folder that all changed files are in.
    prepare
        Function that is called before each run.
    check
        Function that is called after each killed run, and again after each further complete run.
    every
        Number of kills for each further complete run.
    """
    with forked_runs(work) as run:
        for step in range(1000):
            prepare()
            status = run(folder, step)
            if status == 0:
                return step
            assert status == -9
            check()
            if step % every == 0:
                assert run(folder, NEVER) == 0
                check()
    raise AssertionError("the work has more than 1000 steps")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder and its sub-folders, through links, without hidden files of lorank."""
    found = {}
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden_name(name)]
        for name in files:
            if not is_hidden_name(name) and name != MARK:
                path = Path(root, name)
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def leftovers(folder: Path) -> list[Path]:
    """Return hidden files and folders of lorank anywhere in a folder."""
    return [path for path in folder.rglob("*") if is_hidden_name(path.name) or path.name == MARK]
