"""The order of Trainer's callbacks once `GardCallback` is among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lorank.training import GardCallback
from tests.support import tiny_models


class Tracker(transformers.TrainerCallback):  # type: ignore[misc]
    """Counts its events and keeps the logs."""

    def __init__(self) -> None:
        self.starts = 0
        self.logs: list[dict[str, Any]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.starts += 1

    def on_log(self, *_: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


class Console(transformers.ProgressCallback):  # type: ignore[misc]
    """Counts its starts."""

    starts = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts += 1
        super().on_train_begin(*args, **kwargs)


class Logged(GardCallback):
    """Calls the callback's event from one of its own."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)


def trainer_of(folder: Path, *callbacks: Any) -> Any:
    model = get_peft_model(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    ids = torch.arange(8)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=False,
    )
    run = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
    run.remove_callback(transformers.ProgressCallback)
    for callback in callbacks:
        run.add_callback(callback)
    return run


@pytest.mark.parametrize("gard", [GardCallback, Logged])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_trackers_see_modules_ranks_wherever_they_were_added(
    gard: Any, order: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, console = Tracker(), Console()
    callbacks = [tracker, console, gard(interval=2, window=1)]
    run = trainer_of(tmp_path, *(callbacks[index] for index in order))
    run.train()
    assert len(tracker.logs) == 4  # Three steps, and the summary.
    assert all(sum(key.startswith("lora_rank/") for key in logs) == 4 for logs in tracker.logs)
    printed = "".join(capsys.readouterr())
    assert printed.count("lora_rank_mean") == 4
    assert "lora_rank/" not in printed
    assert tracker.starts == console.starts == 1
    names = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert names[0] == gard.__name__
    assert names[-2:] == ["ReadableConsole", "Console"]
    assert len(names) == len(set(names))


def test_two_trainers_keep_their_own_order(tmp_path: Path) -> None:
    """A callback that waits in another Trainer is moved in the one that calls it only."""
    gard, first, second = GardCallback(interval=2, window=1), Tracker(), Tracker()
    waiting = trainer_of(tmp_path / "waiting", first, gard)
    calling = trainer_of(tmp_path / "calling", second, gard)
    before = list(waiting.callback_handler.callbacks)
    calling.train()
    assert waiting.callback_handler.callbacks == before
    assert calling.callback_handler.callbacks[0] is gard
