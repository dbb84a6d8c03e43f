"""Reports that are saved as JSON."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from lorank._internal import extras
from lorank._internal.atomic import write_text
from lorank._internal.json_fields import Fields, check_unique, reading
from lorank._internal.json_files import read_json
from lorank.modules.weight import Kind
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
    def assembled(cls, rows: Sequence[Any], skipped: Sequence[Skipped], header: Fields) -> Self:
        """Build a report from rows and the header of a file."""

    @staticmethod
    @abstractmethod
    def row_to_json(row: Any) -> dict[str, Any]:
        """Return the fields of a row except its identity (name, module, kind, shape and flags)."""

    @staticmethod
    @abstractmethod
    def row_from_json(identity: Mapping[str, Any], entry: Fields) -> Any:
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
        with reading(path, f"a {cls.format.removeprefix('lorank.')}"):
            return cls.from_json(read_json(path))

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Build a report from the result of `to_json`.

        Raises
        ------
        ValueError
            If the content is malformed.
        """
        header = Fields(content)
        header.check_format(cls.format, _VERSION)
        return cls.from_header(
            [cls.row_from_json(_read_identity(entry), entry) for entry in header.objects("modules")], header
        )

    @classmethod
    def from_header(cls, rows: Sequence[Any], header: Fields) -> Self:
        """Build a report from rows and the header of a file.

        Raises
        ------
        ValueError
            If the header is of another format, or two rows have one name.
        """
        header.check_format(cls.format, _VERSION)
        check_unique([row.name for row in rows])
        return cls.assembled(rows, skipped_from_json(header), header)

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


def _read_identity(entry: Fields) -> dict[str, Any]:
    return {
        "name": entry.text("name"),
        "module": entry.text("module"),
        "kind": entry.choice("kind", get_args(Kind)),
        "shape": entry.matrix_shape("shape"),
        "flags": entry.texts("flags"),
    }
