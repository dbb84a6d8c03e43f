"""Dynamic rank allocation [GARD] in `transformers.Trainer`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Unpack

from lorank._core import FormatError
from lorank._internal.short_text import counted
from lorank.training import rank_logs
from lorank.training.dynamic_ranks import DynamicRanks, RankUpdate
from lorank.training.options import GardArguments, GardOptions, lists_options
from lorank.training.rank_table import RankTable
from lorank.training.state import STATE_FILE, read_state, write_state


class GardCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Dynamic rank allocation [GARD] for a LoRA model that `transformers.Trainer` trains.

    Ranks change between steps. The model computes the same function afterwards, except for the directions
    that shrinking drops. Optimizer, scheduler and gradient scaler keep their state. No rank changes after the
    last step of the training.

    Every change is appended to ``lora_ranks.csv`` in the output folder and to `history`. The logs of Trainer
    get ``lora_rank_mean``, ``lora_rank_min``, ``lora_rank_max`` and ``lora_parameters``. Trackers
    (TensorBoard, W&B and others) also get ``lora_rank/MODULE`` for each module; the console does not.

    Parameters
    ----------
    **options
        The fields of `lorank.training.options.GardOptions`: budget, interval, window, r_min, r_max, energy,
        sketch, smoothing, max_change, warmup, freeze_after, adapter_name, seed.
    checkpoint
        Folder of the checkpoint from which a run resumes, if it is not ``checkpoint-STEP`` in the output
        folder.

    Attributes
    ----------
    history
        Every change that this object made, as a `RankUpdate`. Changes before a run was resumed are in
        ``lora_ranks.csv`` only.

    Raises
    ------
    ValueError
        On construction, if an option is out of range. When training begins, in the cases of `DynamicRanks`,
        or if the checkpoint of a resumed run has no state of this callback.
    FormatError
        When a resumed training begins, if that state is damaged or of another step.
    NotImplementedError
        When training begins, under FSDP, DeepSpeed, torch.compile and DataParallel. After the first step, if
        the optimizer's state cannot follow a change of rank.

    Notes
    -----
    To resume, call ``restore_ranks(model, checkpoint)`` before
    ``Trainer.train(resume_from_checkpoint=checkpoint)``. Trainer loads the adapter before it calls any
    callback, and raises RuntimeError ("size mismatch") if the model's ranks differ from the checkpoint's.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    >>> from lorank.training import GardCallback
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
    >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    >>> texts = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    >>> gard = GardCallback(interval=4, window=2)
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     arguments = TrainingArguments(folder, max_steps=6, report_to="none", save_strategy="no")
    ...     result = Trainer(model, arguments, train_dataset=texts, callbacks=[gard]).train()
    {'train_runtime': ...'lora_rank_mean': ...'lora_parameters': ...}
    >>> [update.step for update in gard.history]
    [4]
    """

    @lists_options
    def __init__(self, *, checkpoint: str | Path | None = None, **options: Unpack[GardArguments]) -> None:
        self._options = GardOptions(**options)
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._dynamic: DynamicRanks | None = None
        self.history: list[RankUpdate] = []

    def __repr__(self) -> str:
        return f"GardCallback({self._options!r}, {counted(len(self.history), 'change')} of ranks)"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, load the state of a resumed run, and open the first window."""
        _check_arguments(args)
        optimizer = kwargs["optimizer"]
        self._dynamic = DynamicRanks(
            kwargs["model"],
            optimizer,
            scaler=getattr(optimizer, "scaler", None),
            **self._options.arguments(),
        )
        # Ranks changed after the last step would never be trained.
        self._dynamic.freeze(state.max_steps - 1)
        if state.max_steps <= self._dynamic.first_change:
            warnings.warn(
                f"ranks will never change: training ends at step {state.max_steps}, and the first change "
                f"would be after step {self._dynamic.first_change}: take a smaller interval",
                stacklevel=2,
            )
        rank_logs.go_before_trackers(self)
        if state.global_step > 0:
            _load(self._dynamic, self._state_file(args, state), state.global_step)
        if state.is_world_process_zero:
            RankTable(args.output_dir).drop_rows_after(state.global_step)
        self._dynamic.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Count the step, and change ranks after the last step of an interval."""
        if self._dynamic is None:
            return
        update = self._dynamic.step()
        if update is not None:
            self.history.append(update)
            if state.is_world_process_zero:
                RankTable(args.output_dir).append(update)

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the ranks to the logs."""
        logs = kwargs.get("logs")
        if self._dynamic is None or logs is None:
            return
        ranks = self._dynamic.ranks
        summary = rank_logs.summary(ranks, self._dynamic.num_parameters)
        logs.update(summary | rank_logs.by_module(ranks))
        # Trainer saves log_history with every checkpoint; ranks by module are in the table already.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(summary)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Write the state into the folder of the checkpoint."""
        if self._dynamic is None:
            return
        content = self._dynamic.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_state(content, folder / STATE_FILE)

    def on_train_end(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        if self._dynamic is not None:
            self._dynamic.close()

    def _state_file(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self._checkpoint or args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, (str, Path)) else []
        folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        for folder in folders:
            if (folder / STATE_FILE).exists():
                return folder / STATE_FILE
        raise ValueError(
            f"the run resumes at step {state.global_step}, but {folders[0]} holds no {STATE_FILE}: pass "
            "GardCallback(checkpoint=...), the folder from which the run resumes"
        )


def _check_arguments(args: TrainingArguments) -> None:
    """Raise NotImplementedError for arguments under which ranks cannot change."""
    for option, name in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed"), ("torch_compile", "torch.compile")):
        if getattr(args, option, None):
            raise NotImplementedError(
                f"TrainingArguments({option}=...): ranks cannot be changed under {name}, which depends on "
                "the shapes of parameters; use profile_gradients and static ranks"
            )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"{args.n_gpu} devices in one process: Trainer would copy the model to each device for every "
            "batch (DataParallel), and gradients of copies cannot be observed: start one process per device "
            f"(torchrun --nproc-per-node={args.n_gpu}), or use one device (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.load_best_model_at_end:
        raise NotImplementedError(
            "TrainingArguments(load_best_model_at_end=True): Trainer cannot load a checkpoint whose "
            "ranks differ from the last ones; after the training, load the best checkpoint's folder with "
            "PeftModel.from_pretrained"
        )


def _load(dynamic: DynamicRanks, path: Path, step: int) -> None:
    """Load the state of a resumed run; raise FormatError unless it was saved at the given step."""
    try:
        dynamic.load_state_dict(read_state(path))
    except FormatError as error:
        raise FormatError(f"{path}: not a saved state of GardCallback: {error}") from error
    if dynamic.steps != step:
        dynamic.close()
        raise FormatError(
            f"{path}: was saved at step {dynamic.steps}, but the run resumes at step {step}: pass the "
            "checkpoint of that step"
        )
