"""The command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lorank
from lorank.adapters.conversion import LAYOUTS
from lorank.adapters.profiles import EXACT
from lorank.adapters.writing import write_adapter
from lorank.cli.adapter_options import Adapter, DtypeOption
from lorank.cli.adapter_output import adapter_json, check_form, check_output, print_notes
from lorank.cli.checks import check_choice
from lorank.cli.options import Json, Overwrite, Threads
from lorank.cli.output import print_json, print_message


def convert(
    adapter: Adapter,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder, .safetensors file or .gguf file to write.")
    ],
    to: Annotated[str, typer.Option(help=f"Layout of the files: {', '.join(LAYOUTS)}.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model (a folder, config.json or hub id), where names, heads or kernels of the layout "
            "depend on it."
        ),
    ] = None,
    dtype: DtypeOption = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another layout, without loss at full rank.

    Factors and scalings stay as they are, unless the layout has one scale for modules of several scalings.
    """
    check_choice("--to", to, LAYOUTS)
    check_form("compact", dtype)
    check_output(output, overwrite)
    result = lorank.convert(adapter, to, base=base)  # type: ignore[arg-type]  # Checked above.
    written = write_adapter(result, output, EXACT, dtype, overwrite=overwrite, threads=threads)
    if json_output:
        content = adapter_json(result, dtype)
        print_json({**content, "layout": to, "stored_parameters": written.stored_parameters})
        return
    print_notes([*result.notes, *written.notes])
    print_message(f"saved to {written.path}")
