"""The command `family`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast

import typer

import lorank
from lorank.adapters.content import Profile
from lorank.adapters.families import check_replaceable
from lorank.adapters.profiles import nothing_left
from lorank.adapters.writing import write_family
from lorank.cli.adapter_options import Adapter, DtypeOption, ProfileOption
from lorank.cli.adapter_output import adapter_json, check_form, print_notes
from lorank.cli.checks import check_output_folder
from lorank.cli.errors import UsageError
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.output import console, print_json, print_message
from lorank.cli.tables import adapters as tables


def family(
    adapter: Adapter,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the children and the elastic parent.")
    ],
    avg_ranks: Annotated[str, typer.Option(help="Average ranks of the children, such as 1,2,4,8.")],
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compress an adapter to several average ranks, and write the elastic parent of the results."""
    ranks = _average_ranks(avg_ranks)
    check_form(profile, dtype)
    check_output_folder(output, overwrite)
    check_replaceable(output, ["elastic", *(f"rank-{rank:g}" for rank in ranks)])
    parent = lorank.elastic(adapter, threads=threads, progress=not quiet)
    children = lorank.family(parent, ranks, threads=threads, progress=False)
    members = {"elastic": parent} | {f"rank-{rank:g}": child for rank, child in children.items()}
    for name, member in members.items():
        if reason := nothing_left(member):
            raise ValueError(f"{name}: {reason}")
    written, notes = write_family(
        members, output, cast(Profile, profile), dtype, overwrite=overwrite, threads=threads
    )
    for name in members:
        print_notes(f"{name}: {note}" for note in written[name].notes)
    print_notes(notes)
    if json_output:
        content = {name: adapter_json(member, dtype) for name, member in members.items()}
        print_json(
            {
                name: {**content[name], "stored_parameters": written[name].stored_parameters}
                for name in members
            }
        )
        return
    console().print(tables.family_table(members))
    print_message(f"saved to {output}")


def _average_ranks(text: str) -> list[float]:
    try:
        ranks = [float(rank) for rank in text.split(",")]
    except ValueError:
        raise UsageError(f"--avg-ranks takes numbers such as 1,2,4,8, not {text!r}") from None
    for rank in ranks:
        if not 0 < rank < math.inf:
            raise UsageError(f"--avg-ranks takes finite numbers above 0, not {rank:g}")
    return ranks
