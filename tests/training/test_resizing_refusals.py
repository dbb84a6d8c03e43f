"""Ranks, models and optimizer states that resize_lora refuses, leaving everything unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model

import lorank
from lorank.training import resize_lora
from tests.support import tiny_models
from tests.support.adapter_files import trained
from tests.support.lora_layers import factors, layers, ranks
from tests.support.optimizers import UnknownState, trainable
from tests.support.resizable_models import LLAMA, Mixed, assert_untouched, linear, mixed, snapshot, step


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"q_proj": 3}, "ranks: 'q_proj' matches several adapted modules"),
        ({"0.self_attn.k_proj": 3}, "'0.self_attn.k_proj' matches no adapted module"),
        ({"0.self_attn.q_proj": 3, "model.layers.0.self_attn.q_proj": 3}, "two names match"),
        ({"0.self_attn.q_proj": 0}, "rank 0 is below 1, the smallest rank in PEFT"),
        ({"0.self_attn.q_proj": -1}, "rank -1"),
        ({"0.self_attn.q_proj": 2.5}, "must be an integer, not 2.5"),
        ({"0.self_attn.q_proj": True}, "must be an integer, not True"),
    ],
)
def test_invalid_ranks_raise(wanted: dict[str, Any], message: str) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=LLAMA))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        resize_lora(model, {"1.mlp.up_proj": 2, **wanted})
    assert_untouched(model, before)


def test_unresizable_modules_are_refused_by_name_and_stay_unchanged() -> None:
    def refused(
        model: Any, error: type[Exception], message: str, name: str = "first", **options: Any
    ) -> None:
        before = snapshot(model) if not hasattr(model, "_orig_mod") else None
        with pytest.raises(error, match=message):
            resize_lora(model, {"last": 3, name: 2}, **options)
        if before:
            assert_untouched(model, before)

    dora = get_peft_model(Mixed(), LoraConfig(r=4, target_modules=["first", "last"], use_dora=True))
    refused(dora, NotImplementedError, "'last' is a Dora.*, not plain LoRA")
    merged = mixed()
    merged.merge_adapter()
    refused(merged, ValueError, "'last': adapter 'default' is merged")
    refused(mixed(), ValueError, "no adapter 'other' in the model, only default", adapter_name="other")
    pissa = get_peft_model(
        Mixed(), LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights="pissa")
    )
    refused(pissa, NotImplementedError, "initialised by 'pissa', which derives the base model")
    odd = get_peft_model(
        Mixed(), LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights="orthogonal")
    )
    refused(odd, ValueError, "PEFT loads even ranks only")
    broken = mixed()
    factors(layers(broken)["first"])[0].data[0, 0] = torch.nan
    with pytest.raises(lorank.NumericalError, match="'first': its factors hold NaN"):
        resize_lora(broken, {"last": 6, "first": 2})
    assert set(ranks(broken).values()) == {4}
    refused(torch.compile(mixed()), NotImplementedError, "wrapped in OptimizedModule")
    with pytest.raises(ValueError, match=r"pass model\.module"):
        resize_lora(torch.nn.DataParallel(mixed()), {"first": 2})
    with pytest.raises(ValueError, match="the model has no adapters"):
        resize_lora(Mixed(), {"first": 2})
    empty = mixed()
    factors(layers(empty)["first"])[0].data = torch.empty(0)
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        resize_lora(empty, {"first": 2})

    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1, groups=2))
    grouped = get_peft_model(grouped, LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="'0' is a convolution in 2 groups"):
        resize_lora(grouped, {"0": 2})
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    attention = get_peft_model(attention, LoraConfig(r=4, target_modules=["0"]))
    for name in ("0", "out_proj"):
        with pytest.raises(NotImplementedError, match=r"belongs to a torch\.nn\.MultiheadAttention"):
            resize_lora(attention, {name: 2})
    ada = get_peft_model(Mixed(), AdaLoraConfig(target_modules=["first"], total_step=10))
    with pytest.raises(NotImplementedError, match="adapter 'default' is ADALORA"):
        resize_lora(ada, {"first": 2})


def test_tied_adapters_are_refused() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(tiny_models.llama_tied(), config)
    with pytest.raises(NotImplementedError, match=r"embed_tokens and lm_head share their factors"):
        resize_lora(model, {"embed_tokens": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: transformers.Adafactor(ps), r"'exp_avg_sq_row' of Adafactor cannot be carried over"),
        (lambda ps: torch.optim.Adafactor(ps), r"'row_var' of Adafactor cannot be carried over"),
        (lambda ps: UnknownState(ps, lr=0.1), r"module '0': the state 'curvature' of UnknownState"),
    ],
)
def test_unknown_optimizer_state_is_refused(make: Any, message: str) -> None:
    model = linear()
    optimizer = make(trainable(model))
    resize_lora(model, {"0": 5}, optimizer=optimizer)  # before the first step there is nothing to carry
    step(model, optimizer, 0)
    before = snapshot(model, optimizer)
    with pytest.raises(NotImplementedError, match=message):
        resize_lora(model, {"0": 3}, optimizer=optimizer)
    assert_untouched(model, before, optimizer)


def test_8_bit_state_is_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = linear().float()
    optimizer = bitsandbytes.optim.AdamW8bit(trainable(model))
    for p in factors(layers(model)["0"]):
        optimizer.state[p] = {"step": 1, "state1": torch.zeros(p.shape, dtype=torch.uint8)}
    with pytest.raises(NotImplementedError, match="'state1' of AdamW8bit"):
        resize_lora(model, {"0": 3}, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "fp8"])
def test_quantized_state_is_refused_before_any_change(kind: str) -> None:
    """The state has the shape of the factors and a known name, but cannot be sliced along an axis."""
    states = pytest.importorskip("torchao.optim.subclass_" + kind)
    zeros = getattr(states, f"OptimState{kind.capitalize()}").zeros
    model = trained(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=4, target_modules=["0"]))
    optimizer = torch.optim.AdamW(trainable(model))
    for p in factors(layers(model)["0"]):
        optimizer.state[p] = {"step": torch.tensor(1.0)} | {
            key: zeros(p.shape, *((key == "exp_avg",) if kind != "fp8" else ()), 64)
            for key in ("exp_avg", "exp_avg_sq")
        }
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="the state 'exp_avg' of AdamW cannot be carried over"):
        resize_lora(model, {"0": 6}, optimizer=optimizer)
    assert_untouched(model, before)


def test_optimizer_of_another_model_is_refused() -> None:
    model = linear()
    optimizer = torch.optim.SGD(trainable(linear()), lr=0.1)
    with pytest.raises(ValueError, match="module '2': SGD does not hold the module's factors"):
        resize_lora(model, {"2": 2}, optimizer=optimizer)
    lbfgs = torch.optim.LBFGS(trainable(model))
    with pytest.raises(NotImplementedError, match="LBFGS keeps all parameters in one vector"):
        resize_lora(model, {"2": 2}, optimizer=lbfgs)
