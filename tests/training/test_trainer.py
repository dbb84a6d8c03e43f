"""GardCallback in Trainer: precisions, accumulation, clipping, schedules and saved adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel

import lorank
from lorank.training import GardCallback
from tests.support.dynamic_training import (
    INTERVAL,
    OPTIONS,
    STEPS,
    TRAINED,
    WINDOW,
    Run,
    assert_same_updates,
    assert_same_weights,
    batch,
    evaluated,
    llama,
    moved,
    num_hooks,
    spectra,
    trainer,
)
from tests.support.lora_layers import ranks
from tests.support.optimizers import adamw


def test_ranks_change_and_the_loss_falls(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = full_run
    assert [update.step for update in run.updates] == [6, 12, 18]
    assert moved(run.updates)
    assert run.updates[-1].ranks == ranks(run.model)
    before, after = (trainer(model, tmp_path).evaluate() for model in (llama(), run.model))
    assert after["eval_loss"] < before["eval_loss"] - 0.1


def test_two_runs_with_one_seed_are_identical(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    again = Run(tmp_path)
    assert_same_updates(again.updates, full_run[0].updates)
    assert_same_weights(again.model, full_run[0].model)
    assert again.losses == full_run[0].losses
    other = Run(tmp_path, options={"seed": 1})
    with pytest.raises(AssertionError):
        assert_same_updates(other.updates, full_run[0].updates)


def test_accumulated_batches_give_the_spectra_of_one_large_batch(
    full_run: tuple[Run, Path], tmp_path: Path
) -> None:
    run = Run(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert run.updates[0].report.num_batches == WINDOW
    assert run.updates[0].ranks == full_run[0].updates[0].ranks
    for one, other in zip(spectra(run.updates[0]), spectra(full_run[0].updates[0]), strict=True):
        np.testing.assert_allclose(one / one.sum(), other / other.sum(), atol=2e-3)
    assert moved(run.updates)


def fp16(folder: Path, scaler: Any) -> tuple[list[Any], list[float]]:
    """Imitate Trainer under fp16, which it refuses on a CPU: Accelerate's optimizer holds the scaler."""
    model, gard = llama(), GardCallback(**OPTIONS)
    arguments = trainer(model, folder).args  # This initialises the state of Accelerate.
    optimizer = AcceleratedOptimizer(adamw(model), scaler=scaler)
    state = transformers.TrainerState(max_steps=TRAINED)
    gard.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
    scales = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch(step)).loss
        scales.append(1.0 if scaler is None else scaler.get_scale())
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        gard.on_step_end(arguments, state, None)
    gard.on_train_end(arguments, state, None)
    return gard.history, scales


def test_fp16_gradients_are_divided_by_the_scale_of_trainers_optimizer(tmp_path: Path) -> None:
    expected, _ = fp16(tmp_path / "plain", None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    updates, scales = fp16(tmp_path / "scaled", scaler)
    assert len(set(scales[INTERVAL - WINDOW : INTERVAL])) > 1
    assert moved(updates)
    for one, other in zip(expected, updates, strict=True):
        np.testing.assert_allclose(spectra(other), spectra(one), rtol=0.1, atol=0.02 * spectra(one).max())
    np.testing.assert_allclose(spectra(updates[0]), spectra(expected[0]), rtol=0.02, atol=1e-4)


def test_trainer_passes_the_optimizer_of_accelerate(tmp_path: Path) -> None:
    """Accelerate's optimizer holds the gradient scaler."""
    seen = []

    class Seen(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            seen.append(kwargs["optimizer"])

    trainer(llama(), tmp_path, Seen(), max_steps=1).train()
    assert isinstance(seen[0], AcceleratedOptimizer)
    assert hasattr(seen[0], "scaler")


class Norms(transformers.TrainerCallback):
    """Records the norm and the number of all gradients before each optimizer step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.count: list[int] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.requires_grad]
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        self.count.append(sum(g.numel() for g in gradients))


def test_gradients_of_all_ranks_are_clipped(tmp_path: Path) -> None:
    norms = Norms()
    run = Run(tmp_path, norms, max_grad_norm=0.05)
    assert moved(run.updates)
    assert norms.norms == pytest.approx([0.05] * TRAINED, rel=1e-3)
    assert norms.count[6] == run.updates[0].num_parameters > norms.count[5]
    logged = [entry["grad_norm"] for entry in run.trainer.state.log_history if "grad_norm" in entry]
    assert min(logged) > 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_count_once(full_run: tuple[Run, Path], tmp_path: Path, reentrant: bool) -> None:
    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    run = Run(tmp_path, **settings)
    for one, other in zip(run.updates, full_run[0].updates, strict=True):
        assert one.ranks == other.ranks
        np.testing.assert_allclose(spectra(one), spectra(other), rtol=1e-3, atol=1e-5 * spectra(one).max())
    assert run.losses == pytest.approx(full_run[0].losses, rel=1e-4)


def test_bfloat16_training_changes_ranks(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    run = Run(tmp_path, bf16=True)
    assert moved(run.updates)
    one, other = spectra(run.updates[0]), spectra(full_run[0].updates[0])
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one.sum(1), other.sum(1), rtol=0.1)
    assert run.losses == pytest.approx(full_run[0].losses, rel=0.1)


def test_learning_rate_schedule_is_unaffected(tmp_path: Path) -> None:
    run = Run(tmp_path, lr_scheduler_type="cosine", warmup_steps=3)
    assert moved(run.updates)
    rates = [entry["learning_rate"] for entry in run.trainer.state.log_history if "learning_rate" in entry]
    # Each log has the rate of its step.
    expected = [
        step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / (TRAINED - 3))) / 2
        for step in range(TRAINED)
    ]
    assert rates == pytest.approx([0.01 * rate for rate in expected], abs=1e-9)


def test_trained_adapter_is_saved_and_loaded(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    model = full_run[0].model
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().unload(), tmp_path)
    assert ranks(again) == ranks(model)
    assert len(set(ranks(again).values())) > 1
    torch.testing.assert_close(evaluated(again)[0], evaluated(model)[0], rtol=0, atol=1e-6)
    assert lorank.LoraAdapter.load(tmp_path).ranks == ranks(model)
    # Each checkpoint of the run has the ranks of its step.
    adapter = lorank.LoraAdapter.load(full_run[1] / "checkpoint-7")
    assert adapter.ranks == full_run[0].updates[0].ranks


def test_evaluations_do_not_affect_training(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    run = Run(tmp_path, eval_strategy="steps", eval_steps=1)
    assert sum("eval_loss" in entry for entry in run.trainer.state.log_history) == TRAINED
    assert_same_updates(run.updates, full_run[0].updates)
    assert_same_weights(run.model, full_run[0].model)


class Failing(transformers.TrainerCallback):
    """Raises once, inside a window."""

    failed = False

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 4 and not self.failed:
            self.failed = True
            raise RuntimeError("out of luck")


def test_training_after_a_failed_one_leaves_no_hooks(tmp_path: Path) -> None:
    model, gard = llama(), GardCallback(**OPTIONS)
    run = trainer(model, tmp_path, gard, Failing())
    with pytest.raises(RuntimeError, match="out of luck"):
        run.train()
    run.train()
    assert num_hooks(model) == 0
    assert [update.step for update in gard.history] == [6, 12, 18]


def test_load_best_model_at_end_is_refused(tmp_path: Path) -> None:
    """The best checkpoint has other ranks than the last one, so Trainer is stopped before training."""
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    run = trainer(llama(), tmp_path, GardCallback(**OPTIONS), load_best_model_at_end=True, **settings)
    with pytest.raises(NotImplementedError, match="load_best_model_at_end"):
        run.train()
    assert run.state.global_step == 0


def test_training_without_any_change_warns(tmp_path: Path) -> None:
    callback = GardCallback(**OPTIONS)
    with pytest.warns(
        UserWarning, match="training ends at step 5, and the first change would be after step 6"
    ):
        trainer(llama(), tmp_path, callback, max_steps=5).train()
    assert callback.history == []


@pytest.mark.parametrize(("freeze_after", "steps"), [(None, [6, 12]), (6, [6]), (18, [6, 12])])
def test_ranks_stay_at_the_last_step(tmp_path: Path, freeze_after: int | None, steps: list[int]) -> None:
    """Ranks that are new at the last step would never be trained."""
    run = Run(tmp_path, options={"freeze_after": freeze_after}, max_steps=18)
    assert [update.step for update in run.updates] == steps
    with pytest.warns(
        UserWarning, match="training ends at step 6, and the first change would be after step 6"
    ):
        assert not Run(tmp_path, max_steps=6).updates


def test_numpy_integers_are_accepted_as_options(full_run: tuple[Run, Path], tmp_path: Path) -> None:
    options = {name: np.int64(OPTIONS[name]) for name in ("budget", "interval", "window", "r_max", "sketch")}
    run = Run(tmp_path, options=options, save_strategy="steps", save_steps=6)
    assert_same_updates(run.updates, full_run[0].updates)
    state = "checkpoint-6/lorank_gard.safetensors"
    assert (tmp_path / state).read_bytes() == (full_run[1] / state).read_bytes()
