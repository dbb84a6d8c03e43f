"""Options of the commands that read or write adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorank.compression.difference import DEFAULT_MAX_RANK

# A Path would turn an empty argument into the current folder.
Adapter = Annotated[
    str,
    typer.Argument(
        help="A folder of PEFT or MLX-LM, a .safetensors file of an image adapter, a .gguf file, or a hub id."
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder or .safetensors file to write.")]
RankRatio = Annotated[
    float | None,
    typer.Option(help="Keep this share of the singular values of all modules, the largest ones."),
]
AvgRank = Annotated[float | None, typer.Option(help="Keep this many singular values per module on average.")]
Energy = Annotated[
    float | None, typer.Option(help="Keep the fewest singular values that hold this share of the energy.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Keep the singular values that fit into this many parameters, such as 500000 or 500k, or into a "
        "size such as 12MiB."
    ),
]
BudgetOrShare = Annotated[
    str | None,
    typer.Option(
        help="Keep the singular values that fit into this many parameters, such as 500000 or 500k, or into "
        "this share of the base model's parameters, such as 0.5%."
    ),
]
Auto = Annotated[
    bool,
    typer.Option("--auto", help="Keep the singular values above the noise of their module (a heuristic)."),
]
MaxRank = Annotated[int | None, typer.Option(min=1, help="Largest rank of a module.")]
ComputedRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Largest rank of a module (default: {DEFAULT_MAX_RANK}); higher ranks are not computed.",
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        help="global: one selection over all modules. module: the same rank or share of energy in each."
    ),
]
ProfileOption = Annotated[
    str,
    typer.Option(
        help="Form of the files: compact (for PEFT and vLLM), portable (for every runtime) or tensor-rank "
        "(also for llama.cpp)."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Type of the factors: float32, float16, bfloat16 or float64 (default: unchanged)."),
]
Modules = Annotated[bool, typer.Option("--modules", help="Show ranks, energy and errors of each module.")]
