"""Adapters from full fine-tunes, against the dense difference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, loaded

RNG = np.random.default_rng(0)


def tuned_copy(model: Any, *, scale: float = 0.05, rank: int = 3) -> Any:
    """Return a copy of the model with a low-rank change plus small noise in every weight."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in changed.parameters():
        if parameter.ndim >= 2:
            experts = parameter.shape[0] if parameter.ndim == 3 else 1
            out = parameter.shape[1] if parameter.ndim == 3 else parameter.shape[0]
            flat = parameter.data.reshape(experts, out, -1)
            left = torch.randn(flat.shape[0], flat.shape[1], rank, generator=generator)
            right = torch.randn(flat.shape[0], rank, flat.shape[2], generator=generator)
            change = scale * (left @ right + 0.02 * torch.randn(flat.shape, generator=generator))
            parameter.data = parameter.data + change.reshape(parameter.shape)
    return changed


BUILDERS = ["llama", "gpt2", "mixtral", "gpt_oss", "bert", "vit"]


@pytest.mark.parametrize("name", BUILDERS)
def test_adapter_turns_the_base_into_the_fine_tune(name: str, tmp_path: Path) -> None:
    model = getattr(tiny_models, name)()
    after = tuned_copy(model)
    exclude = r"(.*\.)?(router|gate|classifier|relative_attention_bias)"
    adapter = lorank.extract(model, after, exclude=exclude, energy=1.0, max_rank=200, progress=False)
    adapter.save(tmp_path / "a")
    # PEFT merges the update of a shared weight once per module that shares it.
    untied = copy.deepcopy(model)
    for module in untied.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, torch.nn.Parameter(parameter.data.clone()))
    merged = loaded(untied, tmp_path / "a").merge_and_unload()
    target = dict(after.named_parameters(remove_duplicate=False))
    checked = 0
    for key, parameter in merged.named_parameters():
        if parameter.ndim >= 2 and key.removesuffix(".weight") in adapter.modules:
            torch.testing.assert_close(parameter, target[key], rtol=0, atol=2e-6, msg=key)
            checked += 1
    assert checked == len(adapter.modules) > 0


def test_ranks_and_energy_equal_those_of_the_dense_difference() -> None:
    model = tiny_models.llama()
    after = tuned_copy(model)
    adapter = lorank.extract(model, after, include=["q_proj", "up_proj"], avg_rank=3, progress=False)
    before, changed = dict(model.named_parameters()), dict(after.named_parameters())
    differences = {
        name: (changed[f"{name}.weight"] - before[f"{name}.weight"]).detach().double().numpy()
        for name in adapter.modules
    }
    assert sum(adapter.ranks.values()) == 3 * len(differences)
    certificate = adapter.certificate
    assert certificate is not None
    energy = sum(np.square(d).sum() for d in differences.values())
    assert certificate.norm == pytest.approx(np.sqrt(energy), rel=1e-9)
    error = sum(np.square(differences[n] - u).sum() for n, u in dense(adapter).items())
    assert certificate.error == pytest.approx(np.sqrt(error), rel=1e-5)
    for name, rank in adapter.ranks.items():
        values = np.linalg.svd(differences[name], compute_uv=False)
        entry = next(e for e in certificate.modules if e.name == name)
        assert entry.dropped_energy == pytest.approx(np.square(values[rank:]).sum(), rel=1e-6)
        assert entry.parameters_before == differences[name].size


def test_wide_differences_are_truncated_during_computation() -> None:
    base = RNG.standard_normal((700, 600)).astype(np.float32)
    left, right = RNG.standard_normal((700, 20)), RNG.standard_normal((20, 600))
    change = (left * np.geomspace(1, 0.05, 20)) @ right + 0.01 * RNG.standard_normal((700, 600))
    tuned = base + change.astype(np.float32)
    adapter = lorank.extract({"w.weight": base}, {"w.weight": tuned}, avg_rank=8, max_rank=16, progress=False)
    values = np.linalg.svd(tuned.astype(np.float64) - base, compute_uv=False)
    assert adapter.certificate is not None
    kept = np.square(values[:8]).sum() / np.square(values).sum()
    assert adapter.certificate.retained_energy == pytest.approx(kept, rel=1e-3)


@pytest.mark.parametrize("rank", [5, 2])
@pytest.mark.parametrize(("shape", "lowest"), [((40, 30), 1 - 1e-6), ((700, 600), 0.9)])
def test_spectral_error_includes_uncomputed_values(shape: tuple[int, int], lowest: float, rank: int) -> None:
    base = RNG.standard_normal(shape)
    change = RNG.standard_normal(shape) + 20 * np.outer(*(RNG.standard_normal(n) / n**0.5 for n in shape))
    models = {"w.weight": base}, {"w.weight": base + change}
    adapter = lorank.extract(*models, avg_rank=rank, max_rank=5, progress=False)
    assert adapter.ranks == {"w": rank}
    true = np.linalg.norm(change - dense(adapter)["w"], 2)
    assert adapter.certificate is not None
    assert lowest * true <= adapter.certificate.spectral_error <= true * (1 + 1e-6)


def test_automatic_threshold_finds_the_planted_rank() -> None:
    base = RNG.standard_normal((300, 200))
    change = 0.5 * RNG.standard_normal((300, 4)) @ RNG.standard_normal((4, 200))
    tuned = base + change + 0.01 * RNG.standard_normal(base.shape)
    adapter = lorank.extract({"w.weight": base}, {"w.weight": tuned}, auto=True, progress=False)
    assert adapter.ranks == {"w": 4}


def test_shards_are_read_and_skipped_tensors_noted(tmp_path: Path) -> None:
    model = tiny_models.llama_tied()
    after = tuned_copy(model)
    after.model.norm.weight.data += 1.0
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    after.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    adapter = lorank.extract(tmp_path / "base", tmp_path / "tuned", avg_rank=2, progress=False)
    assert [name for name in adapter.modules if "embed" in name or "head" in name] == [
        "model.embed_tokens",
        "lm_head",
    ]
    assert any(
        "1 tensors changed, but an adapter cannot hold them: model.norm.weight" in note
        for note in adapter.notes
    )
    without = lorank.extract(
        tmp_path / "base", tmp_path / "tuned", exclude=["embed_tokens"], avg_rank=2, progress=False
    )
    assert set(adapter.modules) - set(without.modules) == {"model.embed_tokens", "lm_head"}
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    fewer = lorank.extract(tmp_path / "base", tmp_path / "tuned", avg_rank=2, progress=False)
    assert any("1 matrices are in" in note and "base only" in note for note in fewer.notes)


def changed_names(note: str) -> list[str]:
    return note.partition("cannot hold them: ")[2].split(", ")


def test_changed_tensors_outside_module_matrices_are_noted(tmp_path: Path) -> None:
    same = {"a.weight": np.eye(4), "nan.bias": np.array([np.nan, 1.0])}
    base = {
        **same,
        "norm.bias": np.zeros(3),
        "position": np.zeros((1, 5, 4)),
        "A_log": np.zeros((4, 2)),
        "scalar": np.array(1.0),
        "resized.bias": np.zeros(3),
        "gone.bias": np.zeros(2),
        "counts": np.arange(3),
    }
    tuned = {
        **same,
        "a.weight": 2 * np.eye(4),
        "norm.bias": np.ones(3),
        "position": np.ones((1, 5, 4)),
        "A_log": np.ones((4, 2)),
        "scalar": np.array(2.0),
        "resized.bias": np.zeros(4),
        "new.bias": np.zeros(2),
        "counts": np.arange(3),
    }
    for name, content in (("base", base), ("tuned", tuned)):
        save_file(content, tmp_path / f"{name}.safetensors")
        torch.save({k: torch.from_numpy(v.copy()) for k, v in content.items()}, tmp_path / f"{name}.bin")
    files = [[tmp_path / f"{n}.{x}" for n in ("base", "tuned")] for x in ("safetensors", "bin")]
    for pair in ([base, tuned], *files):
        notes = lorank.extract(*pair, avg_rank=1, progress=False).notes
        (changed,) = [note for note in notes if "cannot hold them" in note]
        assert changed.startswith("5 tensors changed")
        assert {"norm.bias", "position", "A_log", "scalar", "resized.bias"} >= set(changed_names(changed)[:3])
        for name in ("gone.bias", "new.bias"):
            assert any("1 tensors that are not matrices are in" in n and n.endswith(name) for n in notes)


def test_parameters_of_live_models_are_compared() -> None:
    model = tiny_models.vit()
    after = tuned_copy(model)
    after.vit.embeddings.position_embeddings.data += 1.0
    after.vit.embeddings.cls_token.data = model.vit.embeddings.cls_token.data.clone()
    notes = lorank.extract(model, after, avg_rank=1, progress=False).notes
    assert any("1 tensors changed" in n and "position_embeddings" in n for n in notes), notes


def test_excluded_tied_head_gets_no_update() -> None:
    model = tiny_models.llama_tied()
    adapter = lorank.extract(model, tuned_copy(model), exclude=["lm_head"], avg_rank=2, progress=False)
    assert "model.embed_tokens" in adapter.modules
    assert "lm_head" not in adapter.modules
    assert "ensure_weight_tying" not in adapter.config
    assert any("lm_head shares the weight of model.embed_tokens, but is excluded" in x for x in adapter.notes)
    assert not any("matches no module" in note for note in adapter.notes)


def test_tied_head_stored_as_a_copy_is_extracted_once(tmp_path: Path) -> None:
    model = tiny_models.llama_tied()
    after = tuned_copy(model)
    for name, part in (("base", model), ("tuned", after)):
        state = {k: v.detach().clone().numpy() for k, v in part.state_dict().items()}
        assert np.array_equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    adapter = lorank.extract(*paths, avg_rank=2, progress=False)
    assert [name for name in adapter.modules if "embed" in name or "head" in name] == ["model.embed_tokens"]
    assert any("lm_head is model.embed_tokens" in note for note in adapter.notes)
    # A separate head is extracted even if it has the shape of the embedding.
    state = load_file(paths[1])
    state["lm_head.weight"] = state["lm_head.weight"] + 0.5
    save_file(state, paths[1])
    assert "lm_head" in lorank.extract(*paths, avg_rank=2, progress=False).modules


def test_share_of_the_base_model_is_a_budget() -> None:
    model = tiny_models.llama()
    after = tuned_copy(model)
    whole = sum(p.numel() for p in model.parameters())
    for budget, most in (("10%", whole // 10), ("5 %", whole // 20)):
        adapter = lorank.extract(model, after, budget=budget, include=["q_proj", "up_proj"], progress=False)
        assert most - 80 < adapter.num_parameters <= most
    with pytest.raises(ValueError, match="not a percentage"):
        lorank.extract(model, after, budget="x%")


def test_base_model_is_named_only_if_it_has_a_path(tmp_path: Path) -> None:
    model = tiny_models.llama()
    after = tuned_copy(model)
    knobs: dict[str, Any] = {"include": ["q_proj"], "avg_rank": 1, "progress": False}
    assert lorank.extract(model, after, **knobs).base_model is None
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    assert lorank.extract(state, after, **knobs).base_model is None
    model.save_pretrained(tmp_path / "base")
    assert lorank.extract(tmp_path / "base", after, **knobs).base_model == str(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    assert lorank.extract(again, after, **knobs).base_model == str(tmp_path / "base")


def test_prefix_makes_names_fit_a_wrapped_model(tmp_path: Path) -> None:
    classifier = tiny_models.bert_classifier()
    inner, after = classifier.bert, tuned_copy(classifier.bert)
    inner.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned")
    paths, knobs = (
        (tmp_path / "base", tmp_path / "tuned"),
        {"include": ["query"], "avg_rank": 3, "progress": False},
    )
    plain = lorank.extract(*paths, **knobs)
    assert any(
        f"named as in the BertModel of {paths[0]}: PEFT finds them only" in note for note in plain.notes
    )
    for prefix in ("bert", "bert."):
        adapter = lorank.extract(*paths, prefix=prefix, **knobs)
        assert list(adapter.modules) == [f"bert.{name}" for name in plain.modules]
        assert any(f"with the prefix {prefix!r}" in note for note in adapter.notes)
    adapter.save(tmp_path / "a")
    merged = dict(loaded(classifier, tmp_path / "a").merge_and_unload().named_parameters())
    for name, update in dense(adapter).items():
        change = merged[f"{name}.weight"] - dict(classifier.named_parameters())[f"{name}.weight"]
        np.testing.assert_allclose(change.detach().numpy(), update, atol=2e-6)


def test_invalid_extractions_raise() -> None:
    base = {"a.weight": np.eye(4), "b.weight": np.eye(3)}
    with pytest.raises(ValueError, match="rank_ratio has no meaning"):
        lorank.extract(base, base, rank_ratio=0.5)
    with pytest.raises(ValueError, match="no selected matrix differs"):
        lorank.extract(base, base, avg_rank=1, progress=False)
    with pytest.raises(ValueError, match=r"a: \(4, 4\) in mapping, \(5, 4\) .*exclude this module"):
        lorank.extract(base, {**base, "a.weight": np.ones((5, 4))}, avg_rank=1)
    with pytest.raises(ValueError, match="no selected matrix in common"):
        lorank.extract(base, {"c.weight": np.eye(3)}, avg_rank=1)
    with pytest.raises(lorank.NumericalError, match=r"'b'.*NaN"):
        lorank.extract(base, {**base, "b.weight": np.full((3, 3), np.nan)}, avg_rank=1, progress=False)
    with pytest.raises(ValueError, match="exactly one of"):
        lorank.extract(base, base)
