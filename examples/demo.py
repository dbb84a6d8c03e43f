"""Analyse a checkpoint, allocate ranks and build the PEFT model: ``python examples/demo.py MODEL OUTPUT``.

``make demo`` runs this on all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


def lorank(*arguments: str | Path) -> None:
    """Print and run a command of lorank."""
    command = [str(Path(sys.executable).with_name("lorank")), *map(str, arguments)]
    print(f"\n$ lorank {' '.join(map(str, arguments))}", flush=True)
    subprocess.run(command, check=True)


def build_peft_model(checkpoint: Path, allocation_file: Path) -> None:
    """Adapt the model with the allocated ranks; compare them with the ranks of its adapter layers."""
    print("\nBuilding the PEFT model with these ranks ...", flush=True)
    import transformers
    from peft import get_peft_model
    from rich.console import Console
    from rich.table import Table

    from lorank import RankAllocation

    transformers.utils.logging.disable_progress_bar()
    allocation = RankAllocation.load(allocation_file)
    model = transformers.AutoModel.from_pretrained(checkpoint)
    config = allocation.to_lora_config(model, lora_alpha=16)
    adapted = get_peft_model(model, config)

    found = {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "r")
    }
    table = Table(
        "adapter layer", "allocated", "rank in PEFT", "scaling", title="PEFT model", title_justify="left"
    )
    for name, layer_rank in found.items():
        scaling = adapted.get_submodule(f"base_model.model.{name}").scaling["default"]
        table.add_row(name, str(allocation.ranks.get(name, "-")), str(layer_rank), f"{scaling:.3g}")
    Console().print(table)
    if found != dict(allocation.ranks):
        raise SystemExit("the PEFT model's ranks differ from the allocated ones")
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if trainable != allocation.num_parameters:
        raise SystemExit(f"{trainable:,} trainable parameters, {allocation.num_parameters:,} allocated")
    print(f"Every one of the {len(found)} adapter layers has exactly the allocated rank;")
    print(f"{trainable:,} parameters are trainable, as allocated.")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path, help="folder of a transformers model")
    options.add_argument("output", type=Path, help="folder to replace with the results")
    arguments = options.parse_args()
    checkpoint, output = arguments.model, arguments.output
    shutil.rmtree(output, ignore_errors=True)
    report, adapter = output / "report.parquet", output / "adapter"
    lorank("analyze", checkpoint, "--sort", "alpha_hill", "--output", report)
    lorank("allocate", report, "--method", "htsr", "--budget", "1.5%", "--output", adapter)
    build_peft_model(checkpoint, adapter / "allocation.json")
    print(f"\nLoad {adapter} with peft.LoraConfig.from_pretrained, or see README.md for the Python way.")


if __name__ == "__main__":
    main()
