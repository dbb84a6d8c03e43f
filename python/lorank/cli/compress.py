"""The command `compress`."""

from __future__ import annotations

from typing import Annotated, Literal, cast

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
from lorank.cli.checks import check_choice
from lorank.cli.errors import UsageError
from lorank.cli.knobs import checked_knobs, with_parameters
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.spelling import spelled_as_options
from lorank.compression.knobs import size_of


def compress(
    adapter: Adapter,
    output: Output,
    rank_ratio: RankRatio = None,
    avg_rank: AvgRank = None,
    energy: Energy = None,
    budget: Budget = None,
    size: Annotated[
        str | None,
        typer.Option(help="Keep the singular values whose factors fit into this size, such as 12MiB."),
    ] = None,
    auto: Auto = False,
    max_rank: MaxRank = None,
    scope: Scope = "global",
    keep: Annotated[
        str, typer.Option(help="Values to keep: largest, or smallest (reverse pruning, for studies).")
    ] = "largest",
    score: Annotated[
        str,
        typer.Option(
            help="sigma: modules compete by singular values. relative: by singular values divided by the "
            "Frobenius norm of the base weight (--base)."
        ),
    ] = "sigma",
    base: Annotated[
        str | None, typer.Option(help="The base model of --score relative: a file, a folder or a hub id.")
    ] = None,
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    modules: Modules = False,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Truncate the updates of a trained adapter to most of their energy (PARA).

    Exactly one of --rank-ratio, --avg-rank, --energy, --budget, --size and --auto selects the size of the
    result.
    """
    check_choice("--score", score, ("sigma", "relative"))
    if (score == "relative") != (base is not None):
        raise UsageError("--score relative and --base need each other")
    if size is not None and size_of(size) is None:
        raise UsageError(f"--size takes a size such as 12MiB or 500KiB, not {size!r}")
    knobs = checked_knobs(
        rank_ratio=rank_ratio,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        size=size,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
        keep=keep,
    )
    target = AdapterOutput(output, profile, dtype, overwrite, threads, json_output, modules)
    target.check()
    with spelled_as_options():
        result = lorank.compress(
            adapter,
            score=cast(Literal["sigma", "relative"], score),
            base=base,
            threads=threads,
            progress=not quiet,
            **with_parameters(knobs, dtype),
        )
    target.write(result)
