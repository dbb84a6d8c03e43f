"""Checks of arguments before any work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorank._internal.atomic import check_writable
from lorank._internal.staging import is_occupied
from lorank.cli.errors import UsageError
from lorank.modules import naming


def parse_targets(values: list[str] | None) -> naming.Targets:
    """Parse names or suffixes, or one regular expression after ``re:``."""
    if not values:
        return None
    if any(value.startswith("re:") for value in values):
        if len(values) > 1:
            raise UsageError("re: takes one regular expression, without other names")
        expression = values[0].removeprefix("re:")
        try:
            naming.matcher(expression)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return expression
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    return naming.ALL_LINEAR if names == [naming.ALL_LINEAR] else names


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError unless a value is one of an option's choices."""
    known = list(choices)
    if value not in known:
        raise UsageError(f"{option} must be one of {', '.join(known)}, not {value!r}")


def check_new(path: Path, overwrite: bool) -> None:
    """Raise UsageError if a file exists and must not be replaced.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another name or --overwrite")
    check_writable(path)


REPORT_ENDINGS = (".json", ".parquet", ".csv")
"""The endings of the files of reports."""


def check_output_file(path: Path, overwrite: bool) -> None:
    """Raise UsageError if the name is not that of a report, or the file exists and must not be replaced.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    if path.suffix not in REPORT_ENDINGS:
        raise UsageError(f"{path}: the name of a report must end with {', '.join(REPORT_ENDINGS)}")
    check_new(path, overwrite)


def check_output_folder(path: Path, overwrite: bool) -> None:
    """Raise UsageError if a folder holds files that must not be replaced.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: name a folder")
    if path.is_dir() and is_occupied(path) and not overwrite:
        raise UsageError(f"{path} is not empty: choose another folder or --overwrite")
    check_writable(path)
