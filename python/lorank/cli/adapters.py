"""Commands about trained adapters: compress, family, merge, extract, check, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import lorank
from lorank import runtimes
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.writing import write_adapter
from lorank.cli.options import (
    Exclude,
    Include,
    IncompleteError,
    Json,
    Overwrite,
    Quiet,
    Threads,
    UsageError,
    check_output_folder,
    console,
    parse_targets,
    print_json,
    say,
)
from lorank.report import adapters as tables
from lorank.report.table import rank_map
from lorank.selection import Knobs

Adapter = Annotated[
    Path, typer.Argument(help="A PEFT folder, or a .safetensors file with the keys of kohya or diffusers.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write: a folder, or a file.")]
RankRatio = Annotated[
    float | None, typer.Option(help="Keep this share of all singular values, the largest anywhere.")
]
AvgRank = Annotated[float | None, typer.Option(help="Keep so many singular values per module on average.")]
Energy = Annotated[
    float | None, typer.Option(help="Keep the fewest singular values that hold this share of the energy.")
]
Budget = Annotated[
    str | None, typer.Option(help="Keep what fits into so many parameters: 500000, 500k or 1.5M.")
]
Auto = Annotated[bool, typer.Option("--auto", help="Keep what stands out of a module's noise: a heuristic.")]
MaxRank = Annotated[int | None, typer.Option(min=1, help="No module keeps more.")]
Scope = Annotated[str, typer.Option(help="global: modules compete. module: one rank everywhere.")]
ProfileOption = Annotated[
    str, typer.Option(help="compact (PEFT, vLLM), portable (every runtime) or tensor-rank (also llama.cpp).")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, float16, bfloat16 or float64 (default: as it was).")
]


def _knobs(**given: Any) -> dict[str, Any]:
    """The knobs that were given; exactly one of the first five is wanted."""
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    names = [name for name in ("rank_ratio", "avg_rank", "energy", "budget", "auto") if name in chosen]
    if len(names) != 1:
        raise UsageError("give exactly one of --rank-ratio, --avg-rank, --energy, --budget and --auto")
    try:
        Knobs(**chosen)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return chosen


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
    keep: Annotated[str, typer.Option(help="largest; or smallest, to study reverse pruning.")] = "largest",
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Truncate a trained adapter to where the energy of its update is (PARA)."""
    knobs = _knobs(
        rank_ratio=rank_ratio,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
        keep=keep,
    )
    _check_output(output, overwrite)
    result = lorank.compress(LoraAdapter.load(adapter), threads=threads, progress=not quiet, **knobs)
    _finish(result, output, profile, dtype, overwrite, json_output)


def family(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for the children and the parent.")],
    avg_ranks: Annotated[str, typer.Option(help="Average ranks of the children, such as 1,2,4,8.")],
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Many compressed children of an adapter, and an elastic parent, from one decomposition."""
    try:
        ranks = [float(rank) for rank in avg_ranks.split(",")]
    except ValueError:
        raise UsageError(f"--avg-ranks takes numbers such as 1,2,4,8, not {avg_ranks!r}") from None
    _check_output(output, overwrite)
    parent = lorank.elastic(LoraAdapter.load(adapter), threads=threads, progress=not quiet)
    children = lorank.family(parent, ranks, threads=threads, progress=False)
    members = {"elastic": parent} | {f"rank-{rank:g}": child for rank, child in children.items()}
    for name, member in members.items():
        if not member.adapted:
            raise UsageError(f"{name} would have no module left: ask for a larger average rank")
    for name, member in members.items():
        target = output / (name if member.format == "peft" else f"{name}.safetensors")
        member.save(target, profile, dtype, overwrite=overwrite)  # type: ignore[arg-type]
    if json_output:
        print_json({name: _content(member) for name, member in members.items()})
        return
    console().print(tables.family_table(members))
    say(f"saved to {output}")


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters with their weights: A:0.7 B:0.3. Without weights: equal.")
    ],
    output: Output,
    rank_ratio: RankRatio = None,
    avg_rank: AvgRank = None,
    energy: Energy = None,
    budget: Budget = None,
    auto: Auto = False,
    max_rank: MaxRank = None,
    scope: Scope = "global",
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """One adapter for the weighted sum of several."""
    knobs = _knobs(
        rank_ratio=rank_ratio,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
    )
    paths, weights = _weighted(adapters)
    _check_output(output, overwrite)
    loaded = [LoraAdapter.load(path) for path in paths]
    result = lorank.merge(loaded, weights, threads=threads, progress=not quiet, **knobs)
    _finish(result, output, profile, dtype, overwrite, json_output)


def extract(
    base: Annotated[str, typer.Argument(help="The model before: a file, a folder or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The model after its full fine-tune.")],
    output: Output,
    include: Include = None,
    exclude: Exclude = None,
    prefix: Annotated[
        str, typer.Option(help="Put before every module's name, such as bert, if the model to adapt has it.")
    ] = "",
    avg_rank: AvgRank = None,
    energy: Energy = None,
    budget: Budget = None,
    auto: Auto = False,
    max_rank: MaxRank = None,
    scope: Scope = "global",
    profile: ProfileOption = "compact",
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """A LoRA adapter from the difference of two models."""
    knobs = _knobs(avg_rank=avg_rank, energy=energy, budget=budget, auto=auto, max_rank=max_rank, scope=scope)
    _check_output(output, overwrite)
    result = lorank.extract(
        base,
        tuned,
        include=parse_targets(include),
        exclude=parse_targets(exclude),
        prefix=prefix,
        threads=threads,
        progress=not quiet,
        **knobs,
    )
    _finish(result, output, profile, dtype, overwrite, json_output)


def check(
    adapter: Annotated[Path, typer.Argument(help="A PEFT adapter folder.")],
    runtime: Annotated[
        list[str] | None,
        typer.Option("--for", help=f"Only these: {', '.join(runtimes.RUNTIMES)}. Repeatable, or a,b."),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(help="Write it again to this folder, in a profile for these runtimes."),
    ] = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Which runtimes load an adapter right, wrong, or not at all. Status 1 unless all load it right."""
    wanted = [name for value in runtime or [] for name in value.split(",")] or None
    verdicts = lorank.check(adapter, wanted)
    if fix is not None:
        _check_output(fix, overwrite)
        profile = runtimes.right_profile(wanted)
        LoraAdapter.load(adapter).save(fix, profile, overwrite=overwrite)
        say(f"saved to {fix} in the profile {profile}")
        verdicts = lorank.check(fix, wanted)
    if json_output:
        print_json([tables.verdict_json(verdict) for verdict in verdicts])
    else:
        console().print(tables.verdict_table(verdicts))
    bad = [verdict.runtime for verdict in verdicts if verdict.status != "right"]
    if bad:
        raise IncompleteError(f"{fix or adapter} does not load right in {', '.join(bad)}")


def info(
    adapter: Adapter,
    modules: Annotated[bool, typer.Option("--modules", help="A row for every module.")] = False,
    json_output: Json = False,
) -> None:
    """What an adapter holds: modules, ranks, scalings, types, and what is no factor."""
    loaded = LoraAdapter.load(adapter)
    if json_output:
        print_json(_content(loaded))
        return
    terminal = console()
    terminal.print(rank_map(loaded.ranks, f"ranks of {loaded.label}"))
    if modules:
        terminal.print(tables.module_table(loaded))
    terminal.print(tables.summary(loaded), soft_wrap=True)


COMMANDS = (compress, family, merge, extract, check, info)


def _weighted(arguments: list[str]) -> tuple[list[Path], list[float] | None]:
    """Paths and weights from ``PATH`` or ``PATH:WEIGHT``."""
    paths, weights = [], []
    for argument in arguments:
        path, colon, weight = argument.rpartition(":")
        try:
            number = float(weight) if colon else None
        except ValueError:
            number = None
        paths.append(Path(argument if number is None else path))
        weights.append(number)
    if all(weight is None for weight in weights):
        return paths, None
    if any(weight is None for weight in weights):
        raise UsageError("give a weight to every adapter or to none: A:0.7 B:0.3")
    return paths, [weight for weight in weights if weight is not None]


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix == ".safetensors":
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists: choose another name or --overwrite")
        return
    check_output_folder(path, overwrite)


def _finish(
    result: LoraAdapter, output: Path, profile: str, dtype: str | None, overwrite: bool, json_output: bool
) -> None:
    """Save, and say what was done."""
    written, certificate = write_adapter(result, output, profile, dtype, overwrite=overwrite)  # type: ignore[arg-type]
    assert certificate is not None
    if json_output:
        print_json({**_content(result.with_certificate(certificate)), "profile": profile})
        return
    terminal = console()
    terminal.print(rank_map(result.ranks, "ranks"))
    terminal.print(tables.certificate_table(certificate))
    for note in result.notes:
        terminal.print(note, style="dim", soft_wrap=True)
    if profile == "portable":
        terminal.print(tables.portable_advice(result), soft_wrap=True)
    say(f"saved to {written}")


def _content(adapter: LoraAdapter) -> dict[str, Any]:
    return {
        "label": adapter.label,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "num_parameters": adapter.num_parameters,
        "notes": list(adapter.notes),
        "modules": [
            {
                "name": module.name,
                "kind": module.kind,
                "shape": list(module.shape),
                "rank": module.rank,
                "scaling": module.scaling,
                "dtype": module.dtype,
                "copies": module.copies,
            }
            for module in adapter.modules.values()
        ],
        "certificate": adapter.certificate.to_json() if adapter.certificate else None,
    }
