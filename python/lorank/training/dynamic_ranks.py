"""Dynamic rank allocation [GARD]: ranks that follow the spectra of gradients during a training.

In the last steps before each change, the gradients of the frozen weights are sketched. Their effective
ranks, smoothed over time, are scores; the scores and the budget give new ranks, and the live model is
resized. A module that grows keeps its outputs; a module that shrinks loses the smallest singular directions
of its update.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from typing_extensions import Unpack

from lorank._internal.short_text import counted, listing
from lorank.allocation.budget import parse_budget
from lorank.modules.targets import AdaptedModule
from lorank.peft_format.initialization import check_config
from lorank.profiling.passes import check_weights
from lorank.profiling.targets import FoundTargets, named_targets
from lorank.report.gradients import GradientReport, ModuleGradients
from lorank.sources import live
from lorank.training import optimizer_state
from lorank.training.data_parallel import first_process_values
from lorank.training.gradient_scores import GradientScores
from lorank.training.gradient_window import GradientWindow
from lorank.training.layers import check_trained, lora_layers
from lorank.training.options import GardArguments, GardOptions, lists_options
from lorank.training.rank_budget import RankBudget
from lorank.training.resizing import RankChange, check_resizable, resize_lora
from lorank.training.schedule import ChangeSchedule
from lorank.training.state import GardState
from lorank.training.wrappers import check_not_compiled, check_one_device_a_process, data_parallel_wrappers


@dataclass(frozen=True, slots=True)
class RankUpdate:
    """One change of ranks.

    Attributes
    ----------
    step
        Number of optimizer steps done before the change.
    ranks
        Rank of each module that can change, after the change.
    report
        Gradient spectra of the window, with smoothed effective ranks.
    changes
        `RankChange` of each module whose rank changed: ``changes[name].error`` is the Frobenius norm of the
        dropped part of its update.
    num_parameters
        Number of the adapter's parameters after the change.
    """

    step: int
    ranks: Mapping[str, int]
    report: GradientReport
    changes: Mapping[str, RankChange]
    num_parameters: int


class DynamicRanks:
    """Dynamic rank allocation [GARD] for a live PEFT model in a custom training loop.

    With `transformers.Trainer`, use `GardCallback`, which has the same options.

    Parameters
    ----------
    model
        The PEFT model with a LoRA adapter, without wrappers.
    optimizer
        The optimizer that trains the model, or Accelerate's wrapper of it.
    **options
        The fields of `lorank.training.options.GardOptions`: budget, interval, window, r_min, r_max, energy,
        sketch, smoothing, max_change, warmup, freeze_after, adapter_name, seed.
    scaler
        The `torch.amp.GradScaler` of the training, if there is one: gradients are divided by its scale.

    Raises
    ------
    TypeError
        If `model` is not a module, or `optimizer` not an optimizer.
    ValueError
        If an option is out of range, the adapter's ranks violate the bounds or the budget at the start, or
        the adapter is not being trained.
    NotImplementedError
        If `resize_lora` cannot resize the model or the adapter, or DataParallel copies the model to several
        devices.

    Notes
    -----
    Gradients of micro-batches add up until `step`, so that accumulated micro-batches count as one batch.
    Under `torch.distributed`, sketches are averaged over processes, and all processes use the ranks of the
    first one. If no gradient reaches any module in a window, ranks do not change, and the first such window
    of a training causes a warning.

    An open window needs memory for ``modules * window * k^2`` numbers and for the projections. Until the loss
    of a batch is freed, it also needs memory for the projected inputs and for the outputs of modules before
    the first trained one. The projections stay between windows, and are freed after the last change.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from lorank.training import DynamicRanks
    >>> _ = torch.manual_seed(0)
    >>> base = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    >>> with DynamicRanks(model, optimizer, interval=4, window=2, max_change=2) as dynamic:
    ...     for _ in range(4):
    ...         model(torch.randn(8, 16)).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         update = dynamic.step()
    >>> update.step, update.num_parameters <= 4 * (16 + 16 + 16 + 4)
    (4, True)
    >>> update.ranks == dynamic.ranks
    True
    """

    @lists_options
    def __init__(
        self, model: Any, optimizer: Any, *, scaler: Any = None, **options: Unpack[GardArguments]
    ) -> None:
        chosen = self._options = GardOptions(**options)
        self._model = model
        self._optimizer = optimizer_state.unwrapped(optimizer)
        self._schedule = ChangeSchedule(chosen.interval, chosen.window, chosen.warmup, chosen.freeze_after)
        found = _resizable_targets(model, chosen)
        self._source = found.source
        self._modules = [AdaptedModule(t.info.name, t.info.kind, t.info.shape) for t in found.chosen]
        self._window = GradientWindow(found.chosen, chosen.sketch, chosen.seed, scaler)
        self._scores = GradientScores(found.chosen, chosen.energy, chosen.smoothing)
        self._step = 0
        self._is_optimizer_checked = False
        self._has_warned = False
        self._budget = self._start_budget()
        if chosen.freeze_after is not None and self.first_change > chosen.freeze_after:
            warnings.warn(
                f"ranks will never change: the first change would be after step {self.first_change} "
                f"(interval {chosen.interval}, warmup {chosen.warmup}), and freeze_after is "
                f"{chosen.freeze_after}",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        ranks = self.ranks
        title = (
            f"DynamicRanks of {counted(len(ranks), 'module')} after {counted(self._step, 'step')}: "
            f"{self.num_parameters:,} of at most {self._budget.limit:,} parameters, {self._options!r}"
        )
        lines = (f"{name}: rank {rank}" for name, rank in ranks.items())
        return listing(title, lines, len(ranks), "dynamic.ranks")

    def _start_budget(self) -> RankBudget:
        """Build the budget, and check the initial ranks against it."""
        layers = lora_layers(self._model, self._options.adapter_name)
        size = sum(factor.numel() for layer in layers.values() for factor in layer.factors)
        fixed = size - sum(layers[module.name].rank * module.cost for module in self._modules)
        given, base = self._options.budget, self._source
        limit = size if given is None else parse_budget(given, base.num_parameters, base.unknown_parameters)
        budget = RankBudget(self._modules, fixed, limit, self._options)
        budget.check(self.ranks)
        return budget

    def freeze(self, after: int) -> None:
        """Exclude changes after step `after`; an earlier `freeze_after` still applies."""
        self._schedule = self._schedule.ending_after(after)

    @property
    def first_change(self) -> int:
        """The first step after which ranks may change, counted from the start of the training."""
        return self._schedule.first_change

    @property
    def ranks(self) -> dict[str, int]:
        """Current rank of each module that can change."""
        layers = lora_layers(self._model, self._options.adapter_name)
        return {module.name: layers[module.name].rank for module in self._modules}

    @property
    def num_parameters(self) -> int:
        """Number of the adapter's parameters."""
        return self._budget.num_parameters(self.ranks)

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
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
        """Remove all hooks from the model, and free the projections."""
        self._window.close()

    def step(self) -> RankUpdate | None:
        """Count a step of the optimizer, and change ranks after the last step of an interval.

        Call this method after the optimizer's step and before the next forward pass.

        Returns
        -------
        RankUpdate or None
            The change; None if ranks do not change.

        Raises
        ------
        NotImplementedError
            If `resize_lora` cannot resize the optimizer's state; raised as soon as the optimizer has state.
        """
        self._step += 1
        if not self._is_optimizer_checked:
            self._check_optimizer()
        self._window.end_step()
        update = self._change() if self._schedule.is_change(self._step) and len(self._window) else None
        self._watch()
        return update

    def state_dict(self) -> dict[str, Any]:
        """Return counters, smoothed effective ranks, and the sketches of an open window.

        Under `torch.distributed`, call this method in every process: sketches are averaged.
        """
        return GardState(
            step=self._step,
            ranks=self.ranks,
            budget=self._budget.limit,
            sketch=self._window.size,
            smoothed=dict(self._scores.smoothed),
            sketches=self._window.state(),
        ).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the result of `state_dict`; call `restore_ranks` on the model first.

        Raises
        ------
        FormatError
            If the state is damaged or of another kind.
        ValueError
            If the ranks of the state differ from those in the model, or the size of an open window's sketches
            differs from the option `sketch`.
        """
        loaded = GardState.from_dict(state)
        if loaded.sketches and loaded.sketch != self._window.size:
            raise ValueError(
                f"the saved window has sketch={loaded.sketch}: pass this value in place of "
                f"sketch={self._window.size}"
            )
        if loaded.ranks != self.ranks:
            raise ValueError(
                "the model's ranks are not those of the saved state: call restore_ranks(model, checkpoint) "
                "before the weights are loaded"
            )
        self._window.load(loaded.sketches)
        self._step, self._scores.smoothed = loaded.step, loaded.smoothed
        if self._options.budget is None:
            self._budget.limit = loaded.budget
        self.close()
        self._watch()

    def _watch(self) -> None:
        """Put hooks on the model if the gradients of the coming step count; remove them otherwise."""
        coming = self._step + 1
        if self._schedule.is_over(coming):
            self.close()
        else:
            self._window.watch(self._schedule.is_watched(coming))

    def _change(self) -> RankUpdate | None:
        """Resize the model according to the gradients of the window, if there are any."""
        steps = self._window.take()
        rows = self._scores.measured(steps, self._window.device) if steps else []
        if not any(row.effective_rank for row in rows):
            if rows:
                self._warn_without_gradients(len(steps))
            return None
        report = self._report(self._scores.smooth(rows), len(steps))
        before = self.ranks
        ranks = self._shared(self._budget.fitted(report, before))
        changes = resize_lora(
            self._model,
            {name: rank for name, rank in ranks.items() if rank != before[name]},
            optimizer=self._optimizer,
            adapter_name=self._options.adapter_name,
            seed=self._options.seed + self._step,
        )
        return RankUpdate(self._step, ranks, report, changes, self._budget.num_parameters(ranks))

    def _warn_without_gradients(self, num_steps: int) -> None:
        """Warn once that ranks stay: with scores of zero for all modules, they would become uniform."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"step {self._step}: no gradient reached any adapted module in the last {num_steps} steps, "
                "so ranks stay as they are: does the loss come from this model, and not from compiled code "
                "or a copy of it?",
                stacklevel=4,
            )

    def _report(self, rows: Sequence[ModuleGradients], num_batches: int) -> GradientReport:
        """Return the report of a window."""
        return GradientReport(
            rows,
            (),
            self._source.label,
            self._source.num_parameters,
            self._options.energy,
            self._window.size,
            num_batches,
            self._source.unknown_parameters,
        )

    def _shared(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Return the first process's ranks."""
        shared = first_process_values([float(rank) for rank in ranks.values()], self._window.device)
        return {name: int(rank) for name, rank in zip(ranks, shared, strict=True)}

    def _check_optimizer(self) -> None:
        """Raise NotImplementedError for state that cannot be resized, once the optimizer has state.

        A gradient scaler may skip the first steps, so that state appears later.
        """
        layers = lora_layers(self._model, self._options.adapter_name)
        factors = {module.name: layers[module.name].factors for module in self._modules}
        optimizer_state.check(self._optimizer, factors)
        state = self._optimizer.state
        self._is_optimizer_checked = any(state.get(factor) for pair in factors.values() for factor in pair)


def _resizable_targets(model: Any, options: GardOptions) -> FoundTargets:
    """Return the modules of an adapter whose gradients can be sketched, after checks of the model.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        In the cases of `DynamicRanks`.
    """
    name = options.adapter_name
    layers = lora_layers(model, name)
    check_not_compiled(model)
    check_one_device_a_process(model)
    data_parallel_wrappers(model)  # Raises for wrappers that depend on shapes.
    check_weights(model)
    found = named_targets(model, live.from_module(model), layers)
    if not found.chosen:
        raise ValueError(f"adapter {name!r} has no module whose gradient can be sketched")
    chosen = {target.info.name: layers[target.info.name] for target in found.chosen}
    config = model.peft_config[name]
    check_resizable(config, layers, {module: layer.rank for module, layer in chosen.items()})
    check_config(config, range(options.r_min, options.r_max + 1))
    for layer in chosen.values():
        check_trained(layer)
    return found
