"""Groups of modules that need one rank in PEFT: detection, selection, and files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorank
from lorank.adapters.factors import in_memory
from lorank.adapters.module import LoraModule
from lorank.peft_format.rank_groups import group_indices, rank_groups, rank_owner
from lorank.sources.base import Kind
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, loaded, norm, saved, trained
from tests.support.live_models import IDS, Attention
from tests.support.outputs import outputs

RATIOS = [0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0]


def module(name: str, kind: Kind = "linear", shape: tuple[int, int] = (8, 8)) -> LoraModule:
    return LoraModule(name, kind, shape, 4, 1.0, "float32", list)


def test_groups_follow_names_and_settings() -> None:
    modules = [
        module("model.embed", "embedding", (8, 64)),
        module("block.attn"),
        module("block.attn.base_layer.out_proj"),
        module("mlp.experts.0.gate_proj"),
        module("mlp.experts.0.down_proj"),
        module("mlp.experts.1.up_proj"),
        module("mlp.experts.1.down_proj"),
        module("other.experts.0.w2"),
        module("block.out_proj"),
        module("head", "linear", (64, 8)),
    ]
    held = [
        ["block.attn", "block.attn.base_layer.out_proj"],
        ["mlp.experts.0.gate_proj", "mlp.experts.1.up_proj"],
        ["mlp.experts.0.down_proj", "mlp.experts.1.down_proj"],
    ]
    assert rank_groups(modules, {}) == held
    assert rank_groups(modules, {"ensure_weight_tying": True}) == [["model.embed", "head"], *held]
    assert rank_owner("block.attn.base_layer.out_proj") == "block.attn"
    assert rank_owner("block.out_proj") == "block.out_proj"


def test_groups_are_given_as_positions() -> None:
    assert group_indices(["a", "b", "c"], []) == [[0], [1], [2]]
    assert group_indices(["a", "b", "c"], [["c", "a", "gone"]]) == [[1], [2, 0]]


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def attentions() -> tuple[Any, LoraConfig, torch.Tensor]:
    torch.manual_seed(3)
    config = LoraConfig(
        r=6, lora_alpha=9, target_modules=["attention", "head"], rank_pattern={"attention": 5}
    )
    return TwoAttentions().eval(), config, torch.randn(1, 5, 8)


def tied() -> tuple[Any, LoraConfig, torch.Tensor]:
    config = LoraConfig(r=6, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    return tiny_models.llama_tied(), config, IDS


@pytest.mark.parametrize("case", [attentions, tied])
@pytest.mark.parametrize("profile", ["compact", "portable", "tensor-rank"])
def test_peft_loads_every_ratio(case: Any, profile: Any, tmp_path: Path) -> None:
    base, config, inputs = case()
    live = trained(base, config)
    if case is tied:  # The random factors of tied modules must describe one update.
        head, table = live.base_model.model.lm_head, live.base_model.model.model.embed_tokens
        head.lora_A.default.weight.data = table.lora_embedding_B.default.data.t()
        head.lora_B.default.weight.data = table.lora_embedding_A.default.data.t()
    before = outputs(live, inputs)
    adapter = lorank.LoraAdapter.load(saved(live, tmp_path / "a"))
    groups = rank_groups(adapter.modules.values(), adapter.config)
    assert groups
    for ratio in RATIOS:
        small = lorank.compress(adapter, rank_ratio=ratio, progress=False)
        assert small.certificate is not None
        assert distance(dense(adapter), dense(small)) == pytest.approx(
            small.certificate.error, abs=1e-6 * norm(dense(adapter))
        )
        small.save(tmp_path / f"{ratio}", profile)
        found = outputs(loaded(base, tmp_path / f"{ratio}"), inputs)
        for group in groups:
            assert len({small.ranks[name] for name in group}) == 1
        torch.testing.assert_close(found, outputs(by_peft(base, config, small), inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)


def by_peft(base: Any, config: LoraConfig, adapter: lorank.LoraAdapter) -> Any:
    """Return PEFT's model with updates factorised by NumPy.

    Updates are not merged into weights, as PEFT 0.21 adds the update of an attention output twice.
    """
    live = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    for name, update in dense(adapter).items():
        layer = live.base_model.model.get_submodule(name)
        rank, scaling = layer.r["default"], layer.scaling["default"]
        left, values, right = np.linalg.svd(update, full_matrices=False)
        b = torch.from_numpy(left[:, :rank] * values[:rank] / scaling).float()
        a = torch.from_numpy(right[:rank]).float()
        if adapter.modules[name].kind == "embedding":
            layer.lora_embedding_A.default.data, layer.lora_embedding_B.default.data = a, b
        else:
            layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = a, b
    return live


def test_unequal_ranks_of_a_file_are_padded(tmp_path: Path) -> None:
    base, config, inputs = attentions()
    adapter = lorank.LoraAdapter.load(saved(trained(base, config), tmp_path / "a"))
    cut = adapter.modules["first.attention.base_layer.out_proj"]
    ((b, a),) = ((b.to_array()[:, :2], a.to_array()[:2]) for b, a in cut.factors())
    modules = {**adapter.modules, cut.name: replace(cut, rank=2, factors=lambda: [in_memory(b, a)])}
    unequal = replace(adapter, modules=modules)
    unequal.save(tmp_path / "b")
    torch.testing.assert_close(
        outputs(loaded(base, tmp_path / "b"), inputs), outputs(by_peft(base, config, unequal), inputs)
    )
    assert lorank.LoraAdapter.load(tmp_path / "b").ranks == unequal.ranks


def test_budget_includes_all_members_of_a_group(tmp_path: Path) -> None:
    base, config, _ = attentions()
    adapter = lorank.LoraAdapter.load(saved(trained(base, config), tmp_path / "a"))
    groups = rank_groups(adapter.modules.values(), adapter.config)
    cheapest = min(m.cost for m in adapter.modules.values())
    for budget in range(0, adapter.num_parameters + 50, 37):
        small = lorank.compress(adapter, budget=budget, progress=False)
        assert small.num_parameters <= budget
        for group in groups:
            assert len({small.ranks[name] for name in group}) == 1
        if small.num_parameters:
            small.save(tmp_path / "b", overwrite=True)
            written = lorank.LoraAdapter.load(tmp_path / "b")
            assert sum(m.num_parameters for m in written.modules.values()) == small.num_parameters
        else:
            assert budget < 3 * cheapest + sum(m.cost for m in adapter.modules.values())


def test_groups_are_ranked_by_the_energy_of_all_members(tmp_path: Path) -> None:
    base, config, _ = attentions()
    adapter = lorank.LoraAdapter.load(saved(trained(base, config), tmp_path / "a"))
    values = {name: np.linalg.svd(x, compute_uv=False) for name, x in dense(adapter).items()}
    groups = [[n for n in values if rank_owner(n) == owner] for owner in values if rank_owner(owner) == owner]
    pooled = {g[0]: np.sqrt(sum(np.square(values[n][:6]) for n in g)) for g in groups}
    everything = np.sort(np.concatenate(list(pooled.values())))[::-1]
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    threshold = everything[2 * len(groups) - 1]
    for group in groups:
        assert {small.ranks[n] for n in group} == {int((pooled[group[0]] >= threshold).sum())}
    whole = sum(float(np.square(x).sum()) for x in values.values())
    kept = lorank.compress(adapter, energy=0.8, progress=False)
    assert sum(float(np.square(x).sum()) for x in (dense(kept).values())) >= 0.8 * whole * (1 - 1e-6)


def test_merges_and_families_keep_groups_together(tmp_path: Path) -> None:
    base, config, inputs = attentions()
    paths = [saved(trained(base, config, seed=k), tmp_path / f"{k}") for k in range(2)]
    groups = rank_groups(lorank.LoraAdapter.load(paths[0]).modules.values(), {})
    merged = lorank.merge(paths, avg_rank=3, progress=False)
    for small in [merged, *lorank.family(paths[0], [1, 2.5, 4], progress=False).values()]:
        for group in groups:
            assert len({small.ranks[name] for name in group}) == 1
        small.save(tmp_path / "out", overwrite=True)
        found = outputs(loaded(base, tmp_path / "out"), inputs)
        torch.testing.assert_close(found, outputs(by_peft(base, config, small), inputs), rtol=1e-4, atol=1e-5)


def test_ranks_inside_attention_follow_its_name(tmp_path: Path) -> None:
    base, _, inputs = attentions()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["attention", "head"],
        rank_pattern={"first.attention": 2, "second.attention": 3},
        alpha_pattern={"first.attention": 16},
    )
    live = trained(base, config)
    adapter = lorank.LoraAdapter.load(saved(live, tmp_path / "a"))
    assert adapter.modules["first.attention.base_layer.out_proj"].rank == 2
    assert adapter.modules["first.attention.base_layer.out_proj"].scaling == 8
    torch.testing.assert_close(outputs(by_peft(base, config, adapter), inputs), outputs(live, inputs))


def test_live_tied_adapter_stays_loadable(tmp_path: Path) -> None:
    base, config, inputs = tied()
    live = get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter = lorank.LoraAdapter.from_model(live)
    for ratio in RATIOS:
        lorank.compress(adapter, rank_ratio=ratio, progress=False).into_model(live)
        expected = outputs(live, inputs)
        live.save_pretrained(tmp_path / f"{ratio}")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"{ratio}").eval()
        torch.testing.assert_close(outputs(again, inputs), expected, rtol=1e-4, atol=1e-5)
