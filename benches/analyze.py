"""`lorank analyze` end to end against its peers, in one run: ``python benches/analyze.py``.

SmolLM2-135M, file to numbers, on a fixed number of threads. Every contender runs in a process of its
own, in turn, so that neither memory nor thread pools are shared; the clock starts after imports. The
peers: weightwatcher's `analyze()`, and the loop that people write by hand: load with safetensors, Gram
matrix in float64, `torch.linalg.eigvalsh`, Hill estimator and spikes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LORANK = """
import lorank
def run(path, threads):
    report = lorank.analyze(path, threads=threads, progress=False)
    return {row.name: row.alpha_hill for row in report}
"""

TORCH = """
import pathlib, torch, safetensors.torch
def run(path, threads):
    torch.set_num_threads(threads)
    alphas = {}
    weights = safetensors.torch.load_file(pathlib.Path(path) / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim != 2:
            continue
        w = weight.double()
        gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        values = torch.linalg.eigvalsh(gram)
        p = len(values)
        values_nonzero = values[values > p * 2.0**-52 * values[-1]]
        n = len(values_nonzero)
        k = (n + 1) // 2
        alpha = 1 + k / torch.log(values_nonzero[n - k:] / values_nonzero[n - k - 1]).sum().item()
        ratio = max(w.shape) / min(w.shape)
        edge = values.mean() * (1 + ratio**-0.5) ** 2
        spikes = int((values > edge).sum())
        alphas[name.removesuffix(".weight")] = alpha
    return alphas
"""

WEIGHTWATCHER = """
import logging, pathlib, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch, transformers, weightwatcher
def run(path, threads):
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    details = weightwatcher.WeightWatcher(model=model).analyze()
    return dict(zip(details.longname, details.alpha))
"""

HARNESS = """
import json, re, sys, time
start = time.perf_counter()
result = run(sys.argv[1], int(sys.argv[2]))
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print("RESULT " + json.dumps({"seconds": seconds, "peak": peak, "values": result}))
"""


def measure(code: str, path: Path, threads: int) -> dict[str, object]:
    """One run in a fresh process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code + HARNESS, str(path), str(threads)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    result: dict[str, object] = json.loads(line.removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder with model.safetensors (default: SmolLM2-135M)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-weightwatcher", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    if arguments.model is None:
        from material import smollm2

        arguments.model = smollm2()

    contenders = {"lorank": LORANK, "torch loop": TORCH, "weightwatcher": WEIGHTWATCHER}
    if arguments.without_weightwatcher:
        del contenders["weightwatcher"]
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, code in contenders.items():
            runs[name].append(measure(code, arguments.model, arguments.threads))

    seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    rows = []
    for name, of in runs.items():
        # Pair by pair, so that a drift of the machine's speed cancels.
        ratios = [other["seconds"] / own["seconds"] for other, own in zip(of, runs["lorank"], strict=True)]
        rows.append(
            {
                "contender": name,
                "seconds": seconds[name],
                "times_lorank": statistics.median(ratios),
                "peak_mb": statistics.median(run["peak"] for run in of) / 1e6,
            }
        )
    mine, theirs = runs["lorank"][0]["values"], runs["torch loop"][0]["values"]
    difference = max(abs(mine[name] - theirs[name]) for name in theirs)
    print(f"{arguments.model.name}, {arguments.threads} threads, {arguments.repeats} runs each, medians")
    for row in rows:
        print("{contender:14} {seconds:8.2f} s {times_lorank:8.2f}x {peak_mb:8.0f} MB".format(**row))
    print(f"largest difference of alpha between lorank and the torch loop: {difference:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
