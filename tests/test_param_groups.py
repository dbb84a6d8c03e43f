"""Parameter groups: every trainable parameter once, at the learning rate that the rule says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from lorank.training import param_groups, resize_lora

RANKS = {"0.self_attn.q_proj": 8, "1.self_attn.q_proj": 2, "0.self_attn.v_proj": 2, "1.self_attn.v_proj": 4}


def adapted(**settings: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(tiny_models.llama(), config)
    resize_lora(model, RANKS)  # on average 4
    return model


def rates(model: Any, groups: list[dict[str, Any]]) -> dict[str, float]:
    """Learning rate by parameter; every trainable parameter is in exactly one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    result: dict[str, float] = {}
    for group in groups:
        for p in group["params"]:
            assert names[id(p)] not in result
            result[names[id(p)]] = group["lr"]
    assert set(result) == {name for name, p in model.named_parameters() if p.requires_grad}
    return result


@pytest.mark.parametrize(
    ("rule", "multipliers"),
    [
        ("constant", {2: 1, 4: 1, 8: 1}),
        ("rank", {2: 2, 4: 1, 8: 0.5}),
        ("sqrt-rank", {2: 2**0.5, 4: 1, 8: 0.5**0.5}),
    ],
)
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_rates_by_rule(rule: Any, multipliers: dict[int, float], ratio: float | None) -> None:
    model = adapted()
    groups = param_groups(model, 1e-3, rule=rule, lora_plus_ratio=ratio, weight_decay=0.1)
    for name, rate in rates(model, groups).items():
        parameter = model.get_parameter(name)
        is_b = "lora_B" in name
        rank = parameter.shape[1 if is_b else 0]
        assert rate == pytest.approx(1e-3 * multipliers[rank] * (ratio if ratio and is_b else 1))
    assert len(groups) == len(set(multipliers.values())) * (2 if ratio else 1)
    assert all(group["weight_decay"] == 0.1 for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups)


def test_everything_else_that_is_trained_has_the_base_rate() -> None:
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], bias="lora_only")
    model = get_peft_model(tiny_models.bert_classifier(), config)
    groups = param_groups(model, 1e-3, rule="rank", lora_plus_ratio=4, weight_decay=0.1)
    found = rates(model, groups)
    heads = [name for name in found if "lora_" not in name]
    assert {name.rpartition(".")[2] for name in heads} == {"weight", "bias"}
    assert all(found[name] == 1e-3 for name in heads)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name in found:
        parameter = model.get_parameter(name)
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_embeddings_are_left_out_of_lora_plus() -> None:
    model = get_peft_model(tiny_models.llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    found = rates(model, param_groups(model, 1e-3, lora_plus_ratio=16))
    assert {name.split("lora_")[1][:11]: rate for name, rate in found.items()} == {
        "embedding_A": 1e-3,
        "embedding_B": 1e-3,
        "A.default.w": 1e-3,
        "B.default.w": 16e-3,
    }


@pytest.mark.parametrize(
    ("rule", "scaling"),
    [
        ("rank", lambda _: 2.0),
        ("sqrt-rank", lambda r: 2.0 * r**-0.5),
        ("constant", lambda r: 2.0 / r),
    ],
)
def test_first_steps_of_adam_are_equally_large_for_all_ranks(rule: Any, scaling: Any) -> None:
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({str(r): torch.nn.Linear(512, 64) for r in (4, 16, 64)})
    pattern = {str(r): r for r in (4, 16, 64)}
    alphas = {str(r): scaling(r) * r for r in (4, 16, 64)}
    config = LoraConfig(target_modules=list(base), rank_pattern=pattern, alpha_pattern=alphas)
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam(param_groups(model, 1e-3, rule=rule), eps=1e-30)
    x, direction = torch.randn(1, 512), torch.randn(64)
    modules = model.base_model.model
    before = {name: modules[name](x).detach() for name in base}
    sum((modules[name](x) * direction).sum() for name in base).backward()
    optimizer.step()
    moved = [float((modules[name](x) - before[name]).norm()) for name in base]
    assert max(moved) < 1.3 * min(moved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": 1, "rule": "square"}, "rule must be one of constant, rank, sqrt-rank, not 'square'"),
        ({"lr": 1, "lora_plus_ratio": -1}, "lora_plus_ratio must be"),
        ({"lr": 1, "weight_decay": -1}, "weight_decay must be"),
        ({"lr": 1, "adapter_name": "other"}, "no adapter 'other' in the model"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(adapted(), **arguments)


def test_a_frozen_model_has_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        param_groups(adapted().requires_grad_(False), 1e-3)
