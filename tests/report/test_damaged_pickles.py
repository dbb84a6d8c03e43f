"""Damaged pickles of results: an exception of Python, and never the end of the process.

A pickle can run any code, so that pickles from elsewhere must not be loaded at all.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_pickles import RESULTS

# Loads damaged copies of the pickle at argv[1] and uses what was loaded; argv[2] is the number of copies.
_PROGRAM = """
import contextlib, pathlib, pickle, resource, sys
from tests.support.mutations import byte_mutations
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
content = pathlib.Path(sys.argv[1]).read_bytes()
loaded = 0
for damaged in byte_mutations(content, 3, int(sys.argv[2])):
    with contextlib.suppress(Exception):
        result = pickle.loads(damaged)
        loaded += 1
        repr(result), result == result, result.to_json()
print("ended", loaded)
"""


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", RESULTS)
def test_damaged_pickles_end_with_an_exception(
    make: Callable[[Path], Any], count: int, tmp_path: Path
) -> None:
    (tmp_path / "result.pickle").write_bytes(pickle.dumps(make(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path / "result.pickle"), str(count)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("ended")
