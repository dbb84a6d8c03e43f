"""The command `compress`."""

from __future__ import annotations

from typing import Annotated

import typer

import lorank
from lorank.cli.adapter_options import (
    Adapter,
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
from lorank.cli.knobs import checked_knobs
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.spelling import spelled_as_options


def compress(
    adapter: Adapter,
    output: Output,
    rank_ratio: RankRatio = None,
    avg_rank: AvgRank = None,
    energy: Energy = None,
    budget: Budget = None,
    auto: Auto = False,
    max_rank: MaxRank = None,
    scope: Scope = "global",
    keep: Annotated[
        str, typer.Option(help="Values to keep: largest, or smallest (reverse pruning, for studies).")
    ] = "largest",
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    modules: Modules = False,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Truncate the updates of a trained adapter to most of their energy (PARA).

    Exactly one of --rank-ratio, --avg-rank, --energy, --budget and --auto selects the size of the result.
    """
    knobs = checked_knobs(
        rank_ratio=rank_ratio,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
        keep=keep,
    )
    target = AdapterOutput(output, profile, dtype, overwrite, threads, json_output, modules)
    target.check()
    with spelled_as_options():
        result = lorank.compress(adapter, threads=threads, progress=not quiet, **knobs)
    target.write(result)
