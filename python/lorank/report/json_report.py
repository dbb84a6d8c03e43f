"""Reports that are saved as JSON."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorank._core import FormatError
from lorank._internal import extras
from lorank._internal.atomic import write_text
from lorank._internal.json_files import read_json
from lorank.report.base import R, Report
from lorank.report.json_values import plain, skipped_from_json, skipped_to_json
from lorank.report.rows import Row
from lorank.sources.base import Skipped

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

_VERSION = 1


class JsonReport(Report[R]):
    """A report that is saved as JSON.

    Subclasses convert the fields of a row that other reports lack, and the header of the file.
    """

    __slots__ = ()

    format: ClassVar[str]
    """The name of the format in the file's header."""

    @classmethod
    @abstractmethod
    def assembled(cls, rows: Sequence[Any], skipped: Sequence[Skipped], header: Mapping[str, Any]) -> Self:
        """Build a report from rows and the header of a file."""

    @staticmethod
    @abstractmethod
    def row_to_json(row: Any) -> dict[str, Any]:
        """Return the fields of a row except its identity (name, module, kind, shape and flags)."""

    @staticmethod
    @abstractmethod
    def row_from_json(identity: Mapping[str, Any], entry: Mapping[str, Any]) -> Any:
        """Build a row from its identity and the result of `row_to_json`."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values: NaN becomes null, infinity the string "inf"."""
        return {
            "format": self.format,
            "version": _VERSION,
            "source": self.source,
            "num_parameters": self.num_parameters,
            "unknown_parameters": self.unknown_parameters,
            **self.settings(),
            "skipped": skipped_to_json(self.skipped),
            "modules": [
                {**_identity(row), **{k: plain(v) for k, v in self.row_to_json(row).items()}}
                for row in self.modules
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file, which appears complete or not at all.

        Raises
        ------
        ValueError
            If the name does not end with ``.json``.
        """
        write_text(self._json_path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises
        ------
        FormatError
            If the file is not a report of this class.
        ValueError
            If the name does not end with ``.json``.
        """
        path = cls._json_path(path)
        try:
            content = read_json(path)
            if content["format"] != cls.format or content["version"] > _VERSION:
                raise ValueError(f"format {content['format']!r}, version {content['version']}")
            rows = [cls.row_from_json(_read_identity(entry), entry) for entry in content["modules"]]
            return cls.assembled(rows, skipped_from_json(content["skipped"]), content)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise FormatError(f"{path}: is not a {cls.format.removeprefix('lorank.')}: {error!r}") from error

    @classmethod
    def _json_path(cls, path: str | Path) -> Path:
        if Path(path).suffix != ".json":
            raise ValueError(f"{path}: a {cls.__name__} is saved as JSON: end the file name with .json")
        return Path(path)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row for each module (extra ``report``).

        The columns are the identity, the numbers, and the flags joined by "; ".
        """
        pandas = extras.require("pandas", "report", "for data frames")
        frame: pd.DataFrame = pandas.DataFrame(
            [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "out": row.shape[0],
                    "in": row.shape[1],
                    **{column: getattr(row, column) for column in self.columns},
                    "flags": "; ".join(row.flags),
                }
                for row in self.modules
            ]
        )
        return frame


def _identity(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "module": row.module,
        "kind": row.kind,
        "shape": list(row.shape),
        "flags": list(row.flags),
    }


def _read_identity(entry: Mapping[str, Any]) -> dict[str, Any]:
    out, fan_in = entry["shape"]
    identity = {key: entry[key] for key in ("name", "module", "kind")}
    return {**identity, "shape": (int(out), int(fan_in)), "flags": tuple(entry["flags"])}
