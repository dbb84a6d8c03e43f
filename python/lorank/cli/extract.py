"""The command `extract`."""

from __future__ import annotations

from typing import Annotated

import typer

import lorank
from lorank.cli.adapter_options import (
    Auto,
    AvgRank,
    BudgetOrShare,
    ComputedRank,
    DtypeOption,
    Energy,
    Modules,
    Output,
    ProfileOption,
    Scope,
)
from lorank.cli.adapter_output import AdapterOutput
from lorank.cli.checks import parse_targets
from lorank.cli.knobs import checked_knobs, with_parameters
from lorank.cli.options import Exclude, Guess, Include, Json, Overwrite, Quiet, Threads
from lorank.cli.spelling import spelled_as_options

# Placeholder for the base model's size, to check a budget that is a share.
_BASE_PARAMETERS = 10**12


def extract(
    base: Annotated[str, typer.Argument(help="The base model: a file, a folder or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The fully fine-tuned model: a file, a folder or a hub id.")],
    output: Output,
    include: Include = None,
    exclude: Exclude = None,
    prefix: Annotated[
        str,
        typer.Option(help="Prefix of all module names in the model to adapt, such as bert."),
    ] = "",
    guess: Guess = False,
    avg_rank: AvgRank = None,
    energy: Energy = None,
    budget: BudgetOrShare = None,
    auto: Auto = False,
    max_rank: ComputedRank = None,
    scope: Scope = "global",
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    modules: Modules = False,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Extract a LoRA adapter from the difference of two models.

    Exactly one of --avg-rank, --energy, --budget and --auto selects the size of the result.
    """
    knobs = checked_knobs(
        _BASE_PARAMETERS,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
    )
    targets = parse_targets(include), parse_targets(exclude)
    target = AdapterOutput(output, profile, dtype, overwrite, threads, json_output, modules)
    target.check()
    with spelled_as_options():
        result = lorank.extract(
            base,
            tuned,
            include=targets[0],
            exclude=targets[1],
            prefix=prefix,
            guess=guess,
            threads=threads,
            progress=not quiet,
            **with_parameters(knobs, dtype),
        )
    target.write(result)
