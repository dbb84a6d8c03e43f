"""The command line. One thin function a command: arguments in, library call, tables out."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import lorank
from lorank.cli import adapters, spectra, tasks
from lorank.cli.options import IncompleteError, UsageError, say

app = typer.Typer(
    help="LoRA ranks from spectra: before, during and after fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(spectra.analyze)
app.command()(spectra.report)
app.command(epilog=spectra.methods_help())(spectra.allocate)
for command in (*tasks.COMMANDS, *adapters.COMMANDS):
    app.command()(command)
_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorank {lorank.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    del version
    global _debug
    _debug = debug


def main() -> None:
    """Entry point: one clear line and status 1 for errors, 2 for bad usage."""
    try:
        app()
    except UsageError as error:
        _fail(f"usage: {error}", 2)
    except (
        lorank.LorankError,
        IncompleteError,
        OSError,
        ValueError,
        TypeError,
        ImportError,
        KeyError,
        MemoryError,
    ) as error:
        if _debug:
            raise
        _fail(_message(error), 1)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


def _fail(message: str, status: int) -> None:
    first_line = message.strip().splitlines()[0] if message.strip() else "unknown error"
    say(f"lorank: {first_line}")
    sys.exit(status)
