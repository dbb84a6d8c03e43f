"""Dynamic GARD in `transformers.Trainer`."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorank._core import FormatError
from lorank._internal.atomic import atomic_path
from lorank.allocation.budget import Budget
from lorank.training import rank_logs
from lorank.training.dynamic_ranks import DynamicRanks, RankUpdate, check_options

_STATE = "lorank_gard.safetensors"
_TABLE = "lora_ranks.csv"
_COLUMNS = ["step", "module", "rank", "effective_rank", "error"]


class GardCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the ranks of a LoRA model by its gradients while `transformers.Trainer` trains it.

    Ranks change between steps; the model computes what it computed, and optimizer, scheduler and
    gradient scaler go on. What Trainer logs is extended by ``lora_rank_mean``, ``lora_rank_min``,
    ``lora_rank_max`` and ``lora_parameters``; trackers (TensorBoard, W&B and their like) also get
    ``lora_rank/MODULE`` for every module, which are kept off the console. Every change is a table in
    ``lora_ranks.csv`` of the output folder and an entry of `history`. Nothing changes after the last step
    of the training: new ranks would never be trained.

    Parameters
    ----------
    budget, interval, window, r_min, r_max, energy, sketch, smoothing, max_change, warmup, freeze_after
        As in `DynamicRanks`.
    adapter_name, seed
        As there.
    checkpoint
        Where a resumed run comes from, if that is not ``checkpoint-STEP`` in the output folder.

    Attributes
    ----------
    history
        Every change that this object made, a list of `RankUpdate`: its `step`, `ranks`, `report` of the
        gradients, `changes` (``history[-1].changes[name].error``) and `num_parameters`. Those of a run
        that was resumed are in ``lora_ranks.csv``.

    Raises
    ------
    ValueError
        When training begins, as `DynamicRanks`; or if the folder that a run resumes from holds no state of
        this callback.
    FormatError
        When a resumed training begins, if that state is damaged or of another step.
    NotImplementedError
        When training begins, under FSDP, DeepSpeed, torch.compile and DataParallel; after the first step,
        if the optimizer's state cannot follow a change of rank.

    Notes
    -----
    Source: GARD, dynamic variant. To resume, call ``restore_ranks(model, checkpoint)`` before
    ``Trainer.train(resume_from_checkpoint=checkpoint)``: Trainer loads the adapter before any callback
    runs, and without it fails with a RuntimeError ("size mismatch") if ranks had changed.
    """

    def __init__(
        self,
        *,
        budget: Budget | None = None,
        interval: int = 100,
        window: int = 16,
        r_min: int = 1,
        r_max: int = 64,
        energy: float = 0.9,
        sketch: int | None = 128,
        smoothing: float = 0.5,
        max_change: int | None = 4,
        warmup: int = 0,
        freeze_after: int | None = None,
        adapter_name: str = "default",
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> None:
        # Now, not when the model has been loaded and training begins.
        check_options(r_min, r_max, interval, window, smoothing, max_change, warmup, freeze_after)
        self._options: dict[str, Any] = {
            "budget": budget,
            "interval": interval,
            "window": window,
            "r_min": r_min,
            "r_max": r_max,
            "energy": energy,
            "sketch": sketch,
            "smoothing": smoothing,
            "max_change": max_change,
            "warmup": warmup,
            "freeze_after": freeze_after,
            "adapter_name": adapter_name,
            "seed": seed,
        }
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._dynamic: DynamicRanks | None = None
        self.history: list[RankUpdate] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model, take up a resumed run, and watch the first window."""
        _check_arguments(args)
        optimizer = kwargs["optimizer"]
        self._dynamic = DynamicRanks(
            kwargs["model"], optimizer, scaler=getattr(optimizer, "scaler", None), **self._options
        )
        # After the last step new ranks would never be trained.
        self._dynamic.freeze(state.max_steps - 1)
        if state.max_steps <= self._dynamic.first_change:
            warnings.warn(
                f"ranks will never change: training ends at step {state.max_steps}, and the first change "
                f"would be after step {self._dynamic.first_change}: take a smaller interval",
                stacklevel=2,
            )
        rank_logs.go_first(self)
        if state.global_step > 0:
            _load(self._dynamic, self._state_file(args, state), state.global_step)
        if state.is_world_process_zero:
            _forget_later_rows(Path(args.output_dir) / _TABLE, state.global_step)
        self._dynamic.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Count the step, and change ranks if it is time."""
        if self._dynamic is None:
            return
        update = self._dynamic.step()
        if update is not None:
            self.history.append(update)
            if state.is_world_process_zero:
                _append_table(Path(args.output_dir) / _TABLE, update)

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the ranks to what is logged."""
        logs = kwargs.get("logs")
        if self._dynamic is None or logs is None:
            return
        ranks = self._dynamic.ranks
        summary = rank_logs.summary(ranks, self._dynamic.num_parameters)
        logs.update(summary | rank_logs.by_module(ranks))
        # Which is saved with every checkpoint: the modules' ranks are in the table.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(summary)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Put beside a checkpoint what resuming from it needs."""
        if self._dynamic is None:
            return
        content = self._dynamic.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            _save(content, folder / _STATE)

    def on_train_end(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Take the hooks off the model."""
        if self._dynamic is not None:
            self._dynamic.close()

    def _state_file(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self._checkpoint or args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, (str, Path)) else []
        folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        for folder in folders:
            if (folder / _STATE).exists():
                return folder / _STATE
        raise ValueError(
            f"the run resumes at step {state.global_step}, but {folders[0]} holds no {_STATE}: pass "
            "GardCallback(checkpoint=...), the folder that the run comes from"
        )


def _check_arguments(args: TrainingArguments) -> None:
    for option, name in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed"), ("torch_compile", "torch.compile")):
        if getattr(args, option, None):
            raise NotImplementedError(
                f"TrainingArguments({option}=...): ranks cannot be changed under {name}, which remembers "
                "the shapes of parameters; use profile_gradients and static ranks"
            )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"{args.n_gpu} devices in one process: Trainer would copy the model to each of them for every "
            "batch (DataParallel), and copies cannot be watched: start one process per device (torchrun "
            f"--nproc-per-node={args.n_gpu}), or show it one device (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.load_best_model_at_end:
        raise NotImplementedError(
            "TrainingArguments(load_best_model_at_end=True): Trainer cannot load a checkpoint with other "
            "ranks than the last; take the best checkpoint's folder with PeftModel.from_pretrained"
        )


def _forget_later_rows(path: Path, step: int) -> None:
    """Drop what another run, or this one before it was cut off, wrote for steps that are yet to come."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = [*csv.reader(file)] or [_COLUMNS]
    kept = [row for row in rows if row and row[0].isdecimal() and int(row[0]) <= step]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])


def _append_table(path: Path, update: RankUpdate) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(_COLUMNS)
        for row in update.report:
            change = update.changes.get(row.name)
            error = change.error if change is not None else 0.0
            writer.writerow([update.step, row.name, update.ranks[row.name], row.effective_rank, error])


def _save(content: dict[str, Any], path: Path) -> None:
    tensors = {
        f"{batch}.{index}": sketch.contiguous()
        for batch, sketches in enumerate(content["sketches"])
        for index, sketch in enumerate(sketches)
    }
    counts = [len(sketches) for sketches in content["sketches"]]
    header = content | {"sketches": counts}
    with atomic_path(path) as temporary:
        # The format wants one tensor at least.
        save_file(tensors or {"none": torch.zeros(1)}, temporary, {"lorank.gard": json.dumps(header)})


def _load(dynamic: DynamicRanks, path: Path, step: int) -> None:
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["lorank.gard"])
            state["sketches"] = [
                [file.get_tensor(f"{batch}.{index}") for index in range(count)]
                for batch, count in enumerate(state["sketches"])
            ]
    except Exception as error:  # safetensors has an exception of its own that derives from none
        raise FormatError(f"{path}: is no saved state of GardCallback: {error}") from error
    try:
        dynamic.load_state_dict(state)
    except FormatError as error:
        raise FormatError(f"{path}: is no saved state of GardCallback: {error}") from error
    if dynamic.steps != step:
        dynamic.close()
        raise FormatError(f"{path}: was saved at step {dynamic.steps}, the run resumes at step {step}")
