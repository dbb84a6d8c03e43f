"""Ranks that meet a budget and differ from the current ranks by at most `max_change`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorank.allocation import signals
from lorank.allocation.budget import fit_ranks
from lorank.modules.targets import AdaptedModule
from lorank.report.gradients import GradientReport
from lorank.training.options import GardOptions


class RankBudget:
    """The parameters of an adapter, and the ranks that they allow.

    Parameters
    ----------
    modules
        The modules whose ranks change.
    fixed
        Number of parameters of the adapter's other modules.
    limit
        Largest number of parameters of the adapter.
    options
        Bounds of ranks and of their changes.

    Attributes
    ----------
    limit
        Largest number of parameters of the adapter; a resumed training sets the saved limit.
    """

    def __init__(
        self, modules: Sequence[AdaptedModule], fixed: int, limit: int, options: GardOptions
    ) -> None:
        self._modules = modules
        self._fixed = fixed
        self._options = options
        self.limit = limit

    def num_parameters(self, ranks: Mapping[str, int]) -> int:
        """Return the number of parameters of the adapter at given ranks."""
        return self._fixed + sum(ranks[module.name] * module.cost for module in self._modules)

    def check(self, ranks: Mapping[str, int]) -> None:
        """Raise ValueError if ranks are out of bounds or exceed the budget."""
        r_min, r_max = self._options.r_min, self._options.r_max
        for name, rank in ranks.items():
            if not r_min <= rank <= r_max:
                raise ValueError(f"module {name!r} has rank {rank}, outside r_min {r_min} and r_max {r_max}")
        if (size := self.num_parameters(ranks)) > self.limit:
            raise ValueError(
                f"the adapter has {size:,} parameters, more than the budget of {self.limit:,}: begin with "
                "smaller ranks"
            )

    def fitted(self, report: GradientReport, ranks: Mapping[str, int]) -> dict[str, int]:
        """Allocate ranks by effective ranks, at most `max_change` away from the current `ranks`."""
        r_min, r_max, max_change = self._options.r_min, self._options.r_max, self._options.max_change
        signal = signals.find("gard").function(report, self._modules, r_min, r_max)
        now = np.array(list(ranks.values()))
        reach = r_max if max_change is None else max_change
        costs = np.array([module.cost for module in self._modules])
        least = (now - reach).clip(r_min)
        # A module cannot use more ranks than the shorter side of its matrix, but it may have more already.
        caps = np.array([min(module.shape) for module in self._modules])
        most = np.maximum(np.minimum(now + reach, caps).clip(max=r_max), least)
        # The cost of ranks at their upper bounds. A larger budget cannot be used.
        usable = int(most @ costs)
        found = fit_ranks(
            signal.scores,
            costs,
            r_min,
            r_max,
            min(self.limit - self._fixed, usable),
            at_least=least,
            at_most=most,
        )
        return {module.name: int(rank) for module, rank in zip(self._modules, found, strict=True)}
