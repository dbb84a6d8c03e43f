"""All long runs, two at a time, with a table of their results: ``python -m tests.soak``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.soak.calls import CALLS, is_flat
from tests.soak.kills import COMMANDS
from tests.soak.resources import RUNS

COUNT = 10_000
KILLS = 200
TIMES = {"full disk": 500, "16 threads": 10_000, "forks": 1_000}


class Run(NamedTuple):
    """A module of this package with its arguments."""

    module: str
    name: str
    times: int

    def result(self) -> str:
        """Return a line of the table, or raise AssertionError."""
        command = [sys.executable, "-m", f"tests.soak.{self.module}", self.name, str(self.times)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        seconds = time.monotonic() - begin
        if done.returncode:
            raise AssertionError(done.stderr.strip().splitlines()[-1])
        found = json.loads(done.stdout.splitlines()[-1])
        if self.module != "calls":
            return f"{', '.join(f'{count:,} {what}' for what, count in found.items())} in {seconds:.0f} s"
        first, last = found["first"], found["last"]
        line = f"{first['kib'] / 1024:.1f} to {last['kib'] / 1024:.1f} MiB, {last['files']} files"
        if not is_flat(first, last):
            raise AssertionError(f"{line}, from {first['files']}: not flat")
        return f"{self.times:,} calls: {line}, in {seconds:.0f} s"


def runs() -> list[Run]:
    """Return all runs, the long ones first."""
    calls = [Run("calls", name, COUNT) for name in reversed(CALLS)]
    kills = [Run("kills", name, KILLS) for name in COMMANDS]
    return calls + kills + [Run("resources", name, TIMES[name]) for name in RUNS]


def main() -> int:
    """Run everything and print a line for each run; return the number of failures."""
    failures = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        started = [(run, pool.submit(run.result)) for run in runs()]
        for run, future in started:
            try:
                line = future.result()
            except AssertionError as error:
                failures, line = failures + 1, f"FAILED: {error}"
            print(f"{run.name:36} {line}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
