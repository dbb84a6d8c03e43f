"""The result of profiling tasks, and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from lorank._internal.json_fields import Fields
from lorank.modules.weight import Kind
from lorank.report.base import Evidence
from lorank.report.json_report import JsonReport
from lorank.report.json_values import plain
from lorank.report.rows import Row
from lorank.sources.base import Skipped

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ModuleTask(Row):
    """The task of one module: the regression of its negative output gradients on its inputs.

    Attributes
    ----------
    name
        Dotted name of the module.
    module
        Name by which PEFT adapts the module.
    kind
        Role of the weight: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"expert"``.
    shape
        ``(out, in)``.
    k_star, predicted_rank, num_above
        Ranks, as in `TaskEstimate`; 0 if they are unknown.
    rho, tau, noise
        Decay rate, threshold and noise, as in `TaskEstimate`; nan if they are unknown.
    singular_values, predicted_r2
        Spectrum of the task, and the predicted R^2 by rank, as in `TaskEstimate`.
    flags
        Remarks on the module.
    """

    leading: ClassVar[Sequence[str]] = ("k_star", "predicted_rank", "num_above", "rho", "tau", "noise")

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    k_star: int
    predicted_rank: int
    rho: float
    tau: float
    noise: float
    num_above: int
    singular_values: npt.NDArray[np.float64]
    predicted_r2: npt.NDArray[np.float64]
    flags: tuple[str, ...] = ()


_COUNTS = ("k_star", "predicted_rank", "num_above")
_NUMBERS = ("rho", "tau", "noise")
_ARRAYS = ("singular_values", "predicted_r2")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TaskReport(JsonReport[ModuleTask]):
    """The task spectra of a model's modules, one row each, as `profile_tasks` returns them.

    A report is data: it can be iterated, pickled, copied and compared.

    Attributes
    ----------
    modules
        Row of each module, in the order of the model.
    skipped
        Modules without a row, each with the reason.
    source
        Name of the model.
    num_parameters
        Number of parameters of the base model, tied ones counted once; None if unknown.
    num_samples
        Largest number of rows (tokens) with a gradient over all modules.
    unknown_parameters
        The reason why `num_parameters` is None.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> from lorank.report.tasks import ModuleTask
    >>> row = ModuleTask(
    ...     name="layers.0.q_proj",
    ...     module="layers.0.q_proj",
    ...     kind="linear",
    ...     shape=(8, 8),
    ...     k_star=2,
    ...     predicted_rank=1,
    ...     rho=0.5,
    ...     tau=0.1,
    ...     noise=1.0,
    ...     num_above=3,
    ...     singular_values=np.array([0.4, 0.2, 0.1]),
    ...     predicted_r2=np.array([0.0, 0.3, 0.3, 0.3]),
    ... )
    >>> lorank.TaskReport([row], source="model", num_samples=64)
    TaskReport of model: 1 module, num_samples=64
      layers.0.q_proj (8x8): k_star 2, predicted_rank 1, num_above 3
    """

    provides: ClassVar[Evidence] = "tasks"
    format: ClassVar[str] = "lorank.TaskReport"
    columns: ClassVar[Sequence[str]] = ModuleTask.leading
    leading: ClassVar[Sequence[str]] = ModuleTask.leading

    modules: Sequence[ModuleTask]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    num_parameters: int | None = None
    num_samples: int = 0
    unknown_parameters: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the settings of the profile as JSON values, by name."""
        return {"num_samples": self.num_samples}

    @classmethod
    def assembled(cls, rows: Sequence[ModuleTask], skipped: Sequence[Skipped], header: Fields) -> Self:
        """Build a report from rows and the header of a file."""
        return cls(
            rows,
            skipped,
            header.text("source"),
            header.optional_integer("num_parameters"),
            header.integer("num_samples"),
            header.text("unknown_parameters", ""),
        )

    @staticmethod
    def row_to_json(row: ModuleTask) -> dict[str, Any]:
        """Return the fields of a row except its identity."""
        numbers = {name: getattr(row, name) for name in (*_COUNTS, *_NUMBERS)}
        return numbers | {name: [plain(x) for x in getattr(row, name).tolist()] for name in _ARRAYS}

    @staticmethod
    def row_from_json(identity: Mapping[str, Any], entry: Fields) -> ModuleTask:
        """Build a row from its identity and the result of `row_to_json`."""
        values: dict[str, Any] = {name: entry.integer(name) for name in _COUNTS}
        values |= {name: entry.measure(name) for name in _NUMBERS}
        values |= {name: entry.measures(name) for name in _ARRAYS}
        return ModuleTask(**identity, **values)
