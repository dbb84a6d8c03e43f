"""The result of profiling what modules have to learn: one row a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from lorank._internal.equality import ByValue
from lorank.modules.weight import Kind
from lorank.report.base import Evidence
from lorank.report.json_report import JsonReport, number, plain
from lorank.sources.base import Skipped

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleTask(ByValue):
    """The task of one module: from its inputs to minus the gradients of its outputs.

    Attributes
    ----------
    name, module, kind, shape
        As in `MatrixInfo`; `shape` is ``(out, in)``.
    k_star, predicted_rank, rho, tau, noise, num_above, singular_values, predicted_r2
        As in `TaskEstimate`; nan and 0 where nothing is known.
    flags
        What a reader of the row should know.
    """

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


@dataclass(frozen=True, slots=True, eq=False)
class TaskReport(JsonReport[ModuleTask]):
    """Task spectra of the modules of a model.

    Attributes
    ----------
    modules
        One row a module, in the model's order.
    skipped
        Modules without a row, with reasons.
    source
        The model.
    num_parameters
        Parameters of the base model, tied ones once; None if unknown.
    num_samples
        Rows (tokens) to which a gradient came back, in the module where they were most.
    unknown_parameters
        The reason why `num_parameters` is None.
    """

    provides: ClassVar[Evidence] = "tasks"
    format: ClassVar[str] = "lorank.TaskReport"
    columns: ClassVar[Sequence[str]] = (*_COUNTS, *_NUMBERS)

    modules: Sequence[ModuleTask]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    num_parameters: int | None = None
    num_samples: int = 0
    unknown_parameters: str = ""

    def settings(self) -> dict[str, Any]:
        """What the file's header says beside what every report's does."""
        return {"num_samples": self.num_samples}

    @classmethod
    def assembled(
        cls, rows: Sequence[ModuleTask], skipped: Sequence[Skipped], header: Mapping[str, Any]
    ) -> Self:
        """The report of what a file holds."""
        return cls(
            rows,
            skipped,
            header["source"],
            header["num_parameters"],
            int(header["num_samples"]),
            header.get("unknown_parameters", ""),
        )

    @staticmethod
    def row_to_json(row: ModuleTask) -> dict[str, Any]:
        """What a row holds beside its identity."""
        numbers = {name: getattr(row, name) for name in (*_COUNTS, *_NUMBERS)}
        return numbers | {name: [plain(x) for x in getattr(row, name).tolist()] for name in _ARRAYS}

    @staticmethod
    def row_from_json(identity: Mapping[str, Any], entry: Mapping[str, Any]) -> ModuleTask:
        """The inverse."""
        values: dict[str, Any] = {name: int(entry[name]) for name in _COUNTS}
        values |= {name: number(entry[name]) for name in _NUMBERS}
        values |= {name: np.array([number(x) for x in entry[name]]) for name in _ARRAYS}
        return ModuleTask(**identity, **values)
