"""`lorank analyze` end to end against its peers in one run: ``python -m benches.analyze``.

Every contender reads SmolLM2-135M in a new process, in turn, so that memory and thread pools are not
shared; the clock starts after imports. lorank reads the weights without their `config.json`, as it would
otherwise ask transformers for the model. The peers are weightwatcher's `analyze()`, once with
`mp_fit=True`, and a hand-written loop: load with safetensors, Gram matrix in float64,
`torch.linalg.eigvalsh`, Hill estimator and spikes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benches import measuring

LORANK = """
import lorank
def run(path, accuracy, threads):
    report = lorank.analyze(path, accuracy=accuracy, threads=threads, progress=False)
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
def run(path, mp_fit, threads):
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    details = weightwatcher.WeightWatcher(model=model).analyze(mp_fit=mp_fit == 'True')
    return dict(zip(details.longname, details.alpha))
"""

# name -> code, arguments, largest number of runs
CONTENDERS = {
    "exact": (LORANK, ["exact"], 99),
    "fast": (LORANK, ["fast"], 99),
    "torch loop": (TORCH, [], 99),
    "weightwatcher analyze()": (WEIGHTWATCHER, ["False"], 99),
    "weightwatcher analyze(mp_fit=True)": (WEIGHTWATCHER, ["True"], 1),
}


def main() -> None:
    options = measuring.parser(__doc__, repeats=3)
    options.add_argument("--model", type=Path, help="folder with model.safetensors (default: SmolLM2-135M)")
    options.add_argument("--without-weightwatcher", action="store_true")
    arguments = options.parse_args()
    if arguments.model is None:
        from tests.support.material import smollm2

        arguments.model = smollm2()
    contenders = dict(CONTENDERS)
    if arguments.without_weightwatcher:
        contenders = {name: found for name, found in contenders.items() if "weightwatcher" not in name}
    runs: dict[str, list[measuring.Run]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        weights = measuring.weights_alone(arguments.model, Path(folder))
        for repeat in range(arguments.repeats):
            for name, (code, more, most) in contenders.items():
                if repeat < most:
                    source = weights if code is LORANK else arguments.model
                    runs[name].append(measuring.fresh(code, source, *more, threads=arguments.threads))
    rows = []
    for accuracy in ("exact", "fast"):
        for peer in [name for name in contenders if name not in ("exact", "fast")]:
            theirs = runs[peer]
            mine = runs[accuracy][: len(theirs)]
            peaks = [max(run["peak"] for run in found) / 1e6 for found in (mine, theirs)]
            work = f"{arguments.model.name}, {accuracy}"
            rows.append(measuring.compared(work, peer, mine, theirs, peaks_mb=peaks))
            measuring.show(rows[-1])
    for name, found in runs.items():
        print(f"peak memory of {name}: {max(run['peak'] for run in found) / 1e6:,.0f} MB")
    expected = runs["torch loop"][0]["result"]
    for accuracy in ("exact", "fast"):
        found = runs[accuracy][0]["result"]
        worst = max(abs(found[name] - expected[name]) for name in expected)
        print(f"largest difference of alpha, {accuracy} and the torch loop: {worst:.1e}")
    measuring.write(arguments.json, arguments.threads, rows)


if __name__ == "__main__":
    main()
