"""Optimizers, gradients, scalers and schedulers after their parameters were resized."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorank.training import resize_lora
from tests.support import tiny_models
from tests.support.adapter_files import trained
from tests.support.lora_layers import factors, layers
from tests.support.optimizers import trainable
from tests.support.outputs import TOKENS
from tests.support.resizable_models import LLAMA, linear, step

OPTIMIZERS = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True, "foreach": False}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
]
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
MEANS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta"}


def basis(old: list[torch.Tensor], new: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return least-squares coefficients of values and of gradients, for A and for B, rank first."""
    T_a = torch.linalg.lstsq(old[0].T, new[0].T).solution.T
    T_b = torch.linalg.lstsq(old[1], new[1]).solution
    return [(T_a, T_b.T), (T_b.T, T_a)]


def extended(key: str, value: torch.Tensor, axis: int, options: dict[str, Any]) -> torch.Tensor:
    """Append two ranks: the mean for averages of squares, the initial value for Adagrad's sums, else zero."""
    new = torch.zeros_like(value.narrow(axis, 0, 2))
    if key in MEANS:
        new += value.mean(axis, keepdim=True)
    elif key == "sum":
        new += options["initial_accumulator_value"]
    return torch.cat([value, new], axis)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_optimizer_state_is_transformed_with_the_factors(kind: Any, options: dict[str, Any]) -> None:
    model = linear()
    optimizer = kind(trainable(model), lr=0.01, **options)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    grown, shrunk = factors(layers(model)["0"]), factors(layers(model)["2"])
    old = {p: (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in (*grown, *shrunk)}
    resize_lora(model, {"0": 6, "2": 2}, optimizer=optimizer)

    expected: dict[Any, dict[str, Any]] = {}
    for axis, p in enumerate(grown):
        expected[p] = {
            key: extended(key, value, axis, options) if getattr(value, "ndim", 0) else value
            for key, value in old[p][1].items()
        }
    maps = basis([old[p][0] for p in shrunk], [p.detach() for p in shrunk])
    for axis, (p, (of_values, of_gradients)) in enumerate(zip(shrunk, maps, strict=True)):
        expected[p] = {}
        for key, value in old[p][1].items():
            if not getattr(value, "ndim", 0):
                expected[p][key] = value
                continue
            T = of_gradients
            if key in SQUARES:
                T = T.square()
            elif key == "exp_inf":
                T = T.abs()
            elif key == "acc_delta":
                T = of_values.square()
            expected[p][key] = T @ value if axis == 0 else value @ T.T
    for p, state in expected.items():
        assert optimizer.state[p].keys() == state.keys()
        for key, value in state.items():
            if getattr(value, "ndim", 0):
                torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-8, atol=1e-12)
            else:
                assert optimizer.state[p][key] == value

    twin = copy.deepcopy(model)
    reference = kind(trainable(twin), lr=0.01, **options)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(twin, reference, seed)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def steps_of_new_ranks(model: Any, optimizer: Any, old: int, count: int) -> tuple[list[float], list[float]]:
    """Return root mean squares of the steps of B's new columns, and of its old ones."""
    found: tuple[list[float], list[float]] = ([], [])
    Bs = [factors(layer)[1] for layer in layers(model).values()]
    for seed in range(1000, 1000 + count):
        before = [b.detach().clone() for b in Bs]
        step(model, optimizer, seed)
        moves = [b.detach() - was for b, was in zip(Bs, before, strict=True)]
        for part, kept in zip(found, (slice(old, None), slice(old)), strict=True):
            part.append(float(torch.cat([move[:, kept].flatten() for move in moves]).square().mean().sqrt()))
    return found


@pytest.mark.parametrize(
    ("kind", "options", "rates"), [(torch.optim.AdamW, {}, 1.1), (torch.optim.RMSprop, {"alpha": 0.999}, 3)]
)
def test_new_ranks_take_steps_as_large_as_old_ones(kind: Any, options: dict[str, Any], rates: float) -> None:
    """Compare step sizes. Adam's step count continues, so its bias correction does not cover new ranks."""
    model = linear()
    optimizer = kind(trainable(model), lr=1e-3, **options)
    for seed in range(200):
        step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    reference = kind(trainable(twin), lr=1e-3, **options)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resize_lora(model, {"0": 6, "2": 6}, optimizer=optimizer)
    for layer in layers(model).values():
        for axis, p in enumerate(factors(layer)):
            means = optimizer.state[p]["exp_avg_sq" if "exp_avg_sq" in optimizer.state[p] else "square_avg"]
            assert means.narrow(axis, 4, 2).min() > 0
    new, old = steps_of_new_ranks(model, optimizer, 4, 50)
    _, alone = steps_of_new_ranks(twin, reference, 4, 50)
    assert 1e-5 < max(new) <= rates * 1e-3
    assert max(new) < 1.5 * max(old)
    # The new ranks affect the old ones only through the loss.
    assert old[0] == pytest.approx(alone[0], rel=1e-9)
    assert old == pytest.approx(alone, rel=0.5)


def test_restarted_ranks_of_a_shrunk_module_get_the_state_of_new_ranks() -> None:
    """Shrink a module with more ranks than inputs, whose surplus ranks have no directions to keep."""
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 7).double()), LoraConfig(r=6, target_modules=["0"])
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    for seed in range(3):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)).double()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    resize_lora(model, {"0": 4}, optimizer=optimizer)
    for axis, p in enumerate(factors(layers(model)["0"])):
        first, second = (optimizer.state[p][key].movedim(axis, 0) for key in ("exp_avg", "exp_avg_sq"))
        assert not first[2:].any()
        torch.testing.assert_close(second[2:], second[:2].mean(0).expand(2, -1))


def test_carried_gradients_equal_recomputed_gradients() -> None:
    """Without truncation error, a gradient carried over equals the gradient computed after shrinking."""
    model = linear()
    resize_lora(model, {"0": 6})
    x = torch.randn(6, 7).double()
    model(x).square().mean().backward()
    resize_lora(model, {"0": 4})
    carried = [p.grad.clone() for p in factors(layers(model)["0"])]
    model.zero_grad()
    model(x).square().mean().backward()
    for gradient, p in zip(carried, factors(layers(model)["0"]), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_works_after_a_resize_while_the_last_loss_is_alive(checkpointing: bool) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=LLAMA)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen: list[torch.Size] = []
    p = factors(layers(model)["model.layers.0.self_attn.q_proj"])[0]
    p.register_post_accumulate_grad_hook(lambda q: seen.append(q.shape))
    shapes = []
    kept = []
    for rank in (4, 7, 2, 2, 5):
        resize_lora(model, {"0.self_attn.q_proj": rank, "1.mlp.down_proj": 9 - rank})
        shapes.append((rank, 32))
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()  # gradients accumulate over all ranks
        kept.append(loss)
        assert all(q.grad.shape == q.shape for q in model.parameters() if q.requires_grad)
    assert seen == [torch.Size(shape) for shape in shapes]
    # The last pass against a model that never had another rank.
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradient_scaler_works_across_resizes() -> None:
    model = linear().float()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for seed in range(6):
        if seed in (2, 4):
            resize_lora(model, {"0": 9 - seed, "2": seed - 1}, optimizer=optimizer)
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8192.0
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}


def test_scheduler_clipping_and_wrapper_of_accelerate_work_across_resizes() -> None:
    model = linear()
    inner = torch.optim.AdamW(trainable(model), lr=0.01)
    accelerate.state.AcceleratorState._reset_state(
        reset_partial_state=True
    )  # A Trainer on a GPU leaves its state.
    optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(inner)
    assert optimizer is not inner
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    before = [p.detach().clone() for p in factors(layers(model)["2"])]
    for seed in range(4):
        if seed == 2:
            resize_lora(model, {"0": 2, "2": 5}, optimizer=optimizer)
        step(model, optimizer, seed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.01 / 16)
    for old, p in zip(before, factors(layers(model)["2"]), strict=True):
        assert inner.state[p]["exp_avg"].shape == p.shape
        assert not torch.equal(p.flatten()[: old.numel()], old.flatten())
    inner.load_state_dict(inner.state_dict())
