"""The command `info`."""

from __future__ import annotations

from typing import Annotated

import typer

from lorank.adapters.reading import read_adapter
from lorank.cli.adapter_options import Adapter
from lorank.cli.adapter_output import adapter_json
from lorank.cli.options import Json
from lorank.cli.output import console, print_json
from lorank.cli.tables import adapters as tables
from lorank.cli.tables.ranks import rank_map


def info(
    adapter: Adapter,
    modules: Annotated[bool, typer.Option("--modules", help="Show a row for each module.")] = False,
    json_output: Json = False,
) -> None:
    """Show an adapter: its modules, ranks, scalings and types, and its other tensors."""
    loaded = read_adapter(adapter)
    if json_output:
        print_json(adapter_json(loaded))
        return
    terminal = console()
    terminal.print(rank_map(loaded.ranks, f"ranks of {loaded.label}", terminal.width))
    if modules:
        terminal.print(tables.module_table(loaded))
    for line in tables.summary(loaded):
        terminal.print(line, soft_wrap=True)
