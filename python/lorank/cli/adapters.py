"""Commands about trained adapters: compress, family, merge, extract, check, info."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

import lorank
from lorank import runtimes
from lorank.adapters.content import AdapterContent, Dtype, Profile
from lorank.adapters.families import remove_stale
from lorank.adapters.formats.registry import format_of
from lorank.adapters.profiles import PROFILES, nothing_left
from lorank.adapters.reading import read_adapter
from lorank.adapters.writing import write_adapter
from lorank.cli.options import (
    Exclude,
    Guess,
    Include,
    IncompleteError,
    Json,
    Overwrite,
    Quiet,
    Threads,
    UsageError,
    as_options,
    check_choice,
    check_output_folder,
    console,
    parse_targets,
    print_json,
    say,
    spelled_as_options,
)
from lorank.cli.tables import adapters as tables
from lorank.cli.tables.reports import rank_map
from lorank.compression.extraction import DEFAULT_MAX_RANK
from lorank.compression.knobs import Knobs, with_counted_budget

# Not a Path, which would turn an empty argument into the current folder.
Adapter = Annotated[
    str, typer.Argument(help="A PEFT folder, or a .safetensors file with the keys of kohya or diffusers.")
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
BudgetOrShare = Annotated[
    str | None,
    typer.Option(help="Keep what fits into so many parameters, or into a share of the base model's: 0.5%."),
]
Auto = Annotated[bool, typer.Option("--auto", help="Keep what stands out of a module's noise: a heuristic.")]
MaxRank = Annotated[int | None, typer.Option(min=1, help="No module keeps more.")]
ComputedRank = Annotated[
    int | None,
    typer.Option(
        min=1, help="No module keeps more, and no more is computed.", show_default=str(DEFAULT_MAX_RANK)
    ),
]
Scope = Annotated[str, typer.Option(help="global: modules compete. module: one rank everywhere.")]
ProfileOption = Annotated[
    str, typer.Option(help="compact (PEFT, vLLM), portable (every runtime) or tensor-rank (also llama.cpp).")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, float16, bfloat16 or float64 (default: as it was).")
]


Modules = Annotated[bool, typer.Option("--modules", help="A row for every module, before and after.")]


_AMOUNTS = ("rank_ratio", "avg_rank", "energy", "budget", "auto")


def _knobs(base_parameters: int | None = None, **given: Any) -> dict[str, Any]:
    """The knobs that were given; exactly one that says how much to keep is wanted.

    `base_parameters` may be any number where a budget can be a share: it is enough to judge by.
    """
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    options = {name: f"--{name.replace('_', '-')}" for name in _AMOUNTS if name in given}
    wanted = [name for name in options if name in chosen]
    if len(wanted) != 1:
        *most, last = options.values()
        raise UsageError(f"give exactly one of {', '.join(most)} and {last}")
    with spelled_as_options(UsageError):
        counted = chosen if base_parameters is None else with_counted_budget(chosen, base_parameters)
        knobs = Knobs(**counted)
    if knobs.keep_nothing:
        option = options[wanted[0]]
        raise UsageError(f"{option} {chosen[wanted[0]]} keeps nothing: ask for a larger {option}")
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
    modules: Modules = False,
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
    _check_form(profile, dtype)
    _check_output(output, overwrite)
    with spelled_as_options():
        result = lorank.compress(adapter, threads=threads, progress=not quiet, **knobs)
    _finish(result, output, profile, dtype, overwrite, json_output, modules, threads)


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
    ranks = _average_ranks(avg_ranks)
    _check_form(profile, dtype)
    check_output_folder(output, overwrite)
    parent = lorank.elastic(adapter, threads=threads, progress=not quiet)
    children = lorank.family(parent, ranks, threads=threads, progress=False)
    members = {"elastic": parent} | {f"rank-{rank:g}": child for rank, child in children.items()}
    for name, member in members.items():
        if reason := nothing_left(member):
            raise ValueError(f"{name}: {reason}")
    stored = {}
    for name, member in members.items():
        target = output / format_of(member).member_name(name)
        written = write_adapter(
            member, target, cast(Profile, profile), dtype, overwrite=overwrite, threads=threads
        )
        stored[name] = written.stored_parameters
        _say_notes(f"{name}: {note}" for note in written.notes)
    _say_notes(remove_stale(output, members))
    if json_output:
        content = {name: _content(member, dtype) for name, member in members.items()}
        print_json({name: {**content[name], "stored_parameters": stored[name]} for name in members})
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
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Merge although base models have different names, or no module is shared."
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
    _check_form(profile, dtype)
    _check_output(output, overwrite)
    with spelled_as_options():
        result = lorank.merge(paths, weights, force=force, threads=threads, progress=not quiet, **knobs)
    _finish(result, output, profile, dtype, overwrite, json_output, modules, threads)


def extract(
    base: Annotated[str, typer.Argument(help="The model before: a file, a folder or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The model after its full fine-tune.")],
    output: Output,
    include: Include = None,
    exclude: Exclude = None,
    prefix: Annotated[
        str, typer.Option(help="Put before every module's name, such as bert, if the model to adapt has it.")
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
    """A LoRA adapter from the difference of two models."""
    knobs = _knobs(
        10**12,
        avg_rank=avg_rank,
        energy=energy,
        budget=budget,
        auto=auto,
        max_rank=max_rank,
        scope=scope,
    )
    targets = parse_targets(include), parse_targets(exclude)
    _check_form(profile, dtype)
    _check_output(output, overwrite)
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
            **knobs,
        )
    _finish(result, output, profile, dtype, overwrite, json_output, modules, threads)


def check(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter folder, or an image adapter's file.")],
    runtime: Annotated[
        list[str] | None,
        typer.Option("--for", help=f"Only these: {', '.join(runtimes.RUNTIMES)}. Repeatable, or a,b."),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            help="Write the adapter again to this folder, to fit these runtimes, and check the result."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model (a folder, config.json or hub id), to check names and shapes against."
        ),
    ] = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Show which runtimes load an adapter right, wrong, or not at all.

    Status 1 unless all of `--for`, or all that read adapters of its format, load it right.
    """
    wanted = [name.strip() for value in runtime or [] for name in value.split(",")] or None
    for name in wanted or ():
        check_choice("--for", name, runtimes.RUNTIMES)
    if fix is not None:
        _check_output(fix, overwrite)
    if fix is None:
        verdicts = lorank.check(adapter, wanted, base=base)
    else:
        mended = runtimes.mend(adapter, fix, wanted, base=base, overwrite=overwrite)
        _say_notes(mended.written.notes)
        say(f"saved to {fix} in the profile {mended.profile}; the verdicts are about what was written")
        verdicts = list(mended.verdicts)
    if json_output:
        print_json([tables.verdict_json(verdict) for verdict in verdicts])
    else:
        console().print(tables.verdict_table(verdicts))
    if bad := runtimes.bad(verdicts, wanted):
        raise IncompleteError(f"{fix or adapter} does not load right in {', '.join(bad)}")


def info(
    adapter: Adapter,
    modules: Annotated[bool, typer.Option("--modules", help="A row for every module.")] = False,
    json_output: Json = False,
) -> None:
    """What an adapter holds: modules, ranks, scalings, types, and what is no factor."""
    loaded = read_adapter(adapter)
    if json_output:
        print_json(_content(loaded))
        return
    terminal = console()
    terminal.print(rank_map(loaded.ranks, f"ranks of {loaded.label}", terminal.width))
    if modules:
        terminal.print(tables.module_table(loaded))
    terminal.print(tables.summary(loaded), soft_wrap=True, markup=False)


COMMANDS = (compress, family, merge, extract, check, info)


def _average_ranks(text: str) -> list[float]:
    try:
        ranks = [float(rank) for rank in text.split(",")]
    except ValueError:
        raise UsageError(f"--avg-ranks takes numbers such as 1,2,4,8, not {text!r}") from None
    for rank in ranks:
        if not 0 < rank < math.inf:
            raise UsageError(f"--avg-ranks takes finite numbers above 0, not {rank:g}")
    return ranks


def _weighted(arguments: list[str]) -> tuple[list[str], list[float] | None]:
    """Paths and weights from ``PATH`` or ``PATH:WEIGHT``."""
    parts = [_weight(argument) for argument in arguments]
    paths, weights = [path for path, _ in parts], [weight for _, weight in parts]
    if all(weight is None for weight in weights):
        return paths, None
    if any(weight is None for weight in weights):
        raise UsageError("give a weight to every adapter or to none: A:0.7 B:0.3")
    return paths, [weight for weight in weights if weight is not None]


def _weight(argument: str) -> tuple[str, float | None]:
    path, colon, text = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return argument, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"{argument}: there is no such path, and {text!r} is no finite weight of {path}")
    return path, weight


def _check_form(profile: str, dtype: str | None) -> None:
    check_choice("--profile", profile, PROFILES)
    if dtype is not None:
        check_choice("--dtype", dtype, get_args(Dtype))


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix == ".safetensors":
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists: choose another name or --overwrite")
        return
    check_output_folder(path, overwrite)


def _finish(
    result: AdapterContent,
    output: Path,
    profile: str,
    dtype: str | None,
    overwrite: bool,
    json_output: bool,
    modules: bool,
    threads: int | None,
) -> None:
    """Save, and say what was done."""
    written = write_adapter(
        result, output, cast(Profile, profile), dtype, overwrite=overwrite, threads=threads
    )
    certificate = written.certificate
    assert certificate is not None
    if json_output:
        content = _content(result.with_certificate(certificate), dtype)
        print_json({**content, "profile": profile, "stored_parameters": written.stored_parameters})
        return
    terminal = console()
    terminal.print(rank_map(result.ranks, "ranks", terminal.width))
    if modules:
        terminal.print(tables.kept_table(certificate))
    terminal.print(tables.certificate_table(certificate))
    for note in result.notes:
        terminal.print(as_options(note), style="dim", soft_wrap=True, markup=False)
    _say_notes(written.notes)
    say(f"saved to {written.path}")


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        say(as_options(note))


def _content(adapter: AdapterContent, dtype: str | None = None) -> dict[str, Any]:
    """What an adapter holds, as it is written if that was in another `dtype`."""
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
                "dtype": dtype or module.dtype,
                "copies": module.copies,
            }
            for module in adapter.modules.values()
        ],
        "certificate": adapter.certificate.to_json() if adapter.certificate else None,
    }
