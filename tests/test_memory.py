"""Memory follows the largest matrices, not the checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

# VmHWM, as the maximum that getrusage reports survives from the forking parent.
PROGRAM = """
import re, sys, lorank
lorank.analyze(sys.argv[1], threads=2, progress=False)
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak(path: Path) -> int:
    """Peak resident memory of an analysis in a process of its own, in KiB."""
    command = [sys.executable, "-c", PROGRAM, str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
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
        peaks[layers] = peak(path)
    assert peaks[20] <= 1.15 * peaks[5], peaks
    # The file of 20 layers alone has 335 MB: holding it would show.
    assert peaks[20] * 1024 < 20 * 1024 * 4096 * 4
