"""The command `allocate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

import lorank
from lorank._internal.json_files import parse_json
from lorank._internal.progress import waiting
from lorank._internal.staging import staged_folder
from lorank.allocation import signals
from lorank.allocation.budget import parse_budget
from lorank.allocation.rank_allocation import ALLOCATION_FILE, RankAllocation
from lorank.cli.checks import REPORT_ENDINGS, check_choice, check_output_folder, parse_targets
from lorank.cli.errors import UsageError
from lorank.cli.options import Guess, Json, Overwrite, Quiet, Threads
from lorank.cli.output import console, print_json, print_message
from lorank.cli.report_view import is_report, show_remark
from lorank.cli.spelling import as_options, spelled_as_options
from lorank.cli.tables import ranks
from lorank.modules.facts import ModelFacts
from lorank.modules.roles import Placement, check_expressions
from lorank.peft_format import config_file
from lorank.peft_format.names import PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from lorank.report.base import Evidence
from lorank.report.loading import AnyReport, load_report
from lorank.sources import OPENING, Source, open_source
from lorank.sources.guesses import doubtful

# Advice on making the report that a method needs.
_MAKERS: Mapping[Evidence, str] = {
    "spectra": "make one with lorank analyze MODEL -o report.json",
    "gradients": "make one in Python with lorank.profile_gradients(model, batches).save('report.json')",
    "tasks": "make one in Python with lorank.profile_tasks(model, batches).save('report.json')",
    "changes": "make one with lorank compare A B -o report.json",
}


def _reports_needed() -> str:
    """Return a sentence for each method that needs a saved report."""
    needs = {name: signals.find(name).needs for name in signals.names()}
    return " ".join(
        f"{name} needs a saved report of {kind}."
        for name, kind in needs.items()
        if kind not in ("shapes", "spectra")
    )


def allocate(
    source: Annotated[str, typer.Argument(help="A model (see analyze) or a saved report (see report).")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"{', '.join(signals.names())}; described below. {_reports_needed()}",
        ),
    ] = "htsr",
    r_min: Annotated[int, typer.Option(min=0, help="Smallest rank.")] = 4,
    r_max: Annotated[int, typer.Option(min=1, help="Largest rank.")] = 32,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Number of adapter parameters, such as 500k, or share of the base model, such as 0.5%."
        ),
    ] = None,
    avg_rank: Annotated[float | None, typer.Option(help="Average rank; replaces --budget.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets", "-t", help="Modules to adapt, in the syntax of --include (default: all-linear)."
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help=f"Part of the targets to adapt: {', '.join(get_args(Placement))}.")
    ] = "all",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="NAME=VALUE of an option of the method (see below); VALUE may be JSON. roles={...} also "
            "applies to --placement. Repeatable.",
        ),
    ] = None,
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha of a module with the average rank.")] = 8,
    scale_rule: Annotated[
        str,
        typer.Option(help="constant: alpha / (average rank). rank-stabilized: alpha / sqrt(rank)."),
    ] = "constant",
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
    """Choose ranks under a budget, and write an adapter_config.json for PEFT."""
    _check_allocation(method, r_min, r_max, budget, avg_rank, scale_rule)
    check_choice("--placement", placement, get_args(Placement))
    options = _method_options(option)
    _check_method_options(method, options, placement)
    if output is not None:
        check_output_folder(output, overwrite)
        _check_without_factors(output)
    selected = parse_targets(targets)
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
            targets=selected,
            placement=placement,  # type: ignore[arg-type]  # Checked above.
            threads=threads,
            progress=not quiet,
            **options,
        )
    alpha = int(lora_alpha) if lora_alpha.is_integer() else lora_alpha
    settings = allocation.lora_settings(scale_rule=scale_rule, lora_alpha=alpha)  # type: ignore[arg-type]  # Checked above.
    if output is not None:
        write_allocation(output, allocation, settings)
    if json_output:
        print_json(
            {**allocation.to_json(), "adapter_config": config_file.content(settings, allocation.source)}
        )
        return
    _show(allocation)
    if output is not None:
        print_message(f"saved to {output / config_file.FILE_NAME}")


def write_allocation(output: Path, allocation: RankAllocation, settings: Mapping[str, Any]) -> None:
    """Write `allocation.json` and `adapter_config.json` into a folder, both or none."""
    with staged_folder(output, heads=(config_file.FILE_NAME,)) as staging:
        allocation.save(staging / ALLOCATION_FILE)
        config_file.write(staging, settings, allocation.source or None)


def _check_without_factors(folder: Path) -> None:
    """Raise UsageError for the folder of a trained adapter, whose settings belong to its factors."""
    for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE):
        if (folder / name).exists():
            raise UsageError(f"{folder} holds the factors of an adapter ({name}): choose another folder")


def methods_help() -> str:
    """Return a paragraph on the ranks and the options of each method."""
    paragraphs = ["Ranks by method, within --r-min and --r-max; a budget scales the part above --r-min."]
    for name in signals.names():
        method = signals.find(name)
        options = f" Options: {', '.join(method.options)}." if method.options else ""
        paragraphs.append(f"{name}: {method.summary}{options}")
    paragraphs.append(
        "r_base is --r-max by default; blocks and roles describe unusual names (lorank.allocate)."
    )
    return "\n\n".join(paragraphs)


def _check_allocation(
    method: str, r_min: int, r_max: int, budget: str | None, avg_rank: float | None, scale_rule: str
) -> None:
    """Raise UsageError for options that are wrong for every source."""
    check_choice("--method", method, signals.names())
    check_choice("--scale-rule", scale_rule, ("constant", "rank-stabilized"))
    if r_min > r_max:
        raise UsageError(f"--r-min {r_min} is above --r-max {r_max}")
    if budget is not None and avg_rank is not None:
        raise UsageError("give --budget or --avg-rank, not both")
    if budget is not None:
        try:
            parse_budget(budget, 1)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _method_options(pairs: list[str] | None) -> dict[str, Any]:
    """Parse options of a method, ``NAME=VALUE``, with values in JSON or plain text."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option takes NAME=VALUE, not {pair!r}")
        try:
            options[name.replace("-", "_")] = parse_json(value)
        except ValueError:
            options[name.replace("-", "_")] = value
    return options


def _check_method_options(method: str, options: Mapping[str, Any], placement: str) -> None:
    """Raise UsageError for options that the method lacks, except `roles` for a placement."""
    own = {name: options[name] for name in options if name != "roles" or placement == "all"}
    try:
        signals.find(method).check_options(method, own)
        check_expressions(None, options.get("roles"))
    except ValueError as error:
        raise UsageError(f"--option: {error}") from None


def _check_not_doubtful(evidence: AnyReport | Source) -> None:
    """Raise ValueError if the names of modules are guessed and doubtful."""
    facts = getattr(evidence, "facts", ModelFacts())
    if facts.doubts:
        label = evidence.label if isinstance(evidence, Source) else evidence.source
        raise ValueError(as_options(doubtful(label, facts, "allocate -o")))


def _evidence(source: str, method: str, progress: bool) -> AnyReport | Source:
    """Load the saved report or open the model that `source` names.

    Raises
    ------
    UsageError
        If the method needs another kind of report.
    """
    needs = signals.find(method).needs
    found = load_report(source) if is_report(source) else source
    provided: Evidence = "spectra" if isinstance(found, str) else found.provides
    if needs == "shapes" or needs == provided:
        if not isinstance(found, str):
            return found
        with waiting(OPENING, enabled=progress):
            return open_source(found)
    if not isinstance(found, str):
        difference = f"is a report of {provided}"
    elif Path(source).suffix in REPORT_ENDINGS and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file")
    else:
        difference = "is not a report"
    raise UsageError(
        f"--method {method} needs a report of {needs}, and {source} {difference}: {_MAKERS[needs]}"
    )


def _show(allocation: RankAllocation) -> None:
    terminal = console()
    terminal.print(ranks.rank_map(allocation.ranks, f"ranks by {allocation.method}", terminal.width))
    terminal.print(ranks.allocation_summary(allocation), soft_wrap=True)
    show_remark(terminal, allocation)
    for line in ranks.flags_by_text(allocation.flags):
        terminal.print(line, style="yellow", soft_wrap=True)
