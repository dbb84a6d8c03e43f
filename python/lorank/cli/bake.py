"""The command `bake`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import lorank
from lorank.adapters.content import Dtype
from lorank.cli.adapter_output import print_notes
from lorank.cli.checks import check_choice, check_output_folder
from lorank.cli.options import Json, Overwrite, Quiet, Threads
from lorank.cli.output import print_json, print_message
from lorank.cli.spelling import spelled_as_options
from lorank.cli.weights import weighted

Base = Annotated[str, typer.Argument(help="The base model: a safetensors file, a folder or a hub id.")]


def bake(
    base: Base,
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapters, with weights such as A:0.7 B:0.3; without weights, each counts fully."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the changed tensors: float32, float16, bfloat16 or float64 (default: unchanged; "
            "bfloat16 for packed weights)."
        ),
    ] = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Add the updates of adapters to the weights of their base model.

    All tensors without an update are copied byte by byte, and the files beside the weights are copied, too.
    """
    paths, weights = weighted(adapters)
    if dtype is not None:
        check_choice("--dtype", dtype, get_args(Dtype))
    check_output_folder(output, overwrite)
    with spelled_as_options():
        baked = lorank.bake(
            base,
            paths,
            output,
            weights,
            dtype=cast("Dtype | None", dtype),
            overwrite=overwrite,
            threads=threads,
            progress=not quiet,
        )
    print_notes(baked.notes)
    if json_output:
        print_json({**asdict(baked), "path": str(baked.path)})
        return
    print_message(
        f"saved to {baked.path}: {len(baked.modules)} modules in {len(baked.updated)} tensors updated, "
        f"{len(baked.replaced)} tensors replaced, {baked.copied} copied"
    )
