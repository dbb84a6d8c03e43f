"""Ranks in PEFT: every adapter layer of real PEFT models has exactly its rank and scale."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file

import lorank
from tests.support import tiny_models

SCALES = {
    "constant": lambda _, r, alpha: alpha / r,
    "rank-stabilized": lambda rank, _, alpha: alpha / math.sqrt(rank),
}


def various_ranks(allocation: lorank.RankAllocation, seed: int = 0) -> lorank.RankAllocation:
    """Return an allocation of the same modules with ranks from 1 to 6, so that confused names differ."""
    rng = np.random.default_rng(seed)
    ranks = {name: int(rng.integers(1, 7)) for name in allocation.ranks}
    return lorank.RankAllocation(
        allocation.modules, ranks, allocation.scores, "test", allocation.other_modules
    )


def adapted(model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Return rank and scale of every module of a PEFT model by its name in the base model."""
    found = {}
    for name, layer in model.named_modules():
        if not getattr(layer, "r", None) or "default" not in layer.r:
            continue
        name = name.removeprefix("base_model.model.")
        parameter = getattr(layer, "parameter_name", None)
        if parameter is not None and parameter != "weight":
            name = f"{name.replace('.base_layer', '')}.{parameter}"
        found[name] = (layer.r["default"], layer.scaling["default"])
    return found


def apply(model: torch.nn.Module, config: LoraConfig) -> dict[str, tuple[int, float]]:
    with warnings.catch_warnings():
        # PEFT warns about an unused rank_pattern key.
        warnings.filterwarnings("error", message=r".*(rank_pattern|alpha_pattern|target_parameters).*")
        return adapted(get_peft_model(copy.deepcopy(model), config))


BUILDERS: list[Callable[[], torch.nn.Module]] = [
    tiny_models.bert,
    tiny_models.bert_classifier,
    tiny_models.llama,
    tiny_models.gpt2,
    tiny_models.mixtral,
    tiny_models.gpt_oss,
]


@pytest.mark.parametrize("rule", list(SCALES))
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_every_adapter_layer_has_its_rank_and_scale(build: Callable[[], torch.nn.Module], rule: Any) -> None:
    model = build()
    allocation = various_ranks(lorank.allocate(model, "uniform"))
    config = allocation.to_lora_config(model, scale_rule=rule, lora_alpha=12)
    found = apply(model, config)
    assert {name: rank for name, (rank, _) in found.items()} == allocation.ranks
    for rank, scale in found.values():
        assert scale == pytest.approx(SCALES[rule](rank, config.r, 12), rel=1e-12)


@pytest.mark.parametrize(
    "build", [tiny_models.mixtral, tiny_models.gpt_oss], ids=lambda build: build.__name__
)
def test_stacked_experts_become_target_parameters(build: Callable[[], torch.nn.Module]) -> None:
    model = build()
    allocation = lorank.allocate(model, "uniform")
    stacks = [module for module in allocation.modules if module.kind == "expert"]
    assert len(stacks) >= 2
    parameters = dict(model.named_parameters())
    for module in stacks:
        assert parameters[module.name].ndim == 3
        assert module.copies == parameters[module.name].shape[0]
        assert module.cost == module.copies * sum(parameters[module.name].shape[1:])
    peft_model = get_peft_model(copy.deepcopy(model), allocation.to_lora_config(model))
    trainable = sum(p.numel() for name, p in peft_model.named_parameters() if "lora_" in name)
    assert trainable == allocation.num_parameters


@pytest.mark.parametrize("with_model", [True, False])
def test_ranks_of_a_bare_encoder_fit_its_classifier(with_model: bool) -> None:
    allocation = various_ranks(lorank.allocate(tiny_models.bert(), "uniform"))
    classifier = tiny_models.bert_classifier()
    config = allocation.to_lora_config(classifier if with_model else None)
    found = apply(classifier, config)
    expected = {f"bert.{name}": rank for name, rank in allocation.ranks.items()}
    assert {name: rank for name, (rank, _) in found.items()} == expected


def test_ranks_of_a_classifier_fit_the_bare_encoder() -> None:
    allocation = various_ranks(lorank.allocate(tiny_models.bert_classifier(), "uniform"))
    model = tiny_models.bert()
    found = apply(model, allocation.to_lora_config(model))
    assert {f"bert.{name}": rank for name, (rank, _) in found.items()} == allocation.ranks


def test_ranks_from_a_saved_model_fit_the_loaded_one(tmp_path: Path) -> None:
    for build in (tiny_models.llama, tiny_models.gpt2):
        model = build()
        folder = tmp_path / build.__name__
        model.save_pretrained(folder)
        allocation = various_ranks(lorank.allocate(folder, "uniform"))
        found = apply(model, allocation.to_lora_config(model))
        ranks = [rank for rank, _ in found.values()]
        assert len(ranks) == len(allocation.ranks)
        for name, (rank, _) in found.items():
            assert allocation.ranks[next(key for key in allocation.ranks if name.endswith(key))] == rank


class Nested(torch.nn.Module):
    """Modules whose names end with each other, and with those of modules outside the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)
        self.a = torch.nn.ModuleDict(
            {"proj": torch.nn.Linear(4, 4), "b.c".replace(".", "_"): torch.nn.Linear(4, 4)}
        )
        self.inner = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})})
        self.w1 = torch.nn.Linear(4, 4)
        self.w10 = torch.nn.Linear(4, 4)


@pytest.mark.parametrize("targets", [None, ["proj"], r"proj", r"a\.proj", r"(a\.)?proj|w1", r"inner.*|w10"])
def test_names_ending_with_each_other_get_their_own_ranks(targets: Any) -> None:
    model = Nested()
    allocation = lorank.allocate(model, "uniform", targets=targets)
    for seed in range(4):
        ranked = various_ranks(allocation, seed)
        for given in (model, None):
            found = apply(model, ranked.to_lora_config(given))
            assert {name: rank for name, (rank, _) in found.items()} == ranked.ranks


def test_rank_zero_excludes_a_module() -> None:
    model = tiny_models.llama()
    allocation = lorank.allocate(model, "uniform", r_min=0, r_max=4)
    dropped = list(allocation.ranks)[::3]
    ranks = {name: 0 if name in dropped else rank for name, rank in allocation.ranks.items()}
    fewer = lorank.RankAllocation(
        allocation.modules, ranks, allocation.scores, "test", allocation.other_modules
    )
    for given in (model, None):
        found = apply(model, fewer.to_lora_config(given))
        assert set(found) == set(ranks) - set(dropped)
    none = lorank.RankAllocation(allocation.modules, dict.fromkeys(ranks, 0), allocation.scores, "test")
    with pytest.raises(ValueError, match="nothing is left to adapt"):
        none.to_lora_config(model)


@pytest.mark.parametrize("rule", list(SCALES))
def test_config_survives_saving(tmp_path: Path, rule: Any) -> None:
    model = tiny_models.llama()
    allocation = various_ranks(lorank.allocate(model, "uniform"))
    config = allocation.to_lora_config(model, scale_rule=rule, task_type="CAUSAL_LM", lora_alpha=16)
    config.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    assert apply(model, again) == apply(model, config)
    # The saved adapter keeps its ranks, too: PEFT sorts pattern keys when saving.
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert adapted(loaded) == adapted(peft_model)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, peft_model(ids).logits, rtol=0, atol=0)


def test_settings_are_plain_json_with_few_keys() -> None:
    allocation = various_ranks(lorank.allocate(tiny_models.llama(), "uniform"))
    settings = allocation.lora_settings(scale_rule="rank-stabilized")
    assert json.loads(json.dumps(settings)) == settings
    assert settings["use_rslora"] is False
    assert len(settings["rank_pattern"]) <= 6, "one key a rank, not one a module"


def test_uniform_ranks_need_no_patterns() -> None:
    model = tiny_models.llama()
    settings = lorank.allocate(model, "uniform", r_max=8).lora_settings(model, lora_alpha=32)
    assert (settings["r"], settings["lora_alpha"]) == (8, 32)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}


@pytest.mark.parametrize(
    "name",
    [
        "r",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "use_rslora",
    ],
)
def test_settings_decided_by_the_allocation_raise(name: str) -> None:
    allocation = lorank.allocate({"a.weight": np.eye(3)}, "uniform")
    with pytest.raises(ValueError, match=f"{name}: decided by the allocation"):
        allocation.to_lora_config(**{name: None})


def test_unknown_scale_rule_raises() -> None:
    allocation = lorank.allocate({"a.weight": np.eye(3)}, "uniform")
    with pytest.raises(ValueError, match="scale_rule must be"):
        allocation.to_lora_config(scale_rule="wild")


def test_names_missing_from_the_model_raise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save_file({"elsewhere.weight": rng.standard_normal((4, 4))}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'elsewhere' fits none of the model's modules"):
        lorank.allocate(tmp_path / "a.safetensors", "uniform").to_lora_config(Nested())
    save_file({"layer.weight": rng.standard_normal((4, 4))}, tmp_path / "b.safetensors")
    twins = torch.nn.ModuleDict(
        {name: torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)}) for name in "xy"}
    )
    with pytest.raises(ValueError, match=r"'layer' fits several of the model's modules \(x.layer, y.layer\)"):
        lorank.allocate(tmp_path / "b.safetensors", "uniform").to_lora_config(twins)
    save_file({"w1.weight": rng.standard_normal((4, 5))}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"'w1' has shape \(4, 5\) in the source, but 'w1' .* \(4, 4\)"):
        lorank.allocate(tmp_path / "c.safetensors", "uniform").to_lora_config(Nested())
