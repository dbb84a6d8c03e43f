"""Ranks in Trainer's logs and in lora_ranks.csv."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorank.training import GardCallback
from tests.support.dynamic_training import OPTIONS, TRAINED, Run, llama, size_of, trainer
from tests.support.lora_layers import ranks


class Reporter(transformers.TrainerCallback):
    """Records logs before all other callbacks, as TensorBoard's callback does."""

    seen: list[tuple[int, dict[str, Any]]]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        type(self).seen = []

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_ranks_appear_in_every_log_of_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda _: [Reporter])
    sizes: dict[int, dict[str, float]] = {}

    class Counter(transformers.TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            found = ranks(kwargs["model"]).values()
            sizes[state.global_step] = {
                "lora_rank_mean": sum(found) / len(found),
                "lora_rank_min": min(found),
                "lora_rank_max": max(found),
                "lora_parameters": size_of(kwargs["model"]),
            }
            by_module = {f"lora_rank/{name}": rank for name, rank in ranks(kwargs["model"]).items()}
            sizes[state.global_step] |= by_module

    model, gard = llama(), GardCallback(**OPTIONS)
    settings = {"eval_strategy": "steps", "eval_steps": 9, "disable_tqdm": disable_tqdm}
    run = trainer(model, tmp_path, gard, Counter(), **settings)
    names = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert names.index("Reporter") < names.index("GardCallback")
    run.train()
    assert (
        len(Reporter.seen) == TRAINED + 3 + 1
    )  # Steps, evaluations (including one after the last step), and the summary.
    assert len({size["lora_parameters"] for size in sizes.values()}) > 1
    for step, logs in Reporter.seen:
        assert {key: logs[key] for key in sizes[step]} == sizes[step]
    assert len(run.state.log_history) == len(Reporter.seen)
    for (step, logs), entry in zip(Reporter.seen, run.state.log_history, strict=True):
        line = {key: value for key, value in logs.items() if not key.startswith("lora_rank/")}
        assert len(line) == len(logs) - 14
        assert entry == line | {"step": step}
    printed = "".join(capsys.readouterr())
    assert printed.count("lora_rank_mean") == len(Reporter.seen)
    assert "lora_rank/" not in printed
    # All callbacks are still there, each once.
    run.train()
    found = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert sorted(found) == sorted([*names, "ReadableConsole"])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "lora_ranks.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_lists_every_change_of_the_current_run_only(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = full_run
    expected = [
        {
            "step": str(update.step),
            "module": row.name,
            "rank": str(update.ranks[row.module]),
            "effective_rank": str(row.effective_rank),
            "error": str(update.changes[row.module].error if row.module in update.changes else 0.0),
        }
        for update in run.updates
        for row in update.report
    ]
    assert len(expected) == 3 * 14
    assert table(folder) == expected
    # Shorter, then longer runs in the same folder.
    shutil.copy(folder / "lora_ranks.csv", tmp_path)
    Run(tmp_path, max_steps=7)
    assert table(tmp_path) == expected[:14]
    Run(tmp_path, max_steps=4)
    assert table(tmp_path) == []
    Run(tmp_path, max_steps=13)
    assert {row["step"] for row in table(tmp_path)} == {"6", "12"}
