"""Dynamic GARD: ranks that follow the spectra of the gradients while a model trains.

In the last steps before every change, gradients of the frozen weights are sketched as they pass by.
Their effective ranks, smoothed over time, are scores; the budget is spent anew; the live model is
resized without a change of what it computes.

Source: GARD, dynamic variant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lorank import signals
from lorank._core import FormatError
from lorank.budget import Budget, fit_ranks, is_integer, parse_budget
from lorank.profiling.gradients import gradient_row
from lorank.profiling.passes import check_weights
from lorank.profiling.probe import probing
from lorank.profiling.sketch import GradientSketches
from lorank.profiling.targets import Target, named_targets
from lorank.report.gradients import GradientReport, ModuleGradients, effective_rank
from lorank.signals import AdaptedModule
from lorank.sources import live
from lorank.training import optimizer_state
from lorank.training.layers import AdaptedLayer, lora_layers
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
        If the model or the adapter cannot be resized: as `resize_lora`.

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
    `torch.distributed` the sketches of all processes are averaged, and all find the same ranks. Extra
    memory while a window is open: ``modules * window * k^2`` numbers, the projections, and the
    projected inputs of one batch.
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
        _check_options(r_min, r_max, interval, window, smoothing, max_change, warmup, freeze_after)
        effective_rank([1.0], energy)
        self._model, self._scaler = model, scaler
        self._optimizer = optimizer_state.unwrapped(optimizer)
        self._interval, self._window = interval, window
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
        _check_trained(layers[name] for name in names)
        self._targets: Sequence[Target] = found.chosen
        self._modules = [AdaptedModule(t.info.name, t.info.kind, t.info.shape) for t in found.chosen]
        self._source = found.source
        self._sketches = GradientSketches(found.chosen, sketch, seed)
        self._collected: list[list[torch.Tensor]] = []
        self._smoothed: dict[str, float] = {}
        self._step = 0
        self._checked = False
        self._probe: AbstractContextManager[None] | None = None
        self._scale = 1.0

        # What cannot change is paid first.
        everything = sum(factor.numel() for layer in layers.values() for factor in layer.factors)
        self._fixed = everything - self._cost(self.ranks)
        self._limit = everything if budget is None else parse_budget(budget, found.source.num_parameters)
        self._limit_is_given = budget is not None
        self._check_start()
        if freeze_after is not None and self.first_change > freeze_after:
            warnings.warn(
                f"ranks will never change: the first change would be after step {self.first_change} "
                f"(interval {interval}, warmup {warmup}), and freeze_after is {freeze_after}",
                stacklevel=2,
            )

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
        """Take all hooks off the model."""
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            self._probe = None

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
            If the optimizer's state cannot be carried over: as `resize_lora`, at the first step.
        """
        self._step += 1
        if not self._checked:
            # Now that the optimizer has made a step, it shows what it remembers.
            self._check_optimizer()
            self._checked = True
        if self._probe is not None:
            self._collect()
        update = self._change() if self._is_due(self._step) and self._collected else None
        self._watch()
        return update

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: counters, smoothed effective ranks, and sketches of an open window.

        Under `torch.distributed` call it in every process: sketches are averaged.
        """
        self._collected = [_averaged(batch) for batch in self._collected]
        return {
            "step": self._step,
            "ranks": self.ranks,
            "budget": self._limit,
            "sketch": self._sketches.size,
            "smoothed": dict(self._smoothed),
            "sketches": [[sketch.cpu() for sketch in batch] for batch in self._collected],
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
        self._step, self._smoothed, self._collected = step, smoothed, sketches
        if not self._limit_is_given:
            self._limit = limit
        self.close()
        self._watch()

    def _parsed(
        self, state: Mapping[str, Any]
    ) -> tuple[int, dict[str, int], int, dict[str, float], list[list[torch.Tensor]]]:
        """What `state_dict` returned, checked."""
        device = self._targets[0].module.weight.device
        try:
            sketches = [[sketch.to(device) for sketch in batch] for batch in state["sketches"]]
            size = state["sketch"]
            ranks = {str(name): int(rank) for name, rank in state["ranks"].items()}
            smoothed = {str(name): float(value) for name, value in state["smoothed"].items()}
            step, limit = int(state["step"]), int(state["budget"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise FormatError(f"damaged: {error!r}") from error
        if sketches and size != self._sketches.size:
            raise ValueError(f"the state is within a window of sketch={size}, not {self._sketches.size}")
        shapes = [self._sketches.shape(index) for index in range(len(self._targets))]
        if any([tuple(sketch.shape) for sketch in batch] != shapes for batch in sketches):
            raise FormatError("damaged: its sketches are not those of the model's modules")
        return step, ranks, limit, smoothed, sketches

    def _is_due(self, step: int) -> bool:
        before_end = self._freeze_after is None or step <= self._freeze_after
        return step % self._interval == 0 and step > self._warmup and before_end

    def _watch(self) -> None:
        """Put hooks on for the coming step if its gradients count, and take them off if not."""
        coming = self._step + 1
        change = -(-coming // self._interval) * self._interval
        counts = self._is_due(change) and change - coming < self._window
        if counts and self._probe is None:
            self._probe = probing(self._targets, self._sketches)
            self._probe.__enter__()
        elif not counts:
            self.close()
        self._sketches.take()  # What a skipped window may have left.
        self._scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _collect(self) -> None:
        batch = self._sketches.take_all()
        self._collected.append([sketch / self._scale for sketch in batch])

    def _change(self) -> RankUpdate | None:
        batches = [_averaged(batch) for batch in self._collected]
        self._collected = []
        # A step that overflowed under the gradient scaler was no step.
        batches = [batch for batch in batches if all(bool(torch.isfinite(s).all()) for s in batch)]
        if not batches:
            return None
        report = self._report(batches)
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

    def _report(self, batches: Sequence[Sequence[torch.Tensor]]) -> GradientReport:
        rows = [
            self._smooth(gradient_row(target, [batch[index] for batch in batches], self._energy))
            for index, target in enumerate(self._targets)
        ]
        return GradientReport(
            rows,
            (),
            self._source.label,
            self._source.num_parameters,
            self._energy,
            self._sketches.size,
            len(batches),
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
        return {module.name: int(rank) for module, rank in zip(self._modules, ranks, strict=True)}

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
        layers = lora_layers(self._model, self._adapter_name)
        factors = {module.name: layers[module.name].factors for module in self._modules}
        optimizer_state.check(self._optimizer, factors)


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


def _averaged(sketches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The mean over all processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(sketches)
    flat = torch.cat([sketch.flatten() for sketch in sketches])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([sketch.numel() for sketch in sketches])
    return [part.view_as(sketch) for part, sketch in zip(parts, sketches, strict=True)]


def _check_options(
    r_min: int,
    r_max: int,
    interval: int,
    window: int,
    smoothing: float,
    max_change: int | None,
    warmup: int,
    freeze_after: int | None,
) -> None:
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
        raise ValueError(f"window {window} is longer than interval {interval}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing!r}")
