"""The installed command line tool, run in a new process."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from lorank.cli import main

EXECUTABLE = Path(sys.executable).with_name("lorank")


def run(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run lorank in a folder with any exit status."""
    return subprocess.run(
        [str(EXECUTABLE), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=folder
    )


def ok(*arguments: object) -> str:
    """Return the standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def outcome(*arguments: object) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of lorank, run in this process."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(out),
        redirect_stderr(errors),
        patch.object(sys, "argv", ["lorank", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), errors.getvalue()


def assert_one_line(arguments: Sequence[object], *named: object) -> int:
    """Run lorank, which must succeed or end with one line about the input, and return the exit status.

    Usage errors are framed by several lines. The line must contain the given names.
    """
    status, out, errors = outcome(*arguments)
    allowed = (0, 1, 2, 3) if arguments and arguments[0] == "verify" else (0, 1, 2)
    assert status in allowed, (arguments, status, errors)
    assert "Traceback" not in out + errors, (arguments, errors)
    assert "internal error" not in errors, (arguments, errors)
    if status in (1, 3):
        last = errors.splitlines()[-1]
        assert last.startswith("lorank: "), (arguments, errors)
        assert all(str(name) in last for name in named), (arguments, last)
    return status
