"""Commands on damaged files: success, or one line that names the file, and never a traceback."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.report.test_damaged_files import mutations
from tests.support.command_line import assert_one_line
from tests.support.saved_results import FORMATS, WEIGHTS

# Name of the damaged file, and the commands that read it.
COMMANDS = {
    "report.json": [["report", "report.json"], ["allocate", "report.json", "--avg-rank", "4"]],
    "report.csv": [["report", "report.csv"], ["allocate", "report.csv", "--budget", "100"]],
    "report.parquet": [["report", "report.parquet", "--json"]],
    "gradients.json": [["allocate", "gradients.json", "-m", "gard", "--avg-rank", "4"]],
    "tasks.json": [["allocate", "tasks.json", "-m", "task", "--avg-rank", "4"]],
    "journal.jsonl": [["analyze", "model.safetensors", "--resume", "journal.jsonl", "-q"]],
    "samples.npz": [["task", "samples.npz", "-q"]],
    "lorank.json": [["info", "."], ["check", "."]],
    "adapter_config.json": [
        ["info", "."],
        ["check", "."],
        ["compress", ".", "--avg-rank", "1", "-o", "out", "--overwrite", "-q"],
    ],
}


@pytest.mark.parametrize("step", [397, pytest.param(3, marks=pytest.mark.slow)], ids=["some", "many"])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_damaged_files(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = next(saved for saved in FORMATS if saved.name == name)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    saved.write(path)
    content = path.read_bytes()
    for damaged in islice(mutations(name, content, 1000), 3, None, step):
        for command in COMMANDS[name]:
            path.write_bytes(damaged)
            assert_one_line(command)
