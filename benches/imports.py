"""Time of `import lorank` after `import numpy`: ``python -m benches.imports``. The limit is 0.1 s."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from time import perf_counter
start = perf_counter()
import numpy
middle = perf_counter()
import lorank
print(middle - start, perf_counter() - middle)
"""
HEAVY = ("torch", "transformers", "peft", "pandas", "pyarrow", "plotly", "huggingface_hub", "rich", "typer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file for the numbers as JSON")
    arguments = parser.parse_args()
    runs = [
        [
            float(x)
            for x in subprocess.run(
                [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        for _ in range(arguments.repeats)
    ]
    numpy_seconds, lorank_seconds = (statistics.median(column) for column in zip(*runs, strict=True))
    probe = f"import lorank, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    ).stdout.split()
    print(f"import numpy {numpy_seconds * 1e3:.0f} ms, import lorank on top {lorank_seconds * 1e3:.0f} ms")
    print(f"heavy modules loaded with lorank: {', '.join(loaded) or 'none'}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"numpy": numpy_seconds, "lorank": lorank_seconds, "heavy": loaded})
        )


if __name__ == "__main__":
    main()
