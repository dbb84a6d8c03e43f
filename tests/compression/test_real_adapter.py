"""A trained adapter of a real model, and a real fine-tune."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

import lorank
from tests.support import material, reviews
from tests.support.adapter_files import dense, distance, loaded, norm


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> lorank.LoraAdapter:
    """Train an adapter briefly, which suffices for real spectra."""
    folder = tmp_path_factory.mktemp("adapter")
    reviews.train(384, 1).save_pretrained(folder)
    return lorank.LoraAdapter.load(folder)


@pytest.mark.parametrize("profile", ["compact", "portable", "tensor-rank"])
def test_compressed_model_equals_the_base_plus_truncated_updates(
    adapter: lorank.LoraAdapter, profile: Any, tmp_path: Path
) -> None:
    small = lorank.compress(adapter, rank_ratio=0.25, progress=False)
    small.save(tmp_path / "small", profile)
    base = reviews.base_model()
    compressed = loaded(base, tmp_path / "small")
    by_hand = copy.deepcopy(base).eval()
    modules = dict(by_hand.named_modules())
    for name, update in dense(small).items():
        modules[name].weight.data += torch.from_numpy(update).float()
    # The fully trained head is saved beside the factors.
    head = compressed.base_model.model.classifier.modules_to_save.default
    by_hand.classifier.load_state_dict(head.state_dict())
    (batch,) = reviews.batches(4000, 32)
    torch.testing.assert_close(
        reviews.logits(compressed, batch), reviews.logits(by_hand, batch), rtol=1e-4, atol=1e-5
    )
    before = dense(adapter)
    assert small.certificate is not None
    assert small.certificate.error == pytest.approx(distance(before, dense(small)), abs=1e-6 * norm(before))


def test_singular_values_equal_those_of_dense_updates(adapter: lorank.LoraAdapter) -> None:
    for name, update in dense(adapter).items():
        expected = np.linalg.svd(update, compute_uv=False)[:16]
        found = adapter.modules[name].singular_values
        assert np.abs(found - expected).max() <= 1e-6 * expected[0]


def test_fisher_importance_follows_gradients(adapter: lorank.LoraAdapter, tmp_path: Path) -> None:
    parent = lorank.elastic(adapter, progress=False)
    parent.save(tmp_path / "parent")
    model = loaded(reviews.base_model(), tmp_path / "parent")
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = reviews.batches(4000, 64)
    scores = lorank.fisher_scores(model, data)
    # The reference for one module: gradients from an ordinary backward pass.
    name = "bert.encoder.layer.3.attention.self.value"
    layer = dict(model.base_model.model.named_modules())[name]
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    total = np.zeros(a.shape[0])
    for batch in data:
        for p in (a, b):
            p.requires_grad_(True)
            p.grad = None
        model(**batch).loss.backward()
        total += a.grad.double().square().sum(1).numpy() + b.grad.double().square().sum(0).numpy()
    np.testing.assert_allclose(scores[name], total / len(data), rtol=1e-4)
    for key, p in model.named_parameters():
        assert torch.equal(state[key], p.detach())
    small = lorank.compress(parent, rank_ratio=0.5, scores=scores, progress=False)
    everything = np.concatenate([scores[n] for n in small.modules])
    threshold = np.sort(everything)[-sum(small.ranks.values())]
    for n, rank in small.ranks.items():
        assert rank == int((scores[n] >= threshold).sum())
    with pytest.raises(ValueError, match="at least one batch"):
        lorank.fisher_scores(model, [])


def test_extraction_from_a_real_fine_tune_equals_the_dense_svd(tmp_path: Path) -> None:
    base, tuned = material.minilm(), material.minilm_tuned()
    adapter = lorank.extract(base, tuned, exclude=r"embeddings\..*", avg_rank=8, progress=False)
    before = dict(reviews.AutoModelForSequenceClassification.from_pretrained(base).bert.named_parameters())
    after = dict(reviews.AutoModelForSequenceClassification.from_pretrained(tuned).bert.named_parameters())
    kept = whole = 0.0
    for name, rank in adapter.ranks.items():
        difference = (after[f"{name}.weight"] - before[f"{name}.weight"]).detach().double().numpy()
        values = np.square(np.linalg.svd(difference, compute_uv=False))
        kept, whole = kept + values[:rank].sum(), whole + values.sum()
    assert sum(adapter.ranks.values()) == 8 * len(adapter.ranks) == 8 * 37
    assert adapter.certificate is not None
    assert adapter.certificate.retained_energy == pytest.approx(kept / whole, rel=1e-3)
    assert any("tensors changed" in note for note in adapter.notes)
    adapter.save(tmp_path / "a")
    assert loaded(reviews.base_model().bert, tmp_path / "a") is not None


def test_compressed_adapter_replaces_the_live_one(adapter: lorank.LoraAdapter, tmp_path: Path) -> None:
    """The model has a trained head, with which PEFT cannot delete its last adapter."""
    adapter.save(tmp_path / "trained")
    (batch,) = reviews.batches(4000, 32)
    model = PeftModel.from_pretrained(reviews.base_model(), tmp_path / "trained").eval()
    with torch.no_grad():
        before = model(**batch).logits
        lorank.compress(adapter, rank_ratio=1.0, progress=False).into_model(model)
        assert list(model.peft_config) == ["default"]
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)
        lorank.compress(adapter, rank_ratio=0.1, progress=False).into_model(model)
        assert not torch.allclose(model(**batch).logits, before, atol=1e-3)


def test_weights_without_settings_raise(adapter: lorank.LoraAdapter, tmp_path: Path) -> None:
    adapter.save(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(lorank.FormatError, match="give the folder that holds both files"):
            lorank.LoraAdapter.load(path)
