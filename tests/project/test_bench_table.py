"""The table of benches warns of lower ratios, but not of times and small differences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).parents[2] / "benches" / "table.py"


def run(folder: Path, table: Path, *options: str) -> str:
    command = [sys.executable, str(table), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_only_ratios_that_fell_far_warn(tmp_path: Path) -> None:
    table = tmp_path / "table.py"
    table.write_text(TABLE.read_text())
    folder = tmp_path / "run"
    folder.mkdir()

    def write(ratio: float, seconds: float) -> None:
        row = {"work": "w", "against": "p", "lorank": seconds, "peer": seconds * ratio, "ratio": ratio}
        (folder / "a.json").write_text(json.dumps({"threads": 2, "rows": [row, {"work": "no ratio"}]}))

    write(4.0, 1.0)
    assert "| w | p | 1 s | 4 s | 4.00x |" in run(folder, table, "--keep")
    write(3.3, 50.0)
    assert "WARNING" not in run(folder, table)
    write(3.1, 0.1)
    assert "WARNING: slower than before: w against p: 3.10x, was 4.00x" in run(folder, table)
    (tmp_path / "ratios.json").unlink()
    assert "WARNING" not in run(folder, table)
