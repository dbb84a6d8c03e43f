"""Dynamic GARD: ranks that follow the spectra of the gradients while a model trains.

In the last steps before every change, gradients of the frozen weights are sketched as they pass by.
Their effective ranks, smoothed over time, are scores; the budget is spent anew; the live model is
resized without a change of what it computes.

Source: GARD, dynamic variant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch

from lorank._core import FormatError
from lorank.adapters.live.layers import AdaptedLayer
from lorank.allocation import signals
from lorank.allocation.budget import Budget, fit_ranks, is_integer, parse_budget
from lorank.modules.targets import AdaptedModule
from lorank.peft_format.initialization import check_config
from lorank.profiling.gradients import gradient_row
from lorank.profiling.passes import check_weights
from lorank.profiling.targets import Target, named_targets
from lorank.report.gradients import GradientReport
from lorank.report.rows import ModuleGradients
from lorank.sources import live
from lorank.statistics.effective_rank import effective_rank
from lorank.training import optimizer_state
from lorank.training.data_parallel import of_first_process
from lorank.training.gradient_window import GradientWindow
from lorank.training.layers import lora_layers
from lorank.training.resizing import RankChange, check_resizable, resize_lora
from lorank.training.wrappers import check_not_compiled, check_one_device_a_process, data_parallel_wrappers


@dataclass(frozen=True, slots=True)
class RankUpdate:
    """A change of ranks.

    Attributes
    ----------
    step
        Optimizer steps done before it.
    ranks
        Module -> rank from then on, all modules that can change.
    report
        What the gradients of the window said, effective ranks smoothed.
    changes
        Module -> what was done to it, for those whose rank moved: ``changes[name].error`` is the
        Frobenius norm of what its update lost.
    num_parameters
        Parameters of the adapter from then on.
    """

    step: int
    ranks: Mapping[str, int]
    report: GradientReport
    changes: Mapping[str, RankChange]
    num_parameters: int


class DynamicRanks:
    """Moves the ranks of a live PEFT model by its gradients, for a training loop of one's own.

    With `transformers.Trainer`, use `GardCallback`, which takes the same options.

    Parameters
    ----------
    model
        A PEFT model with LoRA, unwrapped.
    optimizer
        The optimizer that trains it, or Accelerate's wrapper of it.
    budget
        Parameters of the adapter: a number, ``"500k"``, or ``"0.5%"`` of the base model's. By default
        what the adapter has now.
    interval
        Steps from one change to the next.
    window
        Steps before a change whose gradients are looked at: `M`. At most `interval`.
    r_min, r_max
        Bounds of every rank, ``1 <= r_min <= r_max``. No module grows beyond ``min(out, in)``.
    energy, sketch
        As in `profile_gradients`.
    smoothing
        `beta`: effective ranks are ``beta * smoothed + (1 - beta) * new``.
    max_change
        How far a rank may move at once; None for no bound.
    warmup
        No change at or before this step.
    freeze_after
        No change after this step; None for no end.
    adapter_name
        Which adapter.
    seed
        Of projections and of new rows.
    scaler
        The `torch.amp.GradScaler` in use, if any: gradients are divided by its scale.

    Raises
    ------
    TypeError
        If `model` is no module, or `optimizer` no optimizer.
    ValueError
        If an option is out of range, the adapter's ranks break the bounds or the budget already, or
        the adapter is not being trained.
    NotImplementedError
        If the model or the adapter cannot be resized: as `resize_lora`; if the model is copied to several
        devices (DataParallel).

    Examples
    --------
    >>> with DynamicRanks(model, optimizer, budget="500k", interval=100) as ranks:  # doctest: +SKIP
    ...     for batch in loader:
    ...         model(**batch).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         update = ranks.step()

    Notes
    -----
    Gradients of micro-batches add up until `step`, so that accumulation counts as one batch. Under
    `torch.distributed` the sketches of all processes are averaged, and the first one's ranks are those of
    all. A window in which no gradient reached any module changes nothing, and is warned of once. Extra
    memory while a window is open: ``modules * window * k^2`` numbers, the projections, and of one batch the
    projected inputs and the outputs of the first modules (before which nothing is trained), for as long as
    its loss lives; between windows the projections, and nothing once ranks are frozen.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
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
        scaler: Any = None,
    ) -> None:
        check_options(r_min, r_max, interval, window, smoothing, max_change, warmup, freeze_after)
        effective_rank([1.0], energy)
        self._model = model
        self._optimizer = optimizer_state.unwrapped(optimizer)
        self._interval, self._length = interval, window
        self._r_min, self._r_max = r_min, r_max
        self._energy, self._smoothing, self._max_change = energy, smoothing, max_change
        self._warmup, self._freeze_after = warmup, freeze_after
        self._adapter_name, self._seed = adapter_name, seed

        layers = lora_layers(model, adapter_name)
        check_not_compiled(model)
        check_one_device_a_process(model)
        data_parallel_wrappers(model)  # Refuses those that remember shapes.
        check_weights(model)
        found = named_targets(model, live.from_module(model), layers)
        if not found.chosen:
            raise ValueError(f"adapter {adapter_name!r} has no module whose gradient can be sketched")
        names = [target.info.name for target in found.chosen]
        check_resizable(model.peft_config[adapter_name], layers, {name: layers[name].rank for name in names})
        check_config(model.peft_config[adapter_name], range(r_min, r_max + 1))
        _check_trained(layers[name] for name in names)
        self._targets: Sequence[Target] = found.chosen
        self._modules = [AdaptedModule(t.info.name, t.info.kind, t.info.shape) for t in found.chosen]
        self._source = found.source
        self._window = GradientWindow(found.chosen, sketch, seed, scaler)
        self._smoothed: dict[str, float] = {}
        self._step = 0
        self._is_optimizer_checked = self._is_silence_told = False

        # What cannot change is paid first.
        everything = sum(factor.numel() for layer in layers.values() for factor in layer.factors)
        self._fixed = everything - self._cost(self.ranks)
        base = found.source
        self._limit = (
            everything
            if budget is None
            else parse_budget(budget, base.num_parameters, base.unknown_parameters)
        )
        self._limit_is_given = budget is not None
        self._check_start()
        if freeze_after is not None and self.first_change > freeze_after:
            warnings.warn(
                f"ranks will never change: the first change would be after step {self.first_change} "
                f"(interval {interval}, warmup {warmup}), and freeze_after is {freeze_after}",
                stacklevel=2,
            )

    def freeze(self, after: int) -> None:
        """Let ranks stay from a step on: no change comes after it, nor after the `freeze_after` of before."""
        self._freeze_after = after if self._freeze_after is None else min(self._freeze_after, after)

    @property
    def first_change(self) -> int:
        """The first step after which ranks may change, counted from the start of the training."""
        return (self._warmup // self._interval + 1) * self._interval

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank, as the model is now; modules that cannot change are left out."""
        layers = lora_layers(self._model, self._adapter_name)
        return {module.name: layers[module.name].rank for module in self._modules}

    @property
    def num_parameters(self) -> int:
        """Parameters of the adapter."""
        total: int = self._fixed + self._cost(self.ranks)
        return total

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._step

    def __enter__(self) -> DynamicRanks:
        self._watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks off the model, and free what can be made again."""
        self._window.close()

    def step(self) -> RankUpdate | None:
        """Tell that the optimizer has made a step; change ranks if it is time.

        Call it after the optimizer's step and before the next forward pass.

        Returns
        -------
        RankUpdate or None
            What was done; None where it was not time.

        Raises
        ------
        NotImplementedError
            If the optimizer's state cannot be carried over: as `resize_lora`, as soon as it has one.
        """
        self._step += 1
        if not self._is_optimizer_checked:
            self._check_optimizer()
        self._window.end_step()
        update = self._change() if self._is_due(self._step) and len(self._window) else None
        self._watch()
        return update

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: counters, smoothed effective ranks, and sketches of an open window.

        Under `torch.distributed` call it in every process: sketches are averaged.
        """
        return {
            "step": self._step,
            "ranks": self.ranks,
            "budget": self._limit,
            "sketch": self._window.size,
            "smoothed": dict(self._smoothed),
            "sketches": self._window.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; give the model its ranks first (`restore_ranks`).

        Raises
        ------
        FormatError
            If it is no such state, or a damaged one.
        ValueError
            If the model has other ranks than the state, or `sketch` is another within a window.
        """
        step, ranks, limit, smoothed, sketches = self._parsed(state)
        if ranks != self.ranks:
            raise ValueError(
                "the model's ranks are not those of the saved state: call restore_ranks(model, checkpoint) "
                "before the weights are loaded"
            )
        self._window.load(sketches)
        self._step, self._smoothed = step, smoothed
        if not self._limit_is_given:
            self._limit = limit
        self.close()
        self._watch()

    def _parsed(
        self, state: Mapping[str, Any]
    ) -> tuple[int, dict[str, int], int, dict[str, float], list[list[torch.Tensor]]]:
        """What `state_dict` returned, checked."""
        try:
            sketches = [[torch.as_tensor(sketch) for sketch in batch] for batch in state["sketches"]]
            size = state["sketch"]
            ranks = {str(name): int(rank) for name, rank in state["ranks"].items()}
            smoothed = {str(name): float(value) for name, value in state["smoothed"].items()}
            step, limit = int(state["step"]), int(state["budget"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise FormatError(f"damaged: {error!r}") from error
        if sketches and size != self._window.size:
            raise ValueError(f"the state is within a window of sketch={size}, not {self._window.size}")
        return step, ranks, limit, smoothed, sketches

    def _is_due(self, step: int) -> bool:
        before_end = self._freeze_after is None or step <= self._freeze_after
        return step % self._interval == 0 and step > self._warmup and before_end

    def _watch(self) -> None:
        """Look at the coming step if its gradients count."""
        coming = self._step + 1
        change = -(-coming // self._interval) * self._interval
        if self._freeze_after is not None and change > self._freeze_after:
            self.close()
        else:
            self._window.watch(self._is_due(change) and change - coming < self._length)

    def _change(self) -> RankUpdate | None:
        batches = self._window.take()
        rows = self._measured(batches) if batches else []
        if not any(row.effective_rank for row in rows):
            if rows:
                self._tell_silence(len(batches))
            return None
        report = self._report([self._smooth(row) for row in rows], len(batches))
        ranks, before = self._fitted(report), self.ranks
        moved = {name: rank for name, rank in ranks.items() if rank != before[name]}
        changes = resize_lora(
            self._model,
            moved,
            optimizer=self._optimizer,
            adapter_name=self._adapter_name,
            seed=self._seed + self._step,
        )
        return RankUpdate(self._step, ranks, report, changes, self._fixed + self._cost(ranks))

    def _measured(self, batches: Sequence[Sequence[torch.Tensor]]) -> list[ModuleGradients]:
        rows = [
            gradient_row(target, [batch[index] for batch in batches], self._energy)
            for index, target in enumerate(self._targets)
        ]
        shared = self._shared([row.effective_rank for row in rows])
        return [replace(row, effective_rank=value) for row, value in zip(rows, shared, strict=True)]

    def _tell_silence(self, steps: int) -> None:
        """Without this, ranks would become uniform, as they do where all modules say the same."""
        if not self._is_silence_told:
            self._is_silence_told = True
            warnings.warn(
                f"step {self._step}: no gradient reached any adapted module in the last {steps} steps, so "
                "ranks stay as they are: does the loss come from this model, and not from compiled code or a "
                "copy of it?",
                stacklevel=4,
            )

    def _report(self, rows: Sequence[ModuleGradients], num_batches: int) -> GradientReport:
        return GradientReport(
            rows,
            (),
            self._source.label,
            self._source.num_parameters,
            self._energy,
            self._window.size,
            num_batches,
            self._source.unknown_parameters,
        )

    def _smooth(self, row: ModuleGradients) -> ModuleGradients:
        old = self._smoothed.get(row.name, row.effective_rank)
        smoothed = self._smoothing * old + (1 - self._smoothing) * row.effective_rank
        self._smoothed[row.name] = smoothed
        return replace(row, effective_rank=smoothed)

    def _fitted(self, report: GradientReport) -> dict[str, int]:
        signal = signals.find("gard").function(report, self._modules, self._r_min, self._r_max)
        now = np.array(list(self.ranks.values()))
        reach = self._r_max if self._max_change is None else self._max_change
        costs = np.array([module.cost for module in self._modules])
        least = (now - reach).clip(self._r_min)
        # More than its matrix has no module can use, though it may have it already.
        caps = np.array([min(module.shape) for module in self._modules])
        most = np.maximum(np.minimum(now + reach, caps).clip(max=self._r_max), least)
        ranks = fit_ranks(
            signal.scores,
            costs,
            self._r_min,
            self._r_max,
            # More of the budget than that cannot be used.
            min(self._limit - self._fixed, int(most @ costs)),
            at_least=least,
            at_most=most,
        )
        shared = self._shared([float(rank) for rank in ranks])
        return {module.name: int(rank) for module, rank in zip(self._modules, shared, strict=True)}

    def _shared(self, values: Sequence[float]) -> list[float]:
        return of_first_process(values, self._window.device)

    def _cost(self, ranks: Mapping[str, int]) -> int:
        return sum(ranks[module.name] * module.cost for module in self._modules)

    def _check_start(self) -> None:
        ranks = self.ranks
        for name, rank in ranks.items():
            if not self._r_min <= rank <= self._r_max:
                raise ValueError(
                    f"module {name!r} has rank {rank}, outside r_min {self._r_min} and r_max {self._r_max}"
                )
        if self.num_parameters > self._limit:
            raise ValueError(
                f"the adapter has {self.num_parameters:,} parameters, more than the budget of "
                f"{self._limit:,}: begin with smaller ranks"
            )

    def _check_optimizer(self) -> None:
        """Refuse what cannot be carried over, as soon as the optimizer shows what it remembers.

        That can be later than the first step, which a gradient scaler may skip.
        """
        layers = lora_layers(self._model, self._adapter_name)
        factors = {module.name: layers[module.name].factors for module in self._modules}
        optimizer_state.check(self._optimizer, factors)
        state = self._optimizer.state
        self._is_optimizer_checked = any(state.get(factor) for pair in factors.values() for factor in pair)


def _check_trained(layers: Iterable[AdaptedLayer]) -> None:
    """Refuse an adapter that no gradient reaches."""
    for adapted in layers:
        if adapted.adapter not in adapted.layer.active_adapters:
            active = ", ".join(adapted.layer.active_adapters) or "none"
            raise ValueError(
                f"adapter {adapted.adapter!r} is not active ({active} is): call "
                f"model.set_adapter({adapted.adapter!r}) first"
            )
        if adapted.layer.disable_adapters:
            raise ValueError("the adapters are disabled: call model.enable_adapter_layers() first")
        if not any(factor.requires_grad for factor in adapted.factors):
            raise ValueError(
                f"module {adapted.name!r}: adapter {adapted.adapter!r} is not trained (requires_grad is "
                "False): load it with is_trainable=True, or build it without inference_mode"
            )


def check_options(
    r_min: int,
    r_max: int,
    interval: int,
    window: int,
    smoothing: float,
    max_change: int | None,
    warmup: int,
    freeze_after: int | None,
) -> None:
    """Refuse options that no training could take.

    Raises
    ------
    ValueError
        If one is no number of its kind or out of range, or the window longer than the interval.
    """
    for name, value, least in (
        ("r_min", r_min, 1),
        ("r_max", r_max, r_min),
        ("interval", interval, 1),
        ("window", window, 1),
        ("max_change", max_change, 1),
        ("warmup", warmup, 0),
        ("freeze_after", freeze_after, 0),
    ):
        if value is not None and (not is_integer(value) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    if window > interval:
        raise ValueError(
            f"window {window} is longer than interval {interval}: pass window={interval} or less"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing!r}")
