"""`lorank bake` against PEFT's merge in one run: ``python -m benches.bake``.

The base model is SmolLM2-135M in float32 and in bfloat16, with cached files; the adapter of rank 16 adapts
all linear layers of all blocks. Every contender runs in a new process; the clock starts after imports. The
time of lorank covers reading, adding, writing, and the transfer to the disk. The time of PEFT is given twice:
with loading of the model and the adapter, and from `merge_and_unload` on. PEFT does not wait for the disk.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benches import measuring
from tests.support import material

LORANK = """
import lorank
from lorank.baking.bake import bake
def run(base, adapter, target, threads):
    return len(bake(base, adapter, target, threads=threads, progress=False).updated)
"""

PEFT = """
import peft, time, torch, transformers
def run(base, adapter, target, threads):
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = peft.PeftModel.from_pretrained(model, adapter)
    start = time.perf_counter()
    model.merge_and_unload().save_pretrained(target)
    return {"merged": time.perf_counter() - start}
"""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_models(scratch: Path) -> list[Path]:
    """Write SmolLM2 in both types and an adapter; return the folders of the models."""
    import peft
    import torch
    import transformers

    models = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = scratch / str(dtype).removeprefix("torch.")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(material.smollm2(), dtype=dtype)
        model.save_pretrained(folder)
        models.append(folder)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(scratch / "adapter")
    return models


def check_values(base: Path, adapter: Path, threads: int, scratch: Path) -> None:
    """Check that both contenders write the same values: PEFT's differ by less than rounding can."""
    import torch
    from safetensors.torch import load_file

    import lorank

    folders = [scratch / "values of lorank", scratch / "values of PEFT"]
    for code, folder in zip((LORANK, PEFT), folders, strict=True):
        measuring.fresh(code, base, adapter, folder, threads=threads)
        found = lorank.verify(base, adapter, folder, progress=False)
        if found.status != "holds":
            raise ValueError(f"{folder}: {found.status}")
    own, other = (load_file(folder / "model.safetensors") for folder in folders)
    if own.keys() != other.keys():
        raise ValueError(f"{base}: the contenders write other tensors")
    for name, value in own.items():
        # Each contender rounds to the type; PEFT also rounds the update.
        tolerance = 4 * torch.finfo(value.dtype).eps
        difference = (value.double() - other[name].double()).abs().max().item()
        if difference > tolerance * value.double().abs().max().item():
            raise ValueError(f"{name}: the values differ by {difference}")
    for folder in folders:
        shutil.rmtree(folder)


def compare(base: Path, adapter: Path, threads: int, repeats: int, scratch: Path) -> list[measuring.Run]:
    """Compare complete runs, and PEFT's time from `merge_and_unload` on."""
    check_values(base, adapter, threads, scratch)
    runs: list[list[measuring.Run]] = [[], []]
    for _ in range(repeats):
        for k, code in enumerate((LORANK, PEFT)):
            target = scratch / "baked"
            shutil.rmtree(target, ignore_errors=True)
            runs[k].append(measuring.fresh_to_folder(code, base, adapter, target, threads=threads))
    merged = [{**run, "seconds": run["result"]["merged"]} for run in runs[1]]
    peaks = [max(run["peak"] for run in of) for of in runs]
    work = f"bake SmolLM2-135M, {base.name}"
    return [
        measuring.compared(work, "PEFT merge_and_unload + save_pretrained", runs[0], merged, peaks=peaks),
        measuring.compared(work, "PEFT, with loading", runs[0], runs[1], peaks=peaks),
    ]


def main() -> None:
    arguments = measuring.parser(__doc__, repeats=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows = []
        for base in write_models(scratch):
            rows += compare(base, scratch / "adapter", arguments.threads, arguments.repeats, scratch)
    for row in rows:
        measuring.show(row)
        print("  peak memory: {} MB against {} MB".format(*(peak >> 20 for peak in row["peaks"])))
    measuring.write(arguments.json, arguments.threads, rows)


if __name__ == "__main__":
    main()
