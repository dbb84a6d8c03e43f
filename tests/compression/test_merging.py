"""Merges against the dense weighted sum."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, loaded, norm, saved, trained
from tests.support.command_line import ok, run

SETTINGS: list[dict[str, Any]] = [
    {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "up_proj"]},
    {"r": 3, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 8, "lora_alpha": 8, "target_modules": ["up_proj"], "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2}},
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[lorank.LoraAdapter]:
    model = tiny_models.llama()
    return [
        lorank.LoraAdapter.load(
            saved(trained(model, LoraConfig(**s), seed=k), tmp_path_factory.mktemp(f"adapter{k}"))
        )
        for k, s in enumerate(SETTINGS)
    ]


def expected(adapters: list[lorank.LoraAdapter], weights: list[float]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, update in dense(adapter).items():
            total[name] = total.get(name, 0) + weight * update
    return total


@pytest.mark.parametrize("weights", [[0.7, 0.3, 0.1], [1.0, -0.5, 2.0], [1.0, 0.0, 0.0], [1e-20, 1.0, 1e10]])
def test_full_rank_merge_equals_the_weighted_sum(
    adapters: list[lorank.LoraAdapter], weights: list[float]
) -> None:
    merged = lorank.merge(adapters, weights, rank_ratio=1.0, progress=False)
    target = expected(adapters, weights)
    assert distance(dense(merged), target) <= 1e-6 * norm(target)
    assert all(module.scaling == 1.0 for module in merged.modules.values())


def test_truncated_merge_is_the_best_approximation(adapters: list[lorank.LoraAdapter]) -> None:
    weights = [0.7, 0.3, -0.2]
    merged = lorank.merge(adapters, weights, avg_rank=3, progress=False)
    target = expected(adapters, weights)
    assert merged.certificate is not None
    assert merged.certificate.error == pytest.approx(distance(target, dense(merged)), abs=1e-6 * norm(target))
    for name, module in merged.modules.items():
        left, values, right = np.linalg.svd(target[name])
        best = (left[:, : module.rank] * values[: module.rank]) @ right[: module.rank]
        assert np.abs(best - dense(merged)[name]).max() <= 1e-6 * max(norm(target), 1)


def test_weights_are_equal_by_default(adapters: list[lorank.LoraAdapter]) -> None:
    merged = lorank.merge(adapters, rank_ratio=1.0, progress=False)
    target = expected(adapters, [1 / 3] * 3)
    assert distance(dense(merged), target) <= 1e-6 * norm(target)


def test_opposite_adapters_cancel(adapters: list[lorank.LoraAdapter]) -> None:
    merged = lorank.merge([adapters[0], adapters[0]], [1.0, -1.0], rank_ratio=1.0, progress=False)
    assert merged.num_parameters == 0


def test_peft_computes_the_sum(adapters: list[lorank.LoraAdapter], tmp_path: Path) -> None:
    model = tiny_models.llama()
    lorank.merge(adapters, [0.7, 0.3, 0.5], rank_ratio=1.0, progress=False).save(tmp_path / "m")
    summed = copy.deepcopy(model)
    modules = dict(summed.named_modules())
    for name, update in expected(adapters, [0.7, 0.3, 0.5]).items():
        modules[name].weight.data += torch.from_numpy(update).float()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(model, tmp_path / "m")(ids).logits, summed(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_stacked_experts_are_merged(tmp_path: Path) -> None:
    model = tiny_models.mixtral()
    config = lorank.allocate(model, "uniform", r_max=4).to_lora_config(model, lora_alpha=6)
    parts = [
        lorank.LoraAdapter.load(saved(trained(model, config, seed), tmp_path / str(seed))) for seed in (0, 1)
    ]
    merged = lorank.merge(parts, [0.5, 2.0], rank_ratio=1.0, progress=False)
    target = expected(parts, [0.5, 2.0])
    assert distance(dense(merged), target) <= 1e-6 * norm(target)


def test_invalid_merges_raise(adapters: list[lorank.LoraAdapter]) -> None:
    for weights in ([1.0], [1.0, np.nan, 1.0], [1.0, np.inf, 1.0]):
        with pytest.raises(ValueError, match="need as many finite weights"):
            lorank.merge(adapters, weights, rank_ratio=1.0, progress=False)
    with pytest.raises(ValueError, match="at least one adapter"):
        lorank.merge([], rank_ratio=1.0)
    dora = trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA magnitudes do not add up"):
        lorank.merge([adapters[0], lorank.LoraAdapter.from_model(dora)], rank_ratio=1.0)
    wide = tiny_models.llama()
    wide.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 40, bias=False)
    misfit = lorank.LoraAdapter.from_model(trained(wide, LoraConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj' is linear .* different models"):
        lorank.merge([adapters[0], misfit], rank_ratio=1.0, progress=False)


def renamed(adapter: lorank.LoraAdapter, prefix: str) -> lorank.LoraAdapter:
    modules = {f"{prefix}{name}": module for name, module in adapter.modules.items()}
    modules = {name: replace(module, name=name) for name, module in modules.items()}
    return replace(adapter, modules=modules, label=prefix or "plain")


def test_names_that_differ_by_a_prefix_raise(adapters: list[lorank.LoraAdapter]) -> None:
    long, short = renamed(adapters[0], "tower."), renamed(adapters[0], "")
    name = next(iter(short.modules))
    for pair in ([long, short], [short, long]):
        with pytest.raises(
            ValueError, match=f"adapts 'tower.{name}', but plain adapts '{name}'.*save it again"
        ):
            lorank.merge(pair, rank_ratio=1.0, progress=False)
    # An adapter with both names shows that the model has both modules.
    both = replace(short, modules={**short.modules, **long.modules})
    merged = lorank.merge([both, short], rank_ratio=1.0, progress=False)
    assert set(merged.modules) == set(both.modules)
    lorank.merge([both, long], rank_ratio=1.0, progress=False)


def test_adapters_without_a_common_module_raise(tmp_path: Path) -> None:
    model = tiny_models.llama()
    paths = [
        saved(trained(model, LoraConfig(r=2, target_modules=[target]), seed=k), tmp_path / target)
        for k, target in enumerate(["q_proj", "v_proj"])
    ]
    with pytest.raises(ValueError, match=r"q_proj shares no module .*force=True"):
        lorank.merge(paths, rank_ratio=1.0, progress=False)
    merged = lorank.merge(paths, [2.0, 3.0], force=True, rank_ratio=1.0, progress=False)
    target = expected([lorank.LoraAdapter.load(path) for path in paths], [2.0, 3.0])
    assert distance(dense(merged), target) <= 1e-6 * norm(target)
    output = tmp_path / "merged"
    command = ["merge", *paths, "-o", output, "--rank-ratio", 1]
    refused = run(*command)
    assert refused.returncode == 1
    assert "--force merges them" in refused.stderr
    ok(*command, "--force")
    assert set(lorank.LoraAdapter.load(output).ranks) == set(merged.ranks)


def test_single_experts_and_their_stack_raise(tmp_path: Path) -> None:
    model = tiny_models.mixtral()
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    stacked = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "stacked"))
    name = "model.layers.0.mlp.experts.3.w2"
    query = next(iter(stacked.modules.values()))
    single = replace(stacked, modules={query.name: query, name: replace(query, name=name)}, label="single")
    for pair in ([stacked, single], [single, stacked]):
        with pytest.raises(ValueError, match=r"single adapts experts one by one .*3\.w2.*transformers 4"):
            lorank.merge(pair, force=True, rank_ratio=1.0, progress=False)


def test_merged_adapter_has_the_ties_of_all(tmp_path: Path) -> None:
    base = tiny_models.llama_tied()
    settings: list[dict[str, Any]] = [
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ]
    parts = []
    for k, more in enumerate(settings):
        live = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, **more))
        for name, parameter in live.named_parameters():
            if "lora_" in name:  # In place, as tied tensors are views of one another.
                parameter.data.copy_(torch.randn(parameter.shape) * 0.2)
        parts.append(saved(live, tmp_path / f"{k}"))
    for pair in (parts[:2], parts[1::-1]):
        merged = lorank.merge(pair, [1.0, 1.0], rank_ratio=1.0, progress=False)
        assert merged.config["ensure_weight_tying"]
        merged.save(tmp_path / "merged", overwrite=True)
        live = loaded(base, tmp_path / "merged").base_model.model
        first = loaded(base, pair[0] if pair[0] == parts[0] else pair[1]).base_model.model
        update = {m: x.lm_head.get_delta_weight("default") for m, x in (("sum", live), ("one", first))}
        torch.testing.assert_close(update["sum"], update["one"], rtol=1e-4, atol=1e-5)
        table = live.model.embed_tokens.get_delta_weight("default")
        torch.testing.assert_close(update["sum"], table, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"/0 ties the output head .* /\S*/2 adapts 'model.embed_tokens'"):
        lorank.merge([parts[0], parts[2]], rank_ratio=1.0, progress=False)
