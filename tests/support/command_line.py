"""The installed command line tool, run in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
