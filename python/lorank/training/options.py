"""Options of dynamic rank allocation [GARD], which `DynamicRanks` and `GardCallback` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TypedDict, TypeVar, cast

from lorank.allocation.budget import Budget, is_integer, parse_budget
from lorank.profiling.sketch import check_sketch
from lorank.statistics.effective_rank import effective_rank


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GardOptions:
    """Options of dynamic rank allocation, checked on construction.

    Steps are steps of the optimizer, counted from the start of the training.

    Attributes
    ----------
    budget
        Upper bound of the adapter's parameters: a count (``500_000``, ``"500k"``) or a share of the base
        model's parameters (``"0.5%"``). None: the parameters that the adapter has at the start.
    interval
        Number of steps from one change of ranks to the next. Default 100.
    window
        Number of steps before a change whose gradients are sketched (`M`), at most `interval`. Default 16.
    r_min, r_max
        Bounds of every rank, ``1 <= r_min <= r_max``. Defaults 1 and 64. No module grows beyond
        ``min(out, in)``.
    energy
        Share of a gradient spectrum that the effective rank holds, in (0, 1]. Default 0.9.
    sketch
        Size `k` of the random projections. Default 128; None for exact gradients.
    smoothing
        Weight `beta` of earlier windows, in [0, 1): ``beta * smoothed + (1 - beta) * new``. Default 0.5.
    max_change
        Largest change of a rank in one update. Default 4; None for no bound.
    warmup
        Last step of the initial phase without changes of rank. Default 0.
    freeze_after
        Step after which no rank changes. Default None: ranks change until the end.
    adapter_name
        Name of the adapter. Default ``"default"``.
    seed
        Seed of the random projections and of new rows of A. Default 0.

    Raises
    ------
    ValueError
        If an option is out of range, or the window is longer than the interval.

    Examples
    --------
    >>> GardOptions(interval=50).window
    16
    >>> GardOptions(interval=8)
    Traceback (most recent call last):
    ...
    ValueError: window 16 is longer than interval 8: pass window=8 or less
    """

    budget: Budget | None = None
    interval: int = 100
    window: int = 16
    r_min: int = 1
    r_max: int = 64
    energy: float = 0.9
    sketch: int | None = 128
    smoothing: float = 0.5
    max_change: int | None = 4
    warmup: int = 0
    freeze_after: int | None = None
    adapter_name: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("r_min", 1),
            ("r_max", self.r_min),
            ("interval", 1),
            ("window", 1),
            ("max_change", 1),
            ("warmup", 0),
            ("freeze_after", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not is_integer(value) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        if self.window > self.interval:
            raise ValueError(
                f"window {self.window} is longer than interval {self.interval}: "
                f"pass window={self.interval} or less"
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {self.smoothing!r}")
        effective_rank([1.0], self.energy)
        check_sketch(self.sketch)
        if self.budget is not None:
            parse_budget(self.budget, num_parameters=1)

    def __repr__(self) -> str:
        """Return the options that differ from their defaults."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return f"GardOptions({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    def arguments(self) -> GardArguments:
        """Return the options as keyword arguments."""
        return cast("GardArguments", asdict(self))


class GardArguments(TypedDict, total=False):
    """The fields of `GardOptions` as keyword arguments, for type checkers."""

    budget: Budget | None
    interval: int
    window: int
    r_min: int
    r_max: int
    energy: float
    sketch: int | None
    smoothing: float
    max_change: int | None
    warmup: int
    freeze_after: int | None
    adapter_name: str
    seed: int


_Init = TypeVar("_Init", bound=Callable[..., None])


def lists_options(init: _Init) -> _Init:
    """List the options by name, instead of ``**options``, in the signature for `inspect` and `help`.

    Type checkers and editors read the names from `GardArguments`.
    """
    signature = inspect.signature(init)
    by_position = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in fields(GardOptions)
    ]
    vars(init)["__signature__"] = signature.replace(parameters=[*by_position, *options, *by_name])
    return init
