"""The command `merge`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

import lorank
from lorank.cli.adapter_options import (
    Auto,
    AvgRank,
    Budget,
    DtypeOption,
    Energy,
    MaxRank,
    Modules,
    Output,
    ProfileOption,
    RankRatio,
    Scope,
)
from lorank.cli.adapter_output import AdapterOutput
from lorank.cli.errors import UsageError
from lorank.cli.knobs import checked_knobs, with_parameters
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.spelling import spelled_as_options
from lorank.cli.weights import weighted
from lorank.compression.merge_methods import Election, MergeMethod, Method


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapters with weights, such as A:0.7 B:0.3; without weights, all count equally."
        ),
    ],
    output: Output,
    method: Annotated[
        str, typer.Option(help="sum, or by element of dense updates: ties, dare, dare-ties or magnitude.")
    ] = "sum",
    density: Annotated[
        float | None,
        typer.Option(help="Share of the elements of each update that methods other than sum keep."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of dare and dare-ties.")] = 0,
    election: Annotated[
        str,
        typer.Option(help="Sign that ties keeps: of the sum of updates (total), or of most (frequency)."),
    ] = "total",
    rank_ratio: RankRatio = None,
    avg_rank: AvgRank = None,
    energy: Energy = None,
    budget: Budget = None,
    auto: Auto = False,
    max_rank: MaxRank = None,
    scope: Scope = "global",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Merge adapters that share no module, or whose base models have different names.",
        ),
    ] = False,
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    modules: Modules = False,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters into one adapter of their weighted sum.

    Exactly one of --rank-ratio, --avg-rank, --energy, --budget and --auto selects the size of the result.

    --energy 1 keeps the exact sum. Methods other than sum prune each update to --density first.
    """
    knobs = checked_knobs(
        rank_ratio=rank_ratio,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
    )
    with spelled_as_options(UsageError):
        MergeMethod(cast(Method, method), density, seed, cast(Election, election))
    paths, weights = weighted(adapters)
    target = AdapterOutput(output, profile, dtype, overwrite, threads, json_output, modules)
    target.check()
    with spelled_as_options():
        result = lorank.merge(
            paths,
            weights,
            method=cast(Method, method),
            density=density,
            seed=seed,
            election=cast(Election, election),
            force=force,
            threads=threads,
            progress=not quiet,
            **with_parameters(knobs, dtype),
        )
    target.write(result)
