"""Peak memory depends on the largest matrices, not on the size of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

# VmHWM, as the maximum that getrusage reports survives from the forking parent.
PROGRAM = """
import re, sys, lorank
{call}
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
ANALYZE = "lorank.analyze(sys.argv[1], threads=2, progress=False)"
BAKE = """
lorank.bake(sys.argv[1], sys.argv[2], sys.argv[3], threads=2, progress=False)
assert "torch" not in sys.modules
"""
VERIFY = "assert lorank.verify(*sys.argv[1:], threads=2, progress=False).status == 'holds'"
EXTRACT = "lorank.extract(*sys.argv[1:], avg_rank=2, max_rank=4, threads=2, progress=False)"

COMPARE = "lorank.compare(*sys.argv[1:], threads=2, progress=False)"


def peak(call: str, *paths: Path) -> int:
    """Return the peak resident memory of a call in a new process, in KiB."""
    command = [sys.executable, "-c", PROGRAM.format(call=call), *map(str, paths)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")


@needs_proc
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    peaks = {}
    for layers in (5, 20):
        path = tmp_path / f"{layers}.safetensors"
        weights = {
            f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((1024, 4096)).astype(np.float32)
            for i in range(layers)
        }
        save_file(weights, path)
        peaks[layers] = peak(ANALYZE, path)
    assert peaks[20] <= 1.15 * peaks[5], peaks
    # The file of 20 layers has 335 MB: keeping it in memory would exceed the limit.
    assert peaks[20] * 1024 < 20 * 1024 * 4096 * 4


@needs_proc
@pytest.mark.parametrize(("shape", "layers"), [((1024, 520), (5, 40)), ((1536, 384), (20, 60))])
def test_extraction_holds_a_few_matrices_of_two_sharded_checkpoints(
    shape: tuple[int, int], layers: tuple[int, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    peaks = []
    for count in layers:
        folders = [tmp_path / f"{name}{count}" for name in ("base", "tuned")]
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(count)]
        shards = {name: f"model-{i % 4}.safetensors" for i, name in enumerate(names)}
        for folder in folders:
            folder.mkdir()
            for shard in set(shards.values()):
                held = [name for name in names if shards[name] == shard]
                save_file({n: rng.standard_normal(shape).astype(np.float32) for n in held}, folder / shard)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        peaks.append(peak(EXTRACT, *folders))
    assert peaks[1] <= 1.25 * peaks[0], peaks
    # Keeping either checkpoint in memory would exceed this growth.
    assert (peaks[1] - peaks[0]) * 1024 < 0.4 * (layers[1] - layers[0]) * np.prod(shape) * 4


@needs_proc
def test_baking_holds_blocks_of_matrices(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    peaks = {}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    for layers in (5, 20):
        base, adapter = tmp_path / f"base{layers}", tmp_path / f"adapter{layers}"
        base.mkdir()
        adapter.mkdir()
        names = [f"model.layers.{i}.mlp.up_proj" for i in range(layers)]
        weights = {f"{name}.weight": rng.standard_normal((1024, 4096)).astype(np.float32) for name in names}
        save_file(weights, base / "model.safetensors")
        factors = {
            f"base_model.model.{name}.lora_{side}.weight": rng.standard_normal(shape).astype(np.float32)
            for name in names
            for side, shape in (("A", (4, 4096)), ("B", (1024, 4)))
        }
        save_file(factors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        peaks[layers] = peak(BAKE, base, adapter, tmp_path / f"baked{layers}")
        peak(VERIFY, base, adapter, tmp_path / f"baked{layers}")
    assert peaks[20] <= 1.15 * peaks[5], peaks
    # A few matrices of 16 MB, on two threads, beside the interpreter.
    assert peaks[20] < 150 * 1024, peaks


@needs_proc
def test_comparison_holds_a_few_matrices_of_two_checkpoints(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    peaks = {}
    for count in (5, 40):
        paths = [tmp_path / f"{name}{count}.safetensors" for name in ("a", "b")]
        for path in paths:
            names = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(count))
            save_file({name: rng.standard_normal((16384, 96)).astype(np.float32) for name in names}, path)
        peaks[count] = peak(COMPARE, *paths)
    assert peaks[40] <= 1.15 * peaks[5], peaks
    # Keeping one checkpoint in memory would exceed this growth.
    assert (peaks[40] - peaks[5]) * 1024 < 0.4 * (40 - 5) * 16384 * 96 * 4, peaks
