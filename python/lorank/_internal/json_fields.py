"""JSON objects of unknown origin, whose values are checked for type and range when they are read."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import FormatError
from lorank._internal.folders import errors_name
from lorank._internal.short_text import shown

LARGEST_SIDE = 2**31 - 1
"""Largest side of a matrix, by which numbers of parameters fit into 64 bits."""

_LARGEST = 2**63 - 1
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Convert a ValueError of the block that reads a file to a `FormatError` with the file's name.

    Parameters
    ----------
    path
        The file.
    expected
        The expected content with its article, such as ``"a lorank report"``.

    Raises
    ------
    FormatError
        If the block raises ValueError, or the file is a pipe or a device.
    OSError
        If the file cannot be read. The error names the file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FormatError(f"{path}: is not {expected}: it is not a regular file")
    try:
        with errors_name(path):
            yield
    except ValueError as error:
        raise FormatError(f"{path}: is not {expected}: {error}") from error


class Fields:
    """A JSON object. Its methods return checked values, and ignore keys that are not asked for.

    All methods raise ValueError if a value is missing, has another type or is out of range. The message gives
    the place of the value within the file.

    Parameters
    ----------
    content
        The object.
    place
        The place of the object within the file, such as ``"modules[3]"``; empty for the whole content.
    """

    __slots__ = ("_content", "_place")

    def __init__(self, content: Any, place: str = "") -> None:
        self._place = place
        if not isinstance(content, dict):
            raise self.error("", content, "an object")
        self._content = content

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def error(self, key: str, value: Any, expected: str) -> ValueError:
        """Return the error for a value that is not as expected."""
        place = ".".join(filter(None, (self._place, key))) or "the content"
        return ValueError(f"{place} is {shown(value)}: it should be {expected}")

    def value(self, key: str) -> Any:
        """Return an unchecked value."""
        if key not in self._content:
            raise ValueError(f"{self._place or 'the content'} has no {key!r}")
        return self._content[key]

    def check_format(self, name: str, version: int) -> None:
        """Check the name of the format, and that its version is known."""
        if (found := self.value("format")) != name:
            raise self.error("format", found, repr(name))
        if (given := self.integer("version", 1)) > version:
            raise ValueError(f"version {given} is newer than this release of lorank, which reads {version}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; the default if the key is missing."""
        value = self.value(key) if default is None else self._content.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> Any:
        """Return one of several strings."""
        value = self.value(key)
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, value, f"one of {', '.join(choices)}")
        return value

    def integer(self, key: str, least: int = 0, most: int = _LARGEST) -> int:
        """Return an integer within bounds. Booleans, strings and floats are refused."""
        value = self.value(key)
        if not _is_integer(value, least, most):
            raise self.error(key, value, f"an {_integer_within(least, most)}")
        return int(value)

    def optional_integer(self, key: str, least: int = 0, most: int = _LARGEST) -> int | None:
        """Return an integer within bounds; None for null."""
        return None if self.value(key) is None else self.integer(key, least, most)

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number within bounds."""
        value = self.value(key)
        if not (_is_finite(value) and least <= value <= most):
            raise self.error(key, value, _number_within(least, most))
        return float(value)

    def measure(self, key: str, least: float = -math.inf) -> float:
        """Return a number that `plain` wrote: null stands for NaN, and ``"inf"`` for infinity."""
        return self._measure(key, self.value(key), least)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self._list(key, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, values, "a list of strings")
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers from 0."""
        expected = f"a list of {_integer_within(0, _LARGEST, 's')}"
        values = self._list(key, expected)
        if not all(_is_integer(value, 0, _LARGEST) for value in values):
            raise self.error(key, values, expected)
        return tuple(values)

    def matrix_shape(self, key: str) -> tuple[int, int]:
        """Return the two sides of a matrix that is not empty."""
        expected = f"two {_integer_within(1, LARGEST_SIDE, 's')}"
        values = self._list(key, expected)
        if len(values) != 2 or not all(_is_integer(value, 1, LARGEST_SIDE) for value in values):
            raise self.error(key, values, expected)
        return values[0], values[1]

    def numbers(self, key: str) -> npt.NDArray[np.float64]:
        """Return a list of finite numbers as an array."""
        values = self._list(key, "a list of finite numbers")
        # Checks of single values would be slow for kept spectra.
        if set(map(type, values)) <= {int, float}:
            with suppress(OverflowError):
                array = np.array(values, dtype=np.float64)
                if np.isfinite(array).all():
                    return array
        raise self.error(key, values, "a list of finite numbers")

    def measures(self, key: str) -> npt.NDArray[np.float64]:
        """Return a list of numbers as an array, each as in `measure`."""
        values = self._list(key, "a list of numbers")
        return np.array([self._measure(key, value) for value in values], dtype=np.float64)

    def object(self, key: str) -> Fields:
        """Return an object."""
        return Fields(self.value(key), self._below(key))

    def objects(self, key: str) -> list[Fields]:
        """Return a list of objects."""
        values = self._list(key, "a list of objects")
        return [Fields(value, f"{self._below(key)}[{index}]") for index, value in enumerate(values)]

    def _below(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def _list(self, key: str, expected: str) -> list[Any]:
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(key, value, expected)
        return value

    def _measure(self, key: str, value: Any, least: float = -math.inf) -> float:
        if value is None:
            return math.nan
        infinite = _INFINITIES.get(value) if isinstance(value, str) else None
        if infinite is None and not _is_finite(value):
            raise self.error(key, value, f'{_number_within(least, math.inf)}, null or "inf"')
        number = float(value) if infinite is None else infinite
        if number < least:
            raise self.error(key, value, _number_within(least, math.inf))
        return number


def check_unique(names: Sequence[str]) -> None:
    """Raise ValueError if a name occurs more than once."""
    if len(set(names)) < len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ValueError(f"the name {shown(name)} occurs more than once")
            seen.add(name)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_integer(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _integer_within(least: int, most: int, plural: str = "") -> str:
    return f"integer{plural} from {least}" + ("" if most == _LARGEST else f" to {most}")


def _number_within(least: float, most: float) -> str:
    bounds = [f"from {least:g}"] if least > -math.inf else []
    bounds += [f"to {most:g}"] if most < math.inf else []
    return " ".join(["a finite number", *bounds])
