"""The command line. One thin function a command: arguments in, library call, tables out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import lorank
from lorank import adapter_config, naming
from lorank.allocation import RankAllocation
from lorank.report import METRICS, SpectralReport, table
from lorank.report.files import to_json

app = typer.Typer(
    help="LoRA ranks from spectra: before, during and after fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_debug = False

_PIPE_WIDTH = 160
_REPORT_ENDINGS = (".json", ".parquet", ".csv")

Source = Annotated[
    str,
    typer.Argument(
        help="A .safetensors file, a folder of shards, a .bin/.pt state dict, a hub id, or a saved report."
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", "-i", help="Only these modules: names or suffixes, or re:REGEX. Repeatable, or a,b."
    ),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", "-x", help="Not these modules; read as --include.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="At most so many threads (default: all).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Sort = Annotated[str | None, typer.Option(help="Order rows by name or by a metric.")]
Descending = Annotated[bool, typer.Option("--descending", "-d", help="Largest first.")]
Top = Annotated[int | None, typer.Option(min=1, help="Show only the first rows.")]
Columns = Annotated[
    str | None,
    typer.Option(help=f"Columns of the table, or 'all': {', '.join(METRICS)}.", show_default=False),
]
ShowSkipped = Annotated[bool, typer.Option("--skipped", help="List what was skipped, and why.")]


class UsageError(Exception):
    """A combination of options that makes no sense: exit status 2."""


class IncompleteError(Exception):
    """Everything that could be done was done, and something could not."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorank {lorank.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    del version
    global _debug
    _debug = debug


@app.command()
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
    report = lorank.analyze(
        source,
        include=_targets(include),
        exclude=_targets(exclude),
        threads=threads,
        resume=resume,
        progress=not quiet,
        keep_eigenvalues=keep_eigenvalues,
    )
    if output is not None:
        report.save(output)
    _show(report, sort, descending, top, columns, skipped, json_output)
    if output is not None and not json_output:
        _err(f"saved to {output}")
    _fail_if_incomplete(report)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A report saved by analyze: .parquet, .csv or .json.")],
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
    if html is not None and html.exists() and not overwrite:
        raise UsageError(f"{html} exists: choose another name or --overwrite")
    loaded = SpectralReport.load(file).select(_targets(include), _targets(exclude))
    if html is not None:
        loaded.to_html(html)
        _err(f"saved to {html}")
    _show(loaded, sort, descending, top, columns, skipped, json_output)


@app.command()
def allocate(
    source: Source,
    method: Annotated[str, typer.Option("--method", "-m", help="htsr or uniform.")] = "htsr",
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
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="NAME=VALUE for the method, such as granularity=block. Repeatable."),
    ] = None,
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha at the average rank.")] = 8,
    scale_rule: Annotated[str, typer.Option(help="constant or rank-stabilized.")] = "constant",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for adapter_config.json and allocation.json."),
    ] = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Ranks under a budget, as an adapter_config.json that PEFT loads."""
    if budget is not None and avg_rank is not None:
        raise UsageError("give either --budget or --avg-rank")
    if output is not None:
        _check_output_folder(output, overwrite)
    wanted = _targets(targets)
    allocation = lorank.allocate(
        SpectralReport.load(source) if _is_report(source) else source,
        method,
        r_min=r_min,
        r_max=r_max,
        budget=budget,
        avg_rank=avg_rank,
        targets=wanted,
        threads=threads,
        progress=not quiet,
        **_method_options(option),
    )
    alpha = int(lora_alpha) if lora_alpha.is_integer() else lora_alpha
    settings = allocation.lora_settings(scale_rule=scale_rule, lora_alpha=alpha)  # type: ignore[arg-type]
    if output is not None:
        allocation.save(output / "allocation.json")
        adapter_config.write(output, settings, allocation.source or None)
    if json_output:
        _print_json(
            {**allocation.to_json(), "adapter_config": adapter_config.content(settings, allocation.source)}
        )
        return
    _show_allocation(allocation)
    if output is not None:
        _err(f"saved to {output / adapter_config.FILE_NAME}")


def main() -> None:
    """Entry point: one clear line and status 1 for errors, 2 for bad usage."""
    try:
        app()
    except UsageError as error:
        _fail(f"usage: {error}", 2)
    except (
        lorank.LorankError,
        IncompleteError,
        OSError,
        ValueError,
        TypeError,
        ImportError,
        KeyError,
    ) as error:
        if _debug:
            raise
        _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, status: int) -> None:
    first_line = message.strip().splitlines()[0] if message.strip() else "unknown error"
    _err(f"lorank: {first_line}")
    sys.exit(status)


def _err(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))  # noqa: T201


def _targets(values: list[str] | None) -> naming.Targets:
    """Repeated and comma-separated suffixes as a list, ``re:REGEX`` as the one expression."""
    if not values:
        return None
    if any(value.startswith("re:") for value in values):
        if len(values) > 1:
            raise UsageError("re: takes one regular expression and nothing beside it")
        return values[0].removeprefix("re:")
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    return naming.ALL_LINEAR if names == [naming.ALL_LINEAR] else names


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


def _is_report(source: str) -> bool:
    path = Path(source)
    return path.suffix in _REPORT_ENDINGS and not path.name.endswith(".index.json") and path.is_file()


def _check_output_file(path: Path, overwrite: bool) -> None:
    if path.suffix not in _REPORT_ENDINGS:
        raise UsageError(f"{path}: reports end with {', '.join(_REPORT_ENDINGS)}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another name or --overwrite")


def _check_output_folder(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise UsageError(f"{path} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{path} is not empty: choose another folder or --overwrite")


def _show(
    shown: SpectralReport,
    sort: str | None,
    descending: bool,
    top: int | None,
    columns: str | None,
    skipped: bool,
    json_output: bool,
) -> None:
    rows = table.ordered(shown, sort, descending, top)
    if json_output:
        _print_json(
            to_json(SpectralReport(rows, shown.skipped, shown.source, shown.accuracy, shown.num_parameters))
        )
        return
    console = _console()
    if columns is None:
        chosen = table.fitting_columns(console.width)
    else:
        chosen = METRICS if columns == "all" else columns.split(",")
    console.print(table.spectral_table(shown, rows, chosen))
    if skipped:
        console.print(table.skipped_table(shown))
    elif shown.skipped:
        console.print(table.skipped_summary(shown), style="dim", soft_wrap=True)


def _console() -> Console:
    """As wide as the terminal; wide enough for every column where there is none (a pipe, a log)."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def _show_allocation(allocation: RankAllocation) -> None:
    console = _console()
    console.print(table.rank_map(allocation))
    console.print(table.allocation_summary(allocation), soft_wrap=True)
    for name, flag in allocation.flags.items():
        console.print(f"{name}: {flag}", style="yellow", soft_wrap=True)


def _fail_if_incomplete(shown: SpectralReport) -> None:
    failed = [row for row in shown.modules if not row.has_spectrum]
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {len(shown)} matrices have no spectrum, the first is {failed[0].name}: "
            f"{'; '.join(failed[0].flags)}"
        )
