"""The command `check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import lorank
from lorank import runtimes
from lorank.cli.adapter_output import check_output, print_notes
from lorank.cli.checks import check_choice
from lorank.cli.errors import IncompleteError
from lorank.cli.options import Json, Overwrite
from lorank.cli.output import console, print_json, print_message
from lorank.cli.tables import verdicts as tables


def check(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter folder, or an image adapter's file.")],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help=f"Check only these runtimes: {', '.join(runtimes.RUNTIMES)}. Repeatable, or separated by "
            "commas.",
        ),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            help="Write the adapter to this folder in a form for these runtimes, and check the result."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model (a folder, config.json or hub id) whose names and shapes the adapter must fit."
        ),
    ] = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Check which runtimes load an adapter correctly, incorrectly, or not at all.

    The exit status is 1 if a runtime of --for does not load the adapter correctly.
    Without --for, only the runtimes that read its format count.
    """
    names = [name.strip() for value in runtime or [] for name in value.split(",")] or None
    for name in names or ():
        check_choice("--for", name, runtimes.RUNTIMES)
    if fix is not None:
        check_output(fix, overwrite)
    if fix is None:
        verdicts = lorank.check(adapter, names, base=base)
    else:
        mended = runtimes.mend(adapter, fix, names, base=base, overwrite=overwrite)
        print_notes(mended.written.notes)
        print_message(
            f"saved to {fix} in the profile {mended.profile}; the verdicts apply to the written files"
        )
        verdicts = list(mended.verdicts)
    if json_output:
        print_json([asdict(verdict) for verdict in verdicts])
    else:
        console().print(tables.verdict_table(verdicts))
    if bad := runtimes.bad(verdicts, names):
        raise IncompleteError(f"{fix or adapter} does not load correctly in {', '.join(bad)}")
