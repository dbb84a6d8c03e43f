"""Runs of Trainer that resume from a checkpoint, and checkpoints that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lorank
from lorank.training import DynamicRanks, GardCallback, restore_ranks
from tests.support.dynamic_training import (
    OPTIONS,
    Run,
    assert_same_updates,
    assert_same_weights,
    llama,
    num_hooks,
    trainer,
)
from tests.support.optimizers import adamw


# Within the first window, at a change, between windows, within a later window, at the next change.
@pytest.mark.parametrize("step", [4, 6, 7, 11, 12])
def test_resumed_run_equals_an_uninterrupted_one(
    full_run: tuple[Run, Path], tmp_path: Path, step: int
) -> None:
    run, folder = full_run
    checkpoint = tmp_path / f"checkpoint-{step}"
    shutil.copytree(folder / checkpoint.name, checkpoint)
    # The run was interrupted after its last checkpoint.
    shutil.copy(folder / "lora_ranks.csv", tmp_path)
    model, gard = llama(), GardCallback(**OPTIONS)
    restore_ranks(model, checkpoint)
    resumed = trainer(model, tmp_path, gard)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_updates(gard.history, [update for update in run.updates if update.step > step])
    assert_same_weights(model, run.model)
    assert num_hooks(model) == 0
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    logs = [
        [{k: v for k, v in entry.items() if k not in timed} for entry in t.state.log_history]
        for t in (resumed, run.trainer)
    ]
    assert logs[0] == logs[1]
    assert (tmp_path / "lora_ranks.csv").read_bytes() == (folder / "lora_ranks.csv").read_bytes()


def test_run_resumes_from_a_checkpoint_in_another_folder(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = full_run
    checkpoint = folder / "checkpoint-10"
    model, gard = llama(), GardCallback(**OPTIONS, checkpoint=checkpoint)
    restore_ranks(model, checkpoint)
    trainer(model, tmp_path, gard).train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(model, run.model)
    model = llama()
    restore_ranks(model, checkpoint)
    lost = trainer(model, tmp_path, GardCallback(**OPTIONS))
    with pytest.raises(
        ValueError, match=r"resumes at step 10, but .* holds no lorank_gard\.safetensors: pass"
    ):
        lost.train(resume_from_checkpoint=str(checkpoint))
    assert num_hooks(model) == 0


def test_resuming_with_other_ranks_raises(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    checkpoint = full_run[1] / "checkpoint-7"
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(llama(), tmp_path, GardCallback(**OPTIONS)).train(resume_from_checkpoint=str(checkpoint))
    model = llama()
    restore_ranks(model, checkpoint)
    state = DynamicRanks(model, adamw(model), **OPTIONS).state_dict()
    other = DynamicRanks(llama(), adamw(model), **OPTIONS)
    with pytest.raises(ValueError, match=r"call restore_ranks\(model, checkpoint\)"):
        other.load_state_dict(state)


def rewritten(path: Path, change: Any) -> None:
    """Change the header and the tensors of a state file."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lorank.gard"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    change(header, tensors)
    save_file(tensors, path, {"lorank.gard": json.dumps(header)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"garbage" * 9),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: save_file({"none": torch.zeros(1)}, path),
        lambda path: save_file({"none": torch.zeros(1)}, path, {"lorank.gard": "[]"}),
        lambda path: rewritten(path, lambda _, tensors: tensors.pop("0.3")),
        lambda path: rewritten(path, lambda header, _: header.pop("step")),
        lambda path: rewritten(path, lambda header, _: header.pop("ranks")),
        lambda path: rewritten(path, lambda header, _: header.update(step="ten")),
        lambda path: rewritten(path, lambda header, _: header.update(sketches=[3, 3])),
        lambda path: rewritten(path, lambda _, tensors: tensors.update({"0.3": torch.zeros(3, 3)})),
    ],
    ids=[
        "garbage",
        "truncated",
        "no header",
        "another header",
        "missing tensor",
        "no step",
        "no ranks",
        "step as text",
        "fewer modules",
        "another shape",
    ],
)
def test_damaged_state_raises(full_run: tuple[Run, Path], tmp_path: Path, damage: Any) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(full_run[1] / "checkpoint-10", checkpoint)
    damage(checkpoint / "lorank_gard.safetensors")
    model = llama()
    restore_ranks(model, checkpoint)
    run = trainer(model, tmp_path, GardCallback(**OPTIONS))
    with pytest.raises(
        lorank.FormatError, match=r"lorank_gard.safetensors: not a saved state of GardCallback"
    ):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert num_hooks(model) == 0


def test_resuming_an_open_window_with_another_sketch_size_raises(
    full_run: tuple[Run, Path], tmp_path: Path
) -> None:
    checkpoint = full_run[1] / "checkpoint-10"
    model = llama()
    restore_ranks(model, checkpoint)
    run = trainer(model, tmp_path, GardCallback(**OPTIONS | {"sketch": 8, "checkpoint": checkpoint}))
    with pytest.raises(ValueError, match="sketch"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 10  # No further step was made.


def test_resumed_run_keeps_its_initial_budget(tmp_path: Path) -> None:
    """The default budget is the size of the adapter at the start of the first run."""
    options = OPTIONS | {"budget": None}
    run = Run(tmp_path, options=options, save_strategy="steps", save_steps=12)
    assert run.updates[1].num_parameters < 3712
    checkpoint = tmp_path / "checkpoint-12"
    model, gard = llama(), GardCallback(**options)
    restore_ranks(model, checkpoint)
    trainer(model, tmp_path, gard).train(resume_from_checkpoint=str(checkpoint))
    assert_same_updates(gard.history, run.updates[2:])
    assert_same_weights(model, run.model)
