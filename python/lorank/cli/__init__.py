"""The command line: a function for each command, which calls the library and prints tables."""

from __future__ import annotations

import sys
from typing import Annotated

from lorank.cli.signals import ending_signals_exit

with ending_signals_exit():  # Imports take most of the time of a short command.
    import typer

    import lorank
    from lorank.cli import (
        allocate,
        analyze,
        bake,
        check,
        compare,
        compress,
        convert,
        extract,
        family,
        info,
        merge,
        report,
        task,
        verify,
    )
    from lorank.cli.errors import IncompleteError, UndecidedError, UsageError
    from lorank.cli.group import CommandGroup
    from lorank.cli.output import print_message
    from lorank.cli.process import conventional

app = typer.Typer(
    cls=CommandGroup,
    help="LoRA ranks from spectra: before, during and after fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(analyze.analyze)
app.command()(report.report)
app.command()(compare.compare)
app.command(epilog=allocate.methods_help())(allocate.allocate)
app.command()(task.task)
app.command()(compress.compress)
app.command()(family.family)
app.command()(merge.merge)
app.command()(extract.extract)
app.command()(bake.bake)
app.command()(verify.verify)
app.command()(convert.convert)
app.command()(check.check)
app.command()(info.info)
_debug = False


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"lorank {lorank.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version
    global _debug
    _debug = debug


@conventional
def main() -> None:
    """Run the command line; an error prints one line and exits with status 1, 2 or 3 (see `errors`)."""
    try:
        app()
    except UsageError as error:
        _fail(f"usage: {error}", 2)
    except UndecidedError as error:
        _fail(str(error), 3)
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
    except Exception as error:
        if _debug:
            raise
        _fail(
            f"internal error: {type(error).__name__}: {_first_line(str(error))} (a defect of lorank "
            f"{lorank.__version__}: please report it with the output of lorank --debug ...)",
            1,
        )


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


def _fail(message: str, status: int) -> None:
    print_message(f"lorank: {message.strip() or 'unknown error'}")
    sys.exit(status)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "unknown error"
