"""The command `task`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from lorank._internal.progress import progress_bar
from lorank.cli.arrays import NamedArray, check_files, open_samples
from lorank.cli.checks import check_choice
from lorank.cli.errors import UsageError
from lorank.cli.options import Json, Quiet
from lorank.cli.output import console, print_json
from lorank.cli.tables import estimate as tables
from lorank.task_spectra import Space, TaskEstimate, TaskSpectrum
from lorank.task_spectra.estimate import check_options
from lorank.task_spectra.moments import checked_rows

# Numbers in a chunk, and bounds on its rows that keep the sums fast.
_CHUNK = 1 << 23
_FEWEST_ROWS, _MOST_ROWS = 256, 8192


def task(
    data: Annotated[
        list[Path],
        typer.Argument(help="An .npz file with the arrays X and Y, or two .npy files: X.npy Y.npy."),
    ],
    x: Annotated[
        str | None, typer.Option("--x", help="Name of the inputs in the .npz file (default: X or x).")
    ] = None,
    y: Annotated[
        str | None, typer.Option("--y", help="Name of the targets in the .npz file (default: Y or y).")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the noise of Y (default: estimated from the residuals)."),
    ] = None,
    leading: Annotated[
        float | None,
        typer.Option(help="Value C at which the decay starts (default: the largest singular value)."),
    ] = None,
    space: Annotated[
        str, typer.Option(help="Space of the spectrum: weights (for inputs of unit variance) or prediction.")
    ] = "weights",
    folds: Annotated[int, typer.Option(min=2, help="Number of folds of the cross-validation.")] = 10,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate the rank of a task from samples X (n, inputs) and Y (n, outputs).

    The model is Y = X W + noise, without an intercept: centre X and Y first, or give X a column of ones.
    """
    check_choice("--space", space, get_args(Space))
    try:
        check_options(noise, leading, space)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    check_files(data, x, y)
    inputs, outputs = open_samples(data, x, y)
    spectrum = _summed(inputs, outputs, folds, quiet)
    found = spectrum.estimate(noise=noise, leading=leading, space=space)  # type: ignore[arg-type]  # Checked above.
    source = ", ".join(map(str, data))
    if json_output:
        print_json({"source": source, **tables.estimate_json(found)})
        return
    d_in, d_out = inputs.values.shape[1], outputs.values[:1].size
    _show(found, f"{source}: {d_in} inputs, {d_out} outputs, {space} space")


def _summed(inputs: NamedArray, outputs: NamedArray, folds: int, quiet: bool) -> TaskSpectrum:
    """Sum over all rows, in chunks that are converted to float64."""
    X, Y = inputs.values, outputs.values
    numbers = X.shape[1] + Y[:1].size
    step = min(max(_CHUNK // numbers, _FEWEST_ROWS), _MOST_ROWS)
    spectrum = TaskSpectrum(folds=folds)
    with progress_bar("samples", len(X), enabled=not quiet) as advance:
        for start in range(0, len(X), step):
            stop = min(start + step, len(X))
            try:
                spectrum.update(X[start:stop], Y[start:stop])
            except ValueError:
                _name_bad_row(inputs, start, stop)
                _name_bad_row(outputs, start, stop)
                raise
            advance(stop - start, "")
    return spectrum


def _name_bad_row(array: NamedArray, start: int, stop: int) -> None:
    """Raise ValueError for the first row with a value that is too large or not finite."""
    for row in range(start, stop):
        checked_rows(f"row {row} of {array.name}", array.values[row : row + 1].reshape(1, -1), None)


def _show(found: TaskEstimate, title: str) -> None:
    terminal = console()
    ascii_only = terminal.options.ascii_only
    terminal.print(tables.estimate_table(found, title))
    terminal.print(tables.spectrum_picture(found, terminal.width, ascii_only), soft_wrap=True)
    if (curve := tables.curve_table(found, ascii_only)) is not None:
        terminal.print()
        terminal.print(curve)
    for flag in found.flags:
        terminal.print(flag, style="yellow", soft_wrap=True)
