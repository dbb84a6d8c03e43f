"""The result of an analysis: the spectra of a model's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorank._internal import extras
from lorank.modules import naming
from lorank.modules.facts import ModelFacts
from lorank.report import files
from lorank.report.base import Evidence, Report
from lorank.report.columns import columns
from lorank.report.optional_metrics import columns_of
from lorank.report.rows import METRICS, ModuleSpectrum
from lorank.sources.base import Skipped

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SpectralReport(Report[ModuleSpectrum]):
    """The spectra of a model's matrices, one row each.

    A report is data: it can be iterated, pickled, copied and compared.

    Attributes
    ----------
    modules
        Row of each matrix, in the order of the source.
    skipped
        Tensors without a row, each with the reason.
    source
        Name of the analysed source.
    accuracy
        Requested accuracy: ``"exact"``, ``"fast"`` or ``"sampled"``.
    num_parameters
        Number of parameters of the model, tied ones counted once; None if unknown.
    unknown_parameters
        The reason why `num_parameters` is None: the report is from CSV, or a weight is packed in an unknown
        format.
    facts
        Facts about the model other than its matrices; not stored in CSV.
    metrics
        Names of the groups of optional metrics that the rows have.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> weights = {"layers.0.mlp.weight": np.diag([1.0, 2.0, 3.0]), "layers.1.mlp.weight": np.zeros((2, 3))}
    >>> report = lorank.analyze(weights)
    >>> report
    SpectralReport of mapping: 2 matrices, 15 parameters, accuracy='exact'
      layers.0.mlp (3x3): alpha_hill 1.558, mp_spikes 0, powerlaw_alpha 1.837
      layers.1.mlp (2x3): mp_spikes 0, zero matrix
    >>> report["0.mlp"].spectral_norm
    3.0
    """

    provides: ClassVar[Evidence] = "spectra"
    columns: ClassVar[Sequence[str]] = METRICS
    leading: ClassVar[Sequence[str]] = ModuleSpectrum.leading
    noun: ClassVar[tuple[str, str]] = ("matrix", "matrices")

    modules: Sequence[ModuleSpectrum]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    accuracy: str = "exact"
    num_parameters: int | None = None
    unknown_parameters: str = ""
    facts: ModelFacts = field(default_factory=ModelFacts)
    metrics: tuple[str, ...] = ()

    @property
    def shown_columns(self) -> Sequence[str]:
        """Names of the numbers of the rows, including the optional ones."""
        return (*METRICS, *columns_of(self.metrics))

    @property
    def shown_leading(self) -> Sequence[str]:
        """Names of the numbers that short tables show; the optional ones follow the first two."""
        return (*self.leading[:2], *columns_of(self.metrics), *self.leading[2:])

    def select(self, include: naming.Targets = None, exclude: naming.Targets = None) -> SpectralReport:
        """Return the report of the modules that are included and not excluded.

        Parameters
        ----------
        include, exclude
            A list of names or suffixes, or one regular expression for whole names, as in PEFT's
            ``target_modules``.

        Examples
        --------
        >>> import numpy as np, lorank
        >>> report = lorank.analyze({f"layers.{i}.mlp.weight": np.eye(4) for i in range(3)})
        >>> [row.name for row in report.select(exclude=["layers.1.mlp"])]
        ['layers.0.mlp', 'layers.2.mlp']
        """
        names = set(naming.filtered({row.module for row in self.modules}, include, exclude))
        rows = [row for row in self.modules if row.module in names]
        return replace(self, modules=rows)

    def settings(self) -> dict[str, Any]:
        """Return the requested accuracy, and the names of optional metrics if there are any."""
        return {"accuracy": self.accuracy, **({"metrics": list(self.metrics)} if self.metrics else {})}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: NaN and counts without a spectrum become null, infinity the string "inf"."""
        return files.to_json(self.modules, self._header())

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row for each matrix (extra ``report``).

        The columns are the identity, the metrics, and the flags joined by "; ". Metrics and counts of a
        matrix without a spectrum are NaN.

        Examples
        --------
        >>> import numpy as np, lorank
        >>> report = lorank.analyze({"mlp.weight": np.diag([1.0, 2.0, 3.0])})
        >>> report.to_pandas()[["name", "out", "in", "spectral_norm"]]
          name  out  in  spectral_norm
        0  mlp    3   3            3.0
        """
        pandas = extras.require("pandas", "report", "for data frames")
        frame: pd.DataFrame = pandas.DataFrame(columns(self.modules, self.metrics))
        return frame

    def save(self, path: str | Path) -> None:
        """Write the report to a file, which appears complete or not at all.

        Parameters
        ----------
        path
            A name that ends with ``.json``, ``.parquet`` (extra ``report``) or ``.csv``. JSON and parquet
            hold the report, including kept eigenvalues; CSV holds the numbers of the rows.

        Raises
        ------
        ValueError
            If the name has another ending.

        Examples
        --------
        >>> import tempfile, numpy as np, lorank
        >>> report = lorank.analyze({"mlp.weight": np.diag([1.0, 2.0, 3.0])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.save(f"{folder}/report.json")
        ...     lorank.SpectralReport.load(f"{folder}/report.json") == report
        True
        """
        files.save(Path(path), self.modules, self._header())

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with interactive plots and a table (extra ``report``).

        The page plots each metric by block and type of module, and the spectra that were kept.

        Examples
        --------
        >>> import tempfile, numpy as np, lorank
        >>> report = lorank.analyze({"mlp.weight": np.diag([1.0, 2.0, 3.0])}, keep_eigenvalues=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.to_html(f"{folder}/report.html")
        """
        # Imported here because `html` of the standard library slows down the import of lorank.
        from lorank.report import html

        html.write_page(
            Path(path),
            self.modules,
            self.skipped,
            title=self.source,
            num_parameters=self.num_parameters,
            accuracy=self.accuracy,
            columns=self.shown_columns,
        )

    @classmethod
    def load(cls, path: str | Path) -> SpectralReport:
        """Read a file that `save` wrote.

        Raises
        ------
        FormatError
            If the file is not a report.
        ValueError
            If the name has an ending that `save` does not write.

        Examples
        --------
        >>> import tempfile, numpy as np, lorank
        >>> report = lorank.analyze({"mlp.weight": np.diag([1.0, 2.0, 3.0])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.save(f"{folder}/report.parquet")
        ...     loaded = lorank.SpectralReport.load(f"{folder}/report.parquet")
        >>> loaded["mlp"].frobenius_norm == report["mlp"].frobenius_norm
        True
        """
        rows, header = files.load(Path(path))
        return cls(rows, **header)

    def _header(self) -> files.Header:
        return files.Header(
            skipped=self.skipped,
            source=self.source,
            accuracy=self.accuracy,
            num_parameters=self.num_parameters,
            unknown_parameters=self.unknown_parameters,
            facts=self.facts,
            metrics=self.metrics,
        )
