"""Commands about a model and what was measured of it: analyze, report, allocate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

import lorank
from lorank._internal.atomic import check_writable
from lorank._internal.progress import waiting
from lorank.allocation import signals
from lorank.allocation.budget import parse_budget
from lorank.allocation.rank_allocation import RankAllocation
from lorank.analysis.single import Accuracy
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
from lorank.cli.tables import profiles, reports
from lorank.modules import naming
from lorank.modules.facts import ModelFacts
from lorank.modules.roles import Placement, check_expressions
from lorank.peft_format import config_file
from lorank.report import METRICS, SpectralReport
from lorank.report.base import Evidence
from lorank.report.files import to_json
from lorank.report.gradients import GradientReport
from lorank.report.loading import AnyReport, load_report
from lorank.report.tasks import TaskReport
from lorank.sources import OPENING, open_source
from lorank.sources import Source as OpenedSource
from lorank.sources.guesses import doubtful

_REPORT_ENDINGS = (".json", ".parquet", ".csv")
# So many modules with the same remark are named, of more one.
_FEW = 3
# The numbers that rows of any report have.
_ALL_COLUMNS = (*METRICS, *GradientReport.columns, *TaskReport.columns)
# Where the reports come from that a method needs.
_MAKERS: Mapping[Evidence, str] = {
    "spectra": "make it by lorank analyze MODEL -o report.json",
    "gradients": "make it in Python by lorank.profile_gradients(model, batches).save('report.json')",
    "tasks": "make it in Python by lorank.profile_tasks(model, batches).save('report.json')",
}

Source = Annotated[
    str,
    typer.Argument(help="A .safetensors file, a folder of shards, a .bin/.pt state dict, or a hub id."),
]
Sort = Annotated[str | None, typer.Option(help="Order rows by name or by a metric.")]
Descending = Annotated[bool, typer.Option("--descending", "-d", help="Largest first.")]
Top = Annotated[int | None, typer.Option(min=1, help="Show only the first rows.")]
Columns = Annotated[
    str | None,
    typer.Option(help=f"Columns of the table, or 'all': {', '.join(METRICS)}.", show_default=False),
]
ShowSkipped = Annotated[bool, typer.Option("--skipped", help="List what was skipped, and why.")]


def analyze(
    source: Source,
    include: Include = None,
    exclude: Exclude = None,
    sort: Sort = None,
    descending: Descending = False,
    top: Top = None,
    columns: Columns = None,
    skipped: ShowSkipped = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the report: .parquet, .csv or .json.")
    ] = None,
    keep_eigenvalues: Annotated[
        bool, typer.Option("--keep-eigenvalues", help="Keep every spectrum in the saved report.")
    ] = False,
    accuracy: Annotated[
        str,
        typer.Option(
            help="exact (float64); fast: float32 wherever its error bounds allow; sampled: estimates of "
            "large matrices, with error bars."
        ),
    ] = "exact",
    resume: Annotated[
        Path | None, typer.Option(help="Journal of finished matrices: an interrupted run goes on from it.")
    ] = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Spectral metrics of every weight matrix of a model."""
    if output is not None:
        _check_output_file(output, overwrite)
    if _is_report(source):
        raise UsageError(f"{source} looks like a saved report: see lorank report")
    _check_shown(sort, columns, METRICS)
    check_choice("--accuracy", accuracy, get_args(Accuracy))
    try:
        report = lorank.analyze(
            source,
            include=parse_targets(include),
            exclude=parse_targets(exclude),
            accuracy=cast(Accuracy, accuracy),
            threads=threads,
            resume=resume,
            progress=not quiet,
            keep_eigenvalues=keep_eigenvalues,
        )
    except KeyboardInterrupt:
        if resume is not None:
            say(f"lorank: interrupted; the same command goes on from {resume}")
        raise
    if output is not None:
        report.save(output)
    _show(report, sort, descending, top, columns, skipped, json_output)
    if output is not None and not json_output:
        say(f"saved to {output}")
    _fail_if_incomplete(report)


def report(
    file: Annotated[
        Path,
        typer.Argument(
            help="A report of analyze (.parquet, .csv, .json), profile_gradients or profile_tasks (.json)."
        ),
    ],
    include: Include = None,
    exclude: Exclude = None,
    sort: Sort = None,
    descending: Descending = False,
    top: Top = None,
    columns: Columns = None,
    skipped: ShowSkipped = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with pictures, to open in a browser.")
    ] = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Show a saved report, or draw it."""
    _check_shown(sort, columns, _ALL_COLUMNS)
    if html is not None and html.exists() and not overwrite:
        raise UsageError(f"{html} exists: choose another name or --overwrite")
    whole = load_report(file)
    _check_shown(sort, columns, _columns_of(whole))
    names = naming.filtered(
        {row.module for row in whole.modules}, parse_targets(include), parse_targets(exclude)
    )
    loaded = _with_rows(whole, [row for row in whole.modules if row.module in set(names)])
    if not loaded.modules:
        raise ValueError(f"{file}: none of its {len(whole)} matrices is left by --include and --exclude")
    if html is not None:
        if not isinstance(loaded, SpectralReport):
            raise UsageError(f"--html draws spectra, and {file} is a report of {loaded.provides}")
        loaded.to_html(html)
        say(f"saved to {html}")
    _show(loaded, sort, descending, top, columns, skipped, json_output)


def allocate(
    source: Annotated[str, typer.Argument(help="As for analyze, or a saved report as for report.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"{', '.join(signals.names())}: see below. gard takes a saved report of gradients, task "
            "one of tasks.",
        ),
    ] = "htsr",
    r_min: Annotated[int, typer.Option(min=0, help="Smallest rank.")] = 4,
    r_max: Annotated[int, typer.Option(min=1, help="Largest rank.")] = 32,
    budget: Annotated[
        str | None, typer.Option(help="Adapter parameters: 500000, 500k, or 0.5% of the base model's.")
    ] = None,
    avg_rank: Annotated[float | None, typer.Option(help="Average rank, instead of a budget.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", "-t", help="Modules to adapt, read as --include (default: all-linear)."),
    ] = None,
    placement: Annotated[
        str, typer.Option(help=f"Which of the targets: {', '.join(get_args(Placement))}.")
    ] = "all",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="NAME=VALUE for the method, see below; VALUE may be JSON. roles={...} is also for "
            "--placement. Repeatable.",
        ),
    ] = None,
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha at the average rank.")] = 8,
    scale_rule: Annotated[str, typer.Option(help="constant or rank-stabilized.")] = "constant",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for adapter_config.json and allocation.json."),
    ] = None,
    guess: Guess = False,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Ranks under a budget, as an adapter_config.json that PEFT loads."""
    _check_allocation(method, r_min, r_max, budget, avg_rank, scale_rule)
    check_choice("--placement", placement, get_args(Placement))
    options = _method_options(option)
    _check_method_options(method, options, placement)
    if output is not None:
        check_output_folder(output, overwrite)
    wanted = parse_targets(targets)
    evidence = _evidence(source, method, not quiet)
    if output is not None and not guess:
        _check_not_doubtful(evidence)
    with spelled_as_options():
        allocation = lorank.allocate(
            evidence,
            method,
            r_min=r_min,
            r_max=r_max,
            budget=budget,
            avg_rank=avg_rank,
            targets=wanted,
            placement=placement,  # type: ignore[arg-type]
            threads=threads,
            progress=not quiet,
            **options,
        )
    alpha = int(lora_alpha) if lora_alpha.is_integer() else lora_alpha
    settings = allocation.lora_settings(scale_rule=scale_rule, lora_alpha=alpha)  # type: ignore[arg-type]
    if output is not None:
        allocation.save(output / "allocation.json")
        config_file.write(output, settings, allocation.source or None)
    if json_output:
        print_json(
            {**allocation.to_json(), "adapter_config": config_file.content(settings, allocation.source)}
        )
        return
    _show_allocation(allocation)
    if output is not None:
        say(f"saved to {output / config_file.FILE_NAME}")


def methods_help() -> str:
    """What every method computes and its options, a paragraph each."""
    said = ["Ranks by method, within --r-min and --r-max; a budget scales what exceeds --r-min."]
    for name in signals.names():
        method = signals.find(name)
        options = f" Options: {', '.join(method.options)}." if method.options else ""
        said.append(f"{name}: {method.summary}{options}")
    said.append("r_base is --r-max by default; blocks and roles explain unusual names (lorank.allocate).")
    return "\n\n".join(said)


def _check_allocation(
    method: str, r_min: int, r_max: int, budget: str | None, avg_rank: float | None, scale_rule: str
) -> None:
    """What can be told to be wrong before anything is read."""
    check_choice("--method", method, signals.names())
    check_choice("--scale-rule", scale_rule, ("constant", "rank-stabilized"))
    if r_min > r_max:
        raise UsageError(f"--r-min {r_min} is above --r-max {r_max}")
    if budget is not None and avg_rank is not None:
        raise UsageError("give either --budget or --avg-rank")
    if budget is not None:
        try:
            parse_budget(budget, 1)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _method_options(pairs: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option takes NAME=VALUE, not {pair!r}")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[name.replace("-", "_")] = value
    return options


def _check_method_options(method: str, options: Mapping[str, Any], placement: str) -> None:
    """Refuse options that nothing would read, or could use; roles are the placement's, too."""
    own = {name: options[name] for name in options if name != "roles" or placement == "all"}
    try:
        signals.find(method).check_options(method, own)
        check_expressions(None, options.get("roles"))
    except ValueError as error:
        raise UsageError(f"--option: {error}") from None


def _check_not_doubtful(evidence: AnyReport | OpenedSource) -> None:
    """Refuse to write a file for modules whose guessed names leave doubts."""
    facts = getattr(evidence, "facts", ModelFacts())
    if facts.doubts:
        label = evidence.label if isinstance(evidence, OpenedSource) else evidence.source
        raise ValueError(as_options(doubtful(label, facts, "allocate -o")))


def _evidence(source: str, method: str, progress: bool) -> AnyReport | OpenedSource:
    """Return the saved report, or the opened source; refused if the method cannot use it."""
    needs = signals.find(method).needs
    found = load_report(source) if _is_report(source) else source
    provided: Evidence = "spectra" if isinstance(found, str) else found.provides
    if needs == "shapes" or needs == provided:
        if not isinstance(found, str):
            return found
        with waiting(OPENING, enabled=progress):
            return open_source(found)
    if not isinstance(found, str):
        what = f"is one of {provided}"
    elif Path(source).suffix in _REPORT_ENDINGS and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file")
    else:
        what = "is none"
    raise UsageError(f"--method {method} needs a report of {needs}, and {source} {what}: {_MAKERS[needs]}")


def _is_report(source: str) -> bool:
    path = Path(source)
    return path.suffix in _REPORT_ENDINGS and not path.name.endswith(".index.json") and path.is_file()


def _columns_of(shown: AnyReport) -> Sequence[str]:
    return METRICS if isinstance(shown, SpectralReport) else shown.columns


def _with_rows(shown: AnyReport, rows: Sequence[Any]) -> AnyReport:
    return replace(shown, modules=rows)  # type: ignore[arg-type]


def _check_output_file(path: Path, overwrite: bool) -> None:
    if path.suffix not in _REPORT_ENDINGS:
        raise UsageError(f"{path}: reports end with {', '.join(_REPORT_ENDINGS)}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another name or --overwrite")
    check_writable(path)


def _check_shown(sort: str | None, columns: str | None, known: Sequence[str]) -> None:
    for column in [] if columns in (None, "all") else str(columns).split(","):
        check_choice("--columns", column, known)
    if sort is not None:
        check_choice("--sort", sort, ("name", *known))


def _show(
    shown: AnyReport,
    sort: str | None,
    descending: bool,
    top: int | None,
    columns: str | None,
    skipped: bool,
    json_output: bool,
) -> None:
    rows = profiles.ordered(shown.modules, sort, descending, top)
    if json_output:
        content = _with_rows(shown, rows)
        print_json(to_json(content) if isinstance(content, SpectralReport) else content.to_json())
        return
    terminal = console()
    known = _columns_of(shown)
    if columns is None:
        default = reports.DEFAULT_COLUMNS
        wanted = default if isinstance(shown, SpectralReport) else known[: len(default)]
        chosen = reports.fitting(wanted, terminal.width)
    else:
        wanted = chosen = known if columns == "all" else columns.split(",")
        # Lines that a terminal wraps are read more easily than columns of one letter.
        terminal = console(reports.width_of(chosen))
    if isinstance(shown, SpectralReport):
        terminal.print(reports.spectral_table(shown, rows, chosen))
    else:
        terminal.print(profiles.profile_table(shown, rows, chosen))
    _show_remark(terminal, shown)
    if hidden := wanted[len(chosen) :]:
        terminal.print(reports.left_out(hidden), style="dim", soft_wrap=True)
    if skipped:
        terminal.print(reports.skipped_table(shown))
    elif shown.skipped:
        terminal.print(reports.skipped_summary(shown), style="dim", soft_wrap=True)


def _show_allocation(allocation: RankAllocation) -> None:
    terminal = console()
    terminal.print(reports.rank_map(allocation.ranks, f"ranks by {allocation.method}", terminal.width))
    terminal.print(reports.allocation_summary(allocation), soft_wrap=True)
    _show_remark(terminal, allocation)
    by_flag: dict[str, list[str]] = {}
    for name, flag in allocation.flags.items():
        by_flag.setdefault(flag, []).append(name)
    for flag, names in by_flag.items():
        who = ", ".join(names) if len(names) <= _FEW else f"{names[0]} and {len(names) - 1} others"
        terminal.print(f"{who}: {flag}", style="yellow", soft_wrap=True)


def _show_remark(terminal: Console, shown: AnyReport | RankAllocation) -> None:
    """Print once that names were guessed, where they were."""
    if remark := getattr(shown, "facts", ModelFacts(class_name="known")).remark:
        terminal.print(remark, style="yellow", soft_wrap=True, markup=False)


def _fail_if_incomplete(shown: SpectralReport) -> None:
    failed = [row for row in shown.modules if not row.has_spectrum]
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {len(shown)} matrices have no spectrum, the first is {failed[0].name}: "
            f"{'; '.join(failed[0].flags)}"
        )
