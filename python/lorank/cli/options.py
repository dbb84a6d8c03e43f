"""What commands share: options, errors, and ways to print."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lorank._internal.atomic import check_writable
from lorank.modules import naming

_PIPE_WIDTH = 160
# Arguments as the library's messages spell them, not where they are part of a path.
_ARGUMENT = re.compile(
    r"(?<![\w./-])(?:(?P<given>rank_ratio|avg_rank|max_rank|energy|budget|scope|keep|exclude|prefix)=(?=\S)"
    r"|(?P<named>rank_ratio|avg_rank|max_rank|r_min|r_max)\b|(?P<flag>force|guess)=True)"
)

Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", "-i", help="Only these modules: names or suffixes, or re:REGEX. Repeatable, or a,b."
    ),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", "-x", help="Not these modules; read as --include.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="At most so many threads (default: all).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Guess = Annotated[
    bool,
    typer.Option("--guess", help="Go on where names and shapes leave doubts about the kinds of modules."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


class UsageError(Exception):
    """A combination of options that makes no sense: exit status 2."""


class IncompleteError(Exception):
    """Everything that could be done was done, and something could not."""


def say(message: str) -> None:
    """Print a line for people, on standard error."""
    print(message, file=sys.stderr)  # noqa: T201


def print_json(content: Any) -> None:
    """Print values for machines."""
    print(json.dumps(content, indent=1, allow_nan=False))  # noqa: T201


def console(width: int = 0) -> Console:
    """As wide as the terminal; wide enough for every column where there is none (a pipe, a log)."""
    found = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
    return found if found.width >= width else Console(width=width)


def parse_targets(values: list[str] | None) -> naming.Targets:
    """Repeated and comma-separated suffixes as a list, ``re:REGEX`` as the one expression."""
    if not values:
        return None
    if any(value.startswith("re:") for value in values):
        if len(values) > 1:
            raise UsageError("re: takes one regular expression and nothing beside it")
        expression = values[0].removeprefix("re:")
        try:
            naming.matcher(expression)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return expression
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    return naming.ALL_LINEAR if names == [naming.ALL_LINEAR] else names


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that an option does not know."""
    known = list(choices)
    if value not in known:
        raise UsageError(f"{option} must be one of {', '.join(known)}, not {value!r}")


def as_options(message: str) -> str:
    """A message with arguments as the command line spells them: ``--avg-rank 3``, not ``avg_rank=3``."""

    def spelled(found: re.Match[str]) -> str:
        option = (found["given"] or found["named"] or found["flag"]).replace("_", "-")
        return f"--{option} " if found["given"] else f"--{option}"

    return _ARGUMENT.sub(spelled, message)


@contextmanager
def spelled_as_options(error_type: type[Exception] = ValueError) -> Iterator[None]:
    """Let messages of the library name options."""
    try:
        yield
    except ValueError as error:
        raise error_type(as_options(str(error))) from error


def check_output_folder(path: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something or cannot be written, before any work is done."""
    if path.is_file():
        raise UsageError(f"{path} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{path} is not empty: choose another folder or --overwrite")
    check_writable(path)
