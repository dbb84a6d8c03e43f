"""The command `family`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

import lorank
from lorank.adapters.content import Profile
from lorank.adapters.families import check_replaceable, member_name
from lorank.adapters.profiles import nothing_left
from lorank.adapters.writing import write_family
from lorank.cli.adapter_options import Adapter, DtypeOption, ProfileOption
from lorank.cli.adapter_output import adapter_json, check_form, print_notes
from lorank.cli.checks import check_output_folder
from lorank.cli.errors import UsageError
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.output import console, print_json, print_message
from lorank.cli.spelling import spelled_as_options
from lorank.cli.tables import adapters as tables
from lorank.compression.knobs import amount_of, in_parameters


def family(
    adapter: Adapter,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the children and the elastic parent.")
    ],
    avg_ranks: Annotated[
        str | None, typer.Option(help="Average ranks of the children, such as 1,2,4,8.")
    ] = None,
    rank_ratios: Annotated[
        str | None, typer.Option(help="Shares of the non-zero singular values to keep, such as 0.25,0.5.")
    ] = None,
    energies: Annotated[
        str | None, typer.Option(help="Shares of the energy to keep, such as 0.9,0.99.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Numbers of parameters or sizes, such as 500k,12MiB.")
    ] = None,
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compress an adapter to several sizes, and write the elastic parent of the results.

    Give at least one of --avg-ranks, --rank-ratios, --energies and --budgets.
    """
    ranks = _numbers("--avg-ranks", avg_ranks, math.inf)
    ratios = _numbers("--rank-ratios", rank_ratios, 1.0)
    shares = _numbers("--energies", energies, 1.0)
    amounts = _amounts(budgets)
    if not (ranks or ratios or shares or amounts):
        raise UsageError("give at least one of --avg-ranks, --rank-ratios, --energies and --budgets")
    check_form(profile, dtype)
    check_output_folder(output, overwrite)
    names: dict[float | str, str] = {rank: f"rank-{rank:g}" for rank in ranks}
    names |= {name: name for name in _named(ratios, shares)}
    check_replaceable(
        output, ["elastic", *names.values(), *(member_name("budget", amount) for amount in amounts)]
    )
    parent = lorank.elastic(adapter, threads=threads, progress=not quiet)
    # The names hold the sizes as given; the budgets count parameters of the written type.
    counted = {value: value if dtype is None else in_parameters(value, dtype) for value in amounts}
    children = lorank.family(
        parent,
        ranks,
        rank_ratios=ratios,
        energies=shares,
        budgets=list(counted.values()),
        threads=threads,
        progress=False,
    )
    members = {"elastic": parent} | {name: children[key] for key, name in names.items()}
    members |= {
        member_name("budget", given): children[member_name("budget", used)] for given, used in counted.items()
    }
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


def _named(ratios: Sequence[float], energies: Sequence[float]) -> list[str]:
    """Return the names of members that keep a share of the values or of the energy."""
    return [
        *(member_name("ratio", ratio) for ratio in ratios),
        *(member_name("energy", energy) for energy in energies),
    ]


def _numbers(option: str, text: str | None, most: float) -> list[float]:
    example = "1,2,4,8" if most == math.inf else "0.5,0.9"
    try:
        numbers = [float(number) for number in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"{option} takes numbers such as {example}, not {text!r}") from None
    for number in numbers:
        if not 0 < number <= most or number == math.inf:
            limit = "finite numbers above 0" if most == math.inf else f"numbers above 0, at most {most:g}"
            raise UsageError(f"{option} takes {limit}, not {number:g}")
    return numbers


def _amounts(text: str | None) -> list[str]:
    amounts = [amount.strip() for amount in text.split(",")] if text is not None else []
    for amount in amounts:
        with spelled_as_options(UsageError):
            if amount_of(amount) == 0:
                raise UsageError(f"--budgets takes numbers and sizes above 0, not {amount}")
    return amounts
