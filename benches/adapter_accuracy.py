"""Accuracy after compression: ``python -m benches.adapter_accuracy``.

MiniLM has an adapter of rank 16 on all linear layers, trained on film reviews (minutes, once). The adapter
is compressed in four ways to three sizes: PARA (largest values of all modules), local pruning (equal
ranks), Fisher importance (squared gradients on other reviews replace the values) and reverse pruning
(smallest values).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftModel

import lorank
from tests.support import reviews

FISHER_REVIEWS = 512


def accuracy(adapter: lorank.LoraAdapter, data: list[dict[str, object]]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder, overwrite=True)
        return reviews.accuracy(PeftModel.from_pretrained(reviews.base_model(), folder).eval(), data)


def fisher(parent: lorank.LoraAdapter) -> dict[str, object]:
    """Return scores of the singular values from reviews outside the training and test data."""
    with tempfile.TemporaryDirectory() as folder:
        parent.save(folder, overwrite=True)
        model = PeftModel.from_pretrained(reviews.base_model(), folder)
        return lorank.fisher_scores(model, reviews.batches(3000, FISHER_REVIEWS))


def main() -> None:
    folder: Path = reviews.trained_adapter()
    data = reviews.batches(4000, 640)
    adapter = lorank.LoraAdapter.load(folder)
    whole = reviews.accuracy(PeftModel.from_pretrained(reviews.base_model(), folder).eval(), data)
    print(f"640 held-out reviews; the whole adapter ({adapter.num_parameters:,} parameters): {whole:.1%}")
    parent = lorank.elastic(adapter, progress=False)
    ways = {
        "PARA": {},
        "local": {"scope": "module"},
        "Fisher": {"scores": fisher(parent)},
        "reverse": {"keep": "smallest"},
    }
    print("rank ratio   " + "   ".join(f"{name:>22}" for name in ways))
    for ratio in (0.5, 0.25, 0.125):
        cells = []
        for options in ways.values():
            small = lorank.compress(parent, rank_ratio=ratio, progress=False, **options)
            assert small.certificate is not None
            energy = small.certificate.retained_energy
            cells.append(f"{accuracy(small, data):.1%} ({energy:.1%} energy)")
        print(f"{ratio:10}   " + "   ".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
