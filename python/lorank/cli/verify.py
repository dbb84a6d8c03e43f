"""The command `verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import lorank
from lorank._internal.atomic import write_text
from lorank.baking.verify import Verification
from lorank.cli.adapter_output import print_notes
from lorank.cli.checks import check_new
from lorank.cli.errors import IncompleteError, UndecidedError, UsageError
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.output import console, print_json, print_message
from lorank.cli.spelling import spelled_as_options
from lorank.cli.tables import verification as tables
from lorank.cli.weights import weighted


def verify(
    base: Annotated[str, typer.Argument(help="The base model: a safetensors file, a folder or a hub id.")],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER... BAKED",
            help="Adapters, with weights such as A:0.7 B:0.3, and last the model to check.",
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the result as JSON.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show a row for each tensor with an update.")] = False,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Check that a model is its base model with the updates of adapters.

    The exit status is 0 if all tensors hold their updates, 1 if one does not, and 3 if that cannot be
    decided: a tensor is missing or unreadable, or rounding leaves nothing of an update.
    """
    if len(models) < 2:
        raise UsageError("give at least one adapter, and last the model to check")
    paths, weights = weighted(models[:-1])
    if output is not None:
        check_new(output, overwrite)
    with spelled_as_options():
        found = lorank.verify(base, paths, models[-1], weights, threads=threads, progress=not quiet)
    if output is not None:
        write_text(output, json.dumps(_json(found), indent=2) + "\n")
    print_notes(found.notes)
    if json_output:
        print_json(_json(found))
    else:
        terminal = console()
        terminal.print(tables.summary_table(found))
        rows = [check for check in (*found.tensors, *found.others) if every or check.status != "holds"]
        if rows:
            terminal.print(tables.tensor_table(rows))
    if output is not None and not json_output:
        print_message(f"saved to {output}")
    _check(found, models[-1])


def _json(found: Verification) -> dict[str, Any]:
    return {"status": found.status, **asdict(found)}


def _check(found: Verification, label: str) -> None:
    """Raise an error unless all tensors hold their updates."""
    checks = [check for check in (*found.tensors, *found.others) if check.status == found.status]
    if found.status == "holds":
        return
    first = checks[0]
    text = f"{label}: {len(checks)} tensors: {found.status}; the first is {first.name}: {first.reason}"
    if found.status == "unknown":
        raise UndecidedError(text)
    raise IncompleteError(text)
