"""Parameter groups: every trainable parameter once, at the learning rate of its rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorank.training import param_groups, resize_lora
from tests.support import tiny_models

RANKS = {"0.self_attn.q_proj": 8, "1.self_attn.q_proj": 2, "0.self_attn.v_proj": 2, "1.self_attn.v_proj": 4}


def adapted(**settings: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(tiny_models.llama(), config)
    resize_lora(model, RANKS)  # on average 4
    return model


def rates(model: Any, groups: list[dict[str, Any]]) -> dict[str, float]:
    """Return the learning rate by parameter, checking that every trainable parameter is in one group."""
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
        ("uniform", {2: 1, 4: 1, 8: 1}),
        ("scale", {2: 2, 4: 1, 8: 0.5}),  # All scalings are 2.
        ("rank", {2: 2, 4: 1, 8: 0.5}),
        ("sqrt-rank", {2: 2**0.5, 4: 1, 8: 0.5**0.5}),
    ],
)
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_learning_rates_follow_the_rule(
    rule: Any, multipliers: dict[int, float], ratio: float | None
) -> None:
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


def test_other_trained_parameters_have_the_base_rate() -> None:
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


def test_lora_plus_excludes_embeddings() -> None:
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
        ("uniform", lambda r: 2.0 / r),
        ("scale", lambda _: 2.0),
        ("scale", lambda r: 2.0 * r**-0.5),
        ("scale", lambda r: 2.0 / r),
        ("scale", lambda r: {4: 0.5, 16: 3.0, 64: -0.1}[r]),
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
        ({"lr": 1, "rule": "square"}, "rule must be one of uniform, scale, rank, sqrt-rank, not 'square'"),
        ({"lr": 1, "rule": "constant"}, "rule must be one of uniform, scale"),
        ({"lr": 1, "lora_plus_ratio": -1}, "lora_plus_ratio must be"),
        ({"lr": 1, "weight_decay": -1}, "weight_decay must be"),
        ({"lr": 1, "adapter_name": "other"}, "no adapter 'other' in the model"),
    ],
)
def test_invalid_arguments_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(adapted(), **arguments)


def test_scalings_are_read_from_the_model() -> None:
    model = adapted()
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for layer, scaling in zip(layers.values(), (1.0, -2.0, 3.0, 0.5), strict=True):
        layer.scaling["default"] = scaling
    products = {name: abs(m.scaling["default"]) * m.r["default"] for name, m in layers.items()}
    mean = sum(products.values()) / 4
    for name, rate in rates(model, param_groups(model, 1e-3, rule="scale")).items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        assert rate == pytest.approx(1e-3 * mean / products[module])
    next(iter(layers.values())).scaling["default"] = 0.0
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj' has scaling 0"):
        param_groups(model, 1e-3, rule="scale")


def test_equal_rates_share_a_group_and_close_rates_have_distinct_names() -> None:
    # One alpha for all ranks: 2 / 3 * 3 and 2 / 49 * 49 differ in the last bit.
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 49})
    groups = param_groups(get_peft_model(tiny_models.llama(), config), 1e-3, rule="scale")
    assert [(group["name"], group["lr"]) for group in groups] == [("lora lr=0.001", 1e-3)]
    config = LoraConfig(
        r=10000, lora_alpha=10000, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 10001}
    )
    groups = param_groups(get_peft_model(tiny_models.llama(), config), 1e-3, rule="rank")
    assert len({group["name"] for group in groups}) == len(groups) == 2


def test_groups_built_before_restoring_ranks_fit_a_resumed_optimizer() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, rule="scale"))
    resize_lora(model, {"0.self_attn.q_proj": 4, "1.self_attn.v_proj": 2}, optimizer=optimizer)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    again = adapted()
    resumed = torch.optim.AdamW(param_groups(again, 1e-3, rule="scale"))
    resize_lora(again, {"0.self_attn.q_proj": 4, "1.self_attn.v_proj": 2})
    resumed.load_state_dict(optimizer.state_dict())
    for one, other in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert one["lr"] == other["lr"]
        for p, q in zip(one["params"], other["params"], strict=True):
            assert torch.equal(resumed.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
    too_late = torch.optim.AdamW(param_groups(again, 1e-3, rule="scale"))
    with pytest.raises(ValueError, match="group"):
        too_late.load_state_dict(optimizer.state_dict())


def test_frozen_model_raises() -> None:
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        param_groups(adapted().requires_grad_(False), 1e-3)
