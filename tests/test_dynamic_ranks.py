"""Ranks move while a model trains: exact gradients as the oracle, Trainer, resumed and shared training."""

from __future__ import annotations

import copy
import csv
import functools
import gc
import itertools
import json
import math
import shutil
import socket
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard

import lorank
import tiny_models
from live_tensors import live_numbers, only_new_tensors
from lorank.training import DynamicRanks, GardCallback, gradient_scores, rank_budget, restore_ranks

# Between changes, gradients pass by that do not count: 1 and 2, 7 and 8, 13 and 14, ...
INTERVAL, WINDOW, STEPS = 6, 4, 18
TRAINED = STEPS + 1
"""Steps of Trainer, which changes nothing after its last."""
BUDGET = 5000
OPTIONS: dict[str, Any] = {
    "budget": BUDGET,
    "interval": INTERVAL,
    "window": WINDOW,
    "r_max": 12,
    "energy": 0.6,
    "sketch": 16,
    "smoothing": 0.2,
    "max_change": 2,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(r: int = 4, targets: Any = "all-linear", prepared: Any = lambda base: base, **settings: Any) -> Any:
    """Weights as large as trained ones: modules see gradients of different ranks."""
    base = tiny_models.llama()
    for parameter in base.parameters():
        if parameter.ndim == 2:
            parameter.data *= 10
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **settings)
    return get_peft_model(prepared(base), config).train()


def text(seed: int) -> torch.Tensor:
    """Every text counts on, from its own start with its own stride."""
    start = torch.randint(0, 64, (1,), generator=torch.Generator().manual_seed(seed))
    return (start + (seed % 5 + 1) * torch.arange(10)) % 64


def batch(step: int, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.stack([text(size * step + i) for i in range(size)])
    return {"input_ids": ids, "labels": ids}


class Texts(torch.utils.data.Dataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": text(index), "labels": text(index)}


def adamw(model: Any, lr: float = 0.01) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def layers(model: Any) -> dict[str, Any]:
    return {
        name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")
    }


def factors(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def ranks(model: Any) -> dict[str, int]:
    """As the factors are, whatever anybody says."""
    return {
        name: factors(layer)[0].shape[0] for name, layer in layers(model).items() if len(layer.lora_A) == 1
    }


def dense(model: Any) -> dict[str, Any]:
    """Every update in float64."""
    return {
        name: layer.scaling["default"] * (b.detach().double() @ a.detach().double()).numpy()
        for name, layer in layers(model).items()
        for a, b in [factors(layer)]
    }


def size_of(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def num_hooks(model: Any) -> int:
    return sum(len(layer.get_base_layer()._forward_hooks) for layer in layers(model).values())


def evaluated(model: Any) -> tuple[Any, float]:
    """Logits and loss of a text that training does not see."""
    model.eval()
    with torch.no_grad():
        result = model(**batch(1000, 4))
    model.train()
    return result.logits, float(result.loss)


def trained(
    model: Any,
    steps: int = STEPS,
    *,
    loss_of: Any = lambda model, step: model(**batch(step)).loss,
    between: Any = lambda _model, _step: None,
    **options: Any,
) -> list[Any]:
    """A loop of one's own; the updates that it saw."""
    optimizer = adamw(model)
    updates = []
    with DynamicRanks(model, optimizer, **OPTIONS | options) as dynamic:
        for step in range(steps):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            updates.append(dynamic.step())
            between(model, step + 1)
    return [update for update in updates if update is not None]


def spectra(update: Any) -> Any:
    return np.array([row.eigenvalues for row in update.report])


def moved(updates: list[Any]) -> bool:
    """Whether some grew and some shrank, after the budget was first used up."""
    changes = [change for update in updates[1:] for change in update.changes.values()]
    return any(c.new_rank > c.old_rank for c in changes) and any(c.new_rank < c.old_rank for c in changes)


def assert_same_updates(left: list[Any], right: list[Any]) -> None:
    assert [u.step for u in left] == [u.step for u in right]
    for one, other in zip(left, right, strict=True):
        assert one.ranks == other.ranks
        np.testing.assert_array_equal(spectra(one), spectra(other))


def assert_same_weights(left: Any, right: Any) -> None:
    for (name, one), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other), name


# What is computed.


def exact_gradients(model: Any, step: int) -> dict[str, Any]:
    """Of the base model's weights, by autograd, in a copy where they are trained."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
    weights = {name: layer.get_base_layer().weight for name, layer in layers(twin).items()}
    for weight in weights.values():
        weight.requires_grad_()
    twin(**batch(step)).loss.backward()
    return {name: weight.grad.double().flatten().numpy() for name, weight in weights.items()}


def test_ranks_are_those_of_exact_gradients() -> None:
    model = llama()
    seen: list[dict[str, Any]] = []
    before: dict[int, dict[str, int]] = {}

    def loss_of(model: Any, step: int) -> Any:
        if step % INTERVAL >= INTERVAL - WINDOW:
            seen.append(exact_gradients(model, step))
        before[step + 1] = ranks(model)
        return model(**batch(step)).loss

    updates = trained(model, loss_of=loss_of, sketch=None)
    assert moved(updates)
    assert [update.step for update in updates] == [6, 12, 18]
    smoothed: dict[str, float] = {}
    costs = [sum(layer.get_base_layer().weight.shape) for layer in layers(model).values()]
    for index, update in enumerate(updates):
        window = seen[WINDOW * index : WINDOW * (index + 1)]
        assert update.report.num_batches == WINDOW
        assert [row.module for row in update.report] == list(window[0])
        for row in update.report:
            stacked = np.stack([gradients[row.module] for gradients in window])
            expected = np.linalg.eigvalsh(stacked @ stacked.T / WINDOW)[::-1]
            np.testing.assert_allclose(row.eigenvalues, expected, rtol=1e-4, atol=1e-5 * expected[0])
            shares = np.cumsum(expected) / expected.sum()
            new = int(np.argmax(shares >= OPTIONS["energy"])) + 1
            beta = OPTIONS["smoothing"]
            old = smoothed.get(row.module, new)
            smoothed[row.module] = beta * old + (1 - beta) * new
            assert row.effective_rank == pytest.approx(smoothed[row.module], rel=1e-12)
        now = np.array(list(before[update.step].values()))
        expected_ranks = lorank.fit_ranks(
            list(smoothed.values()),
            costs,
            1,
            12,
            min(BUDGET, int((now + 2) @ costs)),
            at_least=(now - 2).clip(1),
            at_most=(now + 2).clip(max=12),
        )
        assert list(update.ranks.values()) == expected_ranks.tolist()
    assert ranks(model) == updates[-1].ranks


@pytest.mark.parametrize(("max_change", "r_min"), [(1, 1), (3, 3), (None, 1)])
def test_budget_bounds_and_largest_change_hold_at_every_step(max_change: int | None, r_min: int) -> None:
    model = llama(targets=["q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens"])
    # An embedding has no gradient from inputs and outputs: it keeps its rank, and its share of the budget.
    embedding = model.get_base_model().model.embed_tokens
    history = [ranks(model)]

    def between(model: Any, step: int) -> None:
        del step
        assert size_of(model) <= 2800
        assert embedding.r["default"] == embedding.lora_embedding_A["default"].shape[0] == 4
        history.append(ranks(model))
        assert all(r_min <= rank <= 7 for rank in history[-1].values())

    updates = trained(
        model, budget=2800, r_min=r_min, r_max=7, max_change=max_change, between=between, smoothing=0.0
    )
    assert moved(updates)
    assert [update.num_parameters for update in updates][-1] == size_of(model)
    assert "model.embed_tokens" not in updates[0].ranks
    steps = [
        abs(after[name] - before[name]) for before, after in itertools.pairwise(history) for name in after
    ]
    assert 1 <= max(steps) <= (max_change or 6)
    # The budget is used up: no module below its bounds could take one more rank.
    for update in updates:
        before = history[update.step - 1]
        for name, rank in update.ranks.items():
            free = rank < min(7, before[name] + (max_change or 7))
            cost = sum(layers(model)[name].get_base_layer().weight.shape)
            assert not free or update.num_parameters + cost > 2800


def test_a_share_of_the_base_model_as_budget_and_what_the_adapter_has_as_default() -> None:
    base = sum(p.numel() for p in tiny_models.llama().parameters())
    model = llama()
    updates = trained(model, 6, budget="20%")
    assert size_of(model) == updates[-1].num_parameters <= 0.2 * base < size_of(model) + 112
    model = llama()
    size = size_of(model)
    updates = trained(model, budget=None)
    assert any(update.changes for update in updates)
    assert all(update.num_parameters <= size for update in updates)


def test_nothing_changes_in_the_warmup_nor_after_the_freeze() -> None:
    hooks: dict[int, int] = {}
    model = llama()
    updates = trained(
        model,
        30,
        energy=0.4,
        warmup=12,
        freeze_after=24,
        between=lambda model, step: hooks.update({step: num_hooks(model)}),
    )
    assert [update.step for update in updates] == [18, 24]
    assert moved(updates)
    # The model is watched in windows that end in a change, and at no other time.
    watched = [step + 1 for step, count in hooks.items() if count]
    assert watched == [15, 16, 17, 18, 21, 22, 23, 24]
    assert {count for count in hooks.values() if count} == {14}
    assert not trained(llama(), 12, warmup=12)
    assert not trained(llama(), 12, freeze_after=5)
    assert [update.step for update in trained(llama(), 12, warmup=11)] == [12]


def truncated(update: Any, rank: int) -> Any:
    U, s, Vt = np.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


def dense_loss(model: Any, updates: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The loss with given updates in place of the adapter, and the norms of its gradients by module."""
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
    weights = {}
    for name, layer in layers(twin).items():
        weights[name] = layer.get_base_layer().weight
        weights[name].data += torch.from_numpy(updates[name]).float()
        weights[name].requires_grad_()
    with twin.disable_adapter():
        loss = twin(**batch(1000, 4)).loss
    loss.backward()
    return float(loss), {name: float(weight.grad.norm()) for name, weight in weights.items()}


def test_growing_changes_nothing_and_shrinking_what_the_certificate_says() -> None:
    """The loss on a fixed batch, right before and right after every change."""
    model = llama()
    optimizer = adamw(model)
    kinds = set()
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        for step in range(36):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            old, (logits, loss) = dense(model), evaluated(model)
            state = torch.get_rng_state()
            update = dynamic.step()
            assert torch.equal(torch.get_rng_state(), state)  # Dropout goes on as it would have.
            new, (new_logits, new_loss) = dense(model), evaluated(model)
            if update is None or not any(change.error for change in update.changes.values()):
                torch.testing.assert_close(new_logits, logits, rtol=0, atol=1e-6)
                assert new_loss == pytest.approx(loss, abs=1e-6)
                for name in old:
                    np.testing.assert_array_equal(new[name], old[name])
                kinds.add("grown" if update is not None and update.changes else "as it was")
                continue
            kinds.add("shrunk")
            for name in old:
                change = update.changes.get(name)
                error = float(np.linalg.norm(new[name] - old[name]))
                scale = float(np.linalg.norm(old[name]))
                if change is None or change.new_rank >= change.old_rank:
                    assert error == 0
                    continue
                assert error == pytest.approx(change.error, rel=1e-4, abs=1e-7 * scale)
                np.testing.assert_allclose(
                    new[name], truncated(old[name], change.new_rank), atol=1e-6 * scale
                )
            errors = {name: change.error for name, change in update.changes.items()}
            assert new_loss == pytest.approx(dense_loss(model, new)[0], abs=1e-5)
            # By the mean value theorem and Cauchy and Schwarz, the loss moves by no more than this.
            path = np.linspace(0, 1, 5)
            between = [{name: old[name] + t * (new[name] - old[name]) for name in old} for t in path]
            norms = [dense_loss(model, updates)[1] for updates in between]
            allowed = sum(error * max(norm[name] for norm in norms) for name, error in errors.items())
            assert abs(new_loss - loss) <= 1.05 * allowed + 1e-6
    assert kinds == {"as it was", "grown", "shrunk"}


def test_passes_between_steps_leave_no_trace() -> None:
    def between(model: Any, step: int) -> None:
        evaluated(model)
        model.eval()
        prompt = {"input_ids": text(step)[None, :4], "attention_mask": torch.ones(1, 4)}
        model.generate(**prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.train()
        model(**batch(step + 7))  # No backward pass follows.

    quiet, disturbed = llama(), llama()
    expected, updates = trained(quiet), trained(disturbed, between=between)
    assert_same_updates(updates, expected)
    assert_same_weights(quiet, disturbed)


def test_hooks_are_gone_after_the_block_and_after_an_error_in_it() -> None:
    model = llama()
    optimizer = adamw(model)
    options = OPTIONS | {"interval": 4}
    counts = []

    def failing() -> None:
        with DynamicRanks(model, optimizer, **options):
            model(**batch(0))
            counts.append(num_hooks(model))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        failing()
    assert counts == [14]
    assert num_hooks(model) == 0
    dynamic = DynamicRanks(model, optimizer, **options)
    assert num_hooks(model) == 0
    with dynamic:
        model(**batch(0)).loss.backward()
        assert num_hooks(model) == 14
    assert num_hooks(model) == 0
    dynamic.close()


class Pictures(torch.nn.Module):  # type: ignore[misc]
    """A convolution, a layer that no gradient reaches, and weights in four bits if they are wanted."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = torch.nn.Conv2d(2, 8, 3, padding=1)
        self.first, self.aside, self.last = linear(128, 64), linear(64, 64), linear(64, 64)

    def forward(self, x: Any) -> Any:
        hidden = torch.tanh(self.first(torch.tanh(self.kernel(x)).flatten(1)))
        return self.last(hidden) + 0 * self.aside(hidden).detach()


@pytest.mark.parametrize("bits", [32, 4])
def test_other_kinds_of_layers(bits: int) -> None:
    linear: Any = torch.nn.Linear
    if bits == 4:
        linear = pytest.importorskip("bitsandbytes").nn.Linear4bit
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["kernel", "first", "aside", "last"])
    model = get_peft_model(Pictures(linear).to("cpu"), config).train()
    size = size_of(model)

    def loss_of(model: Any, step: int) -> Any:
        x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.flatten(1)[:, :1]).square().mean()

    updates = trained(
        model, loss_of=loss_of, budget=size, between=lambda model, _: check_size(model, size), max_change=1
    )
    assert [update.step for update in updates] == [6, 12, 18]
    assert updates[-1].ranks == ranks(model)
    # What no gradient reaches gives its ranks to the others.
    rows = {row.module: row for row in updates[-1].report}
    assert rows["aside"].flags == ("no gradient reached it",)
    assert ranks(model)["aside"] <= 2
    assert max(ranks(model).values()) > 4


def test_windows_without_any_gradient_change_nothing() -> None:
    """As where compiled code passes the hooks by: ranks would become uniform."""
    silent = 2 * INTERVAL

    def loss_of(model: Any, step: int) -> Any:
        if step < silent:
            return sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return model(**batch(step)).loss

    model, seen = llama(r=2), []
    pattern = "step 6: no gradient reached any adapted module in the last 4 steps, so ranks stay as they are"
    with pytest.warns(UserWarning, match=pattern) as told:
        updates = trained(model, loss_of=loss_of, between=lambda model, _: seen.append(ranks(model)))
    assert sum("no gradient" in str(warning.message) for warning in told) == 1
    assert {rank for found in seen[:silent] for rank in found.values()} == {2}
    assert [update.step for update in updates] == [18]
    # What was not seen is not smoothed with what is.
    assert all(row.effective_rank.is_integer() and row.effective_rank > 0 for row in updates[0].report)


def check_size(model: Any, limit: int) -> None:
    assert size_of(model) <= limit


# Loops of one's own: accumulation, scaled gradients, state.


def test_micro_batches_count_as_one_batch() -> None:
    runs: list[list[Any]] = []
    for pieces in (1, 2):
        model = llama()
        optimizer = adamw(model)
        updates = []
        with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
            for step in range(STEPS):
                for piece in torch.chunk(batch(step)["input_ids"], pieces):
                    (model(input_ids=piece, labels=piece).loss / pieces).backward()
                optimizer.step()
                optimizer.zero_grad()
                updates.append(dynamic.step())
        runs.append([u for u in updates if u is not None])
    whole, pieced = runs
    assert moved(whole)
    for one, other in zip(whole, pieced, strict=True):
        assert one.report.num_batches == other.report.num_batches == WINDOW
        assert one.ranks == other.ranks
        np.testing.assert_allclose(spectra(one), spectra(other), rtol=1e-2, atol=1e-4 * spectra(one).max())


def scaled(scaler: Any, overflows: tuple[int, ...] = ()) -> tuple[Any, list[Any], list[float]]:
    """Training with float16 and a gradient scaler; in some steps the loss overflows."""
    model = llama()
    optimizer = adamw(model)
    updates, scales = [], []
    with DynamicRanks(model, optimizer, scaler=scaler, **OPTIONS) as dynamic:
        for step in range(STEPS):
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch(step)).loss * (1e30 if step in overflows else 1)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scales.append(scaler.get_scale())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            updates.append(dynamic.step())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return model, [u for u in updates if u is not None], scales


def test_gradients_are_divided_by_the_scale() -> None:
    _, expected, _ = scaled(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    _, updates, scales = scaled(scaler)
    assert len(set(scales[2:6])) > 1  # The scale moves within a window.
    assert moved(updates)
    for one, other in zip(expected, updates, strict=True):
        assert one.ranks == other.ranks
        np.testing.assert_allclose(spectra(other), spectra(one), rtol=0.1, atol=0.02 * spectra(one).max())
    np.testing.assert_allclose(spectra(updates[0]), spectra(expected[0]), rtol=0.02, atol=1e-4)


def test_steps_that_overflow_are_left_out() -> None:
    model, updates, scales = scaled(torch.amp.GradScaler("cpu", init_scale=8.0), (3, 8, 9, 10, 11))
    assert min(scales) < 8
    # Of the second window nothing is left: there is nothing to go by.
    assert [(update.step, update.report.num_batches) for update in updates] == [(6, 3), (18, 4)]
    assert np.isfinite([spectra(update).max() for update in updates]).all()
    assert ranks(model) == updates[-1].ranks


def test_a_loop_goes_on_from_its_state(tmp_path: Path) -> None:
    """Inside a window, at a change, and between windows."""

    def loop(model: Any, optimizer: Any, dynamic: Any, start: int, stop: int) -> list[Any]:
        updates = []
        with dynamic:
            for step in range(start, stop):
                model(**batch(step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                updates.append(dynamic.step())
        return [u for u in updates if u is not None]

    whole = llama()
    optimizer = adamw(whole)
    expected = loop(whole, optimizer, DynamicRanks(whole, optimizer, **OPTIONS), 0, STEPS)
    assert moved(expected)
    for stop in (4, 6, 8, 11):
        model = llama()
        optimizer = adamw(model)
        dynamic = DynamicRanks(model, optimizer, **OPTIONS)
        updates = loop(model, optimizer, dynamic, 0, stop)
        model.save_pretrained(tmp_path)
        torch.save([model.state_dict(), optimizer.state_dict(), dynamic.state_dict()], tmp_path / "state")
        weights, moments, state = torch.load(tmp_path / "state")
        assert state["step"] == stop == dynamic.steps
        again = llama()
        restore_ranks(again, tmp_path)
        again.load_state_dict(weights)
        optimizer = adamw(again)
        optimizer.load_state_dict(moments)
        dynamic = DynamicRanks(again, optimizer, **OPTIONS)
        dynamic.load_state_dict(state)
        updates += loop(again, optimizer, dynamic, stop, STEPS)
        assert_same_updates(updates, expected)
        assert_same_weights(again, whole)


def test_an_open_window_goes_on_where_its_modules_are() -> None:
    """Models can lie on several devices; here one of them is without values."""
    model = llama()
    optimizer = adamw(model)
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        for step in range(4):
            model(**batch(step)).loss.backward()
            optimizer.step()
            dynamic.step()
        state = dynamic.state_dict()
    again = DynamicRanks(model, optimizer, **OPTIONS)
    weights = [target.module for target in again._window._targets]
    weights[3].to("meta")
    again.load_state_dict(state)
    found = [[sketch.device for sketch in sketches] for sketches in again._window._steps]
    assert found == [[module.weight.device for module in weights]] * 2
    assert found[0][3].type == "meta"
    assert found[0][2].type == "cpu"
    again.close()


# Memory.


def expected_numbers(model: Any, sketch: int) -> tuple[int, int]:
    """Of one step's sketches, and of the projections: sides up to the sketch's size need none."""
    shapes = [layer.get_base_layer().weight.shape for layer in layers(model).values()]
    sketches = sum(math.prod(min(side, sketch) for side in shape) for shape in shapes)
    return sketches, sum(sketch * side for shape in shapes for side in shape if side > sketch)


class Loop:
    """A training that counts the numbers alive within and after its steps."""

    def __init__(self) -> None:
        self.model = llama()
        self.optimizer = adamw(self.model)

    def step(self, dynamic: Any = None) -> tuple[int, int]:
        """The numbers alive between forward and backward pass, and after the step."""
        loss = self.model(**batch(0)).loss
        within = live_numbers()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if dynamic is not None:
            dynamic.step()
        del loss
        return within, live_numbers()

    @property
    def state(self) -> int:
        """Of the factors and their two moments."""
        return 3 * size_of(self.model)


@only_new_tensors()
def test_memory_of_open_and_closed_windows() -> None:
    loop = Loop()
    sketches, projections = expected_numbers(loop.model, 16)
    # What one batch adds to a plain pass: the inputs of all modules, projected, and the outputs of the first
    # ones (queries, keys, values), before which nothing asks for a gradient.
    one_batch = 20 * (14 * 16 + 32 + 16 + 16)
    dynamic = DynamicRanks(loop.model, loop.optimizer, **OPTIONS | {"freeze_after": 2 * INTERVAL})
    loop.step()
    within, after = loop.step()
    plain = after - loop.state
    with dynamic:
        for step in range(1, 3 * INTERVAL):
            in_pass, after = loop.step(dynamic)
            kept = max(step % INTERVAL - (INTERVAL - WINDOW), 0) if step < 2 * INTERVAL else 0
            drawn = projections if INTERVAL - WINDOW < step < 2 * INTERVAL else 0
            assert after - loop.state - plain == kept * sketches + drawn, step
            if step < INTERVAL:
                assert in_pass - within <= max(kept - 1, 0) * sketches + drawn + one_batch + 100, step


@only_new_tensors()
def test_memory_of_an_interrupted_training() -> None:
    loop = Loop()
    sketches, _ = expected_numbers(loop.model, 16)
    loop.step()
    _, plain = loop.step()
    with DynamicRanks(loop.model, loop.optimizer, **OPTIONS) as dynamic:
        for _ in range(INTERVAL - 1):
            loop.step(dynamic)
        loop.model(**batch(0)).loss.backward()
        loop.optimizer.zero_grad()
    # What an open window has seen is part of the state; projections are drawn again.
    assert live_numbers() - plain == (WINDOW - 1) * sketches


# With Trainer.


def trainer(model: Any, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": TRAINED,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "seed": 0,
        }
        | settings,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=list(callbacks)
    )


class Run:
    """A training that is over."""

    def __init__(self, folder: Path, *callbacks: Any, options: Any = None, **settings: Any) -> None:
        self.model, self.gard = llama(), GardCallback(**OPTIONS | (options or {}))
        self.trainer = trainer(self.model, folder, *callbacks, self.gard, **settings)
        self.trainer.train()
        assert num_hooks(self.model) == 0

    @property
    def updates(self) -> list[Any]:
        return self.gard.history

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, _one_thread: Any) -> tuple[Run, Path]:
    """A run that never stopped, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    return Run(folder, save_strategy="steps", save_steps=1), folder


def test_ranks_move_and_training_goes_on(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = whole
    assert [update.step for update in run.updates] == [6, 12, 18]
    assert moved(run.updates)
    assert run.updates[-1].ranks == ranks(run.model)
    before, after = (trainer(model, tmp_path).evaluate() for model in (llama(), run.model))
    assert after["eval_loss"] < before["eval_loss"] - 0.1


def test_two_runs_with_one_seed_are_identical(whole: tuple[Run, Path], tmp_path: Path) -> None:
    again = Run(tmp_path)
    assert_same_updates(again.updates, whole[0].updates)
    assert_same_weights(again.model, whole[0].model)
    assert again.losses == whole[0].losses
    other = Run(tmp_path, options={"seed": 1})
    with pytest.raises(AssertionError):
        assert_same_updates(other.updates, whole[0].updates)


# Within the first window, right at a change, between windows, within a later one, right at the next.
@pytest.mark.parametrize("step", [4, 6, 7, 11, 12])
def test_a_resumed_run_equals_one_that_never_stopped(
    whole: tuple[Run, Path], tmp_path: Path, step: int
) -> None:
    run, folder = whole
    checkpoint = tmp_path / f"checkpoint-{step}"
    shutil.copytree(folder / checkpoint.name, checkpoint)
    # The run went on after its last checkpoint, and was cut off then.
    shutil.copy(folder / "lora_ranks.csv", tmp_path)
    model, gard = llama(), GardCallback(**OPTIONS)
    restore_ranks(model, checkpoint)
    resumed = trainer(model, tmp_path, gard)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_updates(gard.history, [update for update in run.updates if update.step > step])
    assert_same_weights(model, run.model)
    assert num_hooks(model) == 0
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    logs = [
        [{k: v for k, v in entry.items() if k not in timed} for entry in t.state.log_history]
        for t in (resumed, run.trainer)
    ]
    assert logs[0] == logs[1]
    assert (tmp_path / "lora_ranks.csv").read_bytes() == (folder / "lora_ranks.csv").read_bytes()


def test_a_run_resumes_from_a_checkpoint_elsewhere(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = whole
    checkpoint = folder / "checkpoint-10"
    model, gard = llama(), GardCallback(**OPTIONS, checkpoint=checkpoint)
    restore_ranks(model, checkpoint)
    trainer(model, tmp_path, gard).train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(model, run.model)
    model = llama()
    restore_ranks(model, checkpoint)
    lost = trainer(model, tmp_path, GardCallback(**OPTIONS))
    with pytest.raises(
        ValueError, match=r"resumes at step 10, but .* holds no lorank_gard\.safetensors: pass"
    ):
        lost.train(resume_from_checkpoint=str(checkpoint))
    assert num_hooks(model) == 0


def test_a_run_that_is_resumed_with_other_ranks_is_refused(whole: tuple[Run, Path], tmp_path: Path) -> None:
    checkpoint = whole[1] / "checkpoint-7"
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(llama(), tmp_path, GardCallback(**OPTIONS)).train(resume_from_checkpoint=str(checkpoint))
    model = llama()
    restore_ranks(model, checkpoint)
    state = DynamicRanks(model, adamw(model), **OPTIONS).state_dict()
    other = DynamicRanks(llama(), adamw(model), **OPTIONS)
    with pytest.raises(ValueError, match=r"call restore_ranks\(model, checkpoint\)"):
        other.load_state_dict(state)


def rewritten(path: Path, change: Any) -> None:
    """Change the header and the tensors of a state file."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lorank.gard"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    change(header, tensors)
    save_file(tensors, path, {"lorank.gard": json.dumps(header)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"garbage" * 9),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: save_file({"none": torch.zeros(1)}, path),
        lambda path: save_file({"none": torch.zeros(1)}, path, {"lorank.gard": "[]"}),
        lambda path: rewritten(path, lambda _, tensors: tensors.pop("0.3")),
        lambda path: rewritten(path, lambda header, _: header.pop("step")),
        lambda path: rewritten(path, lambda header, _: header.pop("ranks")),
        lambda path: rewritten(path, lambda header, _: header.update(step="ten")),
        lambda path: rewritten(path, lambda header, _: header.update(sketches=[3, 3])),
        lambda path: rewritten(path, lambda _, tensors: tensors.update({"0.3": torch.zeros(3, 3)})),
    ],
    ids=[
        "garbage",
        "cut off",
        "no header",
        "another header",
        "a tensor less",
        "no step",
        "no ranks",
        "a step that is no number",
        "fewer modules",
        "another shape",
    ],
)
def test_a_damaged_state_is_refused(whole: tuple[Run, Path], tmp_path: Path, damage: Any) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(whole[1] / "checkpoint-10", checkpoint)
    damage(checkpoint / "lorank_gard.safetensors")
    model = llama()
    restore_ranks(model, checkpoint)
    run = trainer(model, tmp_path, GardCallback(**OPTIONS))
    with pytest.raises(
        lorank.FormatError, match=r"lorank_gard.safetensors: not a saved state of GardCallback"
    ):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert num_hooks(model) == 0


def test_an_open_window_does_not_go_on_with_sketches_of_another_size(
    whole: tuple[Run, Path], tmp_path: Path
) -> None:
    checkpoint = whole[1] / "checkpoint-10"
    model = llama()
    restore_ranks(model, checkpoint)
    run = trainer(model, tmp_path, GardCallback(**OPTIONS | {"sketch": 8, "checkpoint": checkpoint}))
    with pytest.raises(ValueError, match="sketch"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 10  # Before any further step.


def test_a_resumed_run_keeps_the_budget_that_it_began_with(tmp_path: Path) -> None:
    """Which by default is what the adapter had then, not what it has now."""
    options = OPTIONS | {"budget": None}
    run = Run(tmp_path, options=options, save_strategy="steps", save_steps=12)
    assert run.updates[1].num_parameters < 3712
    checkpoint = tmp_path / "checkpoint-12"
    model, gard = llama(), GardCallback(**options)
    restore_ranks(model, checkpoint)
    trainer(model, tmp_path, gard).train(resume_from_checkpoint=str(checkpoint))
    assert_same_updates(gard.history, run.updates[2:])
    assert_same_weights(model, run.model)


def test_the_best_checkpoint_cannot_be_loaded_at_the_end(tmp_path: Path) -> None:
    """Its ranks are others than the last: said before training, not after it."""
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    run = trainer(llama(), tmp_path, GardCallback(**OPTIONS), load_best_model_at_end=True, **settings)
    with pytest.raises(NotImplementedError, match="load_best_model_at_end"):
        run.train()
    assert run.state.global_step == 0


def test_accumulated_batches_see_what_one_large_batch_sees(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run = Run(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert run.updates[0].report.num_batches == WINDOW
    assert run.updates[0].ranks == whole[0].updates[0].ranks
    for one, other in zip(spectra(run.updates[0]), spectra(whole[0].updates[0]), strict=True):
        np.testing.assert_allclose(one / one.sum(), other / other.sum(), atol=2e-3)
    assert moved(run.updates)


def fp16(folder: Path, scaler: Any) -> tuple[list[Any], list[float]]:
    """What Trainer does under fp16, which it refuses on a CPU: Accelerate's optimizer has the scaler."""
    model, gard = llama(), GardCallback(**OPTIONS)
    arguments = trainer(model, folder).args  # Accelerate has a state from then on.
    optimizer = AcceleratedOptimizer(adamw(model), scaler=scaler)
    state = transformers.TrainerState(max_steps=TRAINED)
    gard.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
    scales = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch(step)).loss
        scales.append(1.0 if scaler is None else scaler.get_scale())
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        gard.on_step_end(arguments, state, None)
    gard.on_train_end(arguments, state, None)
    return gard.history, scales


def test_fp16_gradients_are_divided_by_the_scale_of_trainers_optimizer(tmp_path: Path) -> None:
    expected, _ = fp16(tmp_path / "plain", None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    updates, scales = fp16(tmp_path / "scaled", scaler)
    assert len(set(scales[INTERVAL - WINDOW : INTERVAL])) > 1
    assert moved(updates)
    for one, other in zip(expected, updates, strict=True):
        np.testing.assert_allclose(spectra(other), spectra(one), rtol=0.1, atol=0.02 * spectra(one).max())
    np.testing.assert_allclose(spectra(updates[0]), spectra(expected[0]), rtol=0.02, atol=1e-4)


def test_trainer_hands_over_accelerates_optimizer(tmp_path: Path) -> None:
    """The one that has the scaler."""
    seen = []

    class Seen(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            seen.append(kwargs["optimizer"])

    trainer(llama(), tmp_path, Seen(), max_steps=1).train()
    assert isinstance(seen[0], AcceleratedOptimizer)
    assert hasattr(seen[0], "scaler")


class Norms(transformers.TrainerCallback):  # type: ignore[misc]
    """What the optimizer gets: the norm of all gradients, and of those of new ranks."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.count: list[int] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.requires_grad]
        self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        self.count.append(sum(g.numel() for g in gradients))


def test_gradients_of_all_ranks_are_clipped(tmp_path: Path) -> None:
    norms = Norms()
    run = Run(tmp_path, norms, max_grad_norm=0.05)
    assert moved(run.updates)
    assert norms.norms == pytest.approx([0.05] * TRAINED, rel=1e-3)
    assert norms.count[6] == run.updates[0].num_parameters > norms.count[5]
    logged = [entry["grad_norm"] for entry in run.trainer.state.log_history if "grad_norm" in entry]
    assert min(logged) > 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_count_once(whole: tuple[Run, Path], tmp_path: Path, reentrant: bool) -> None:
    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    run = Run(tmp_path, **settings)
    for one, other in zip(run.updates, whole[0].updates, strict=True):
        assert one.ranks == other.ranks
        np.testing.assert_allclose(spectra(one), spectra(other), rtol=1e-3, atol=1e-5 * spectra(one).max())
    assert run.losses == pytest.approx(whole[0].losses, rel=1e-4)


def test_bfloat16(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run = Run(tmp_path, bf16=True)
    assert moved(run.updates)
    one, other = spectra(run.updates[0]), spectra(whole[0].updates[0])
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one.sum(1), other.sum(1), rtol=0.1)
    assert run.losses == pytest.approx(whole[0].losses, rel=0.1)


def test_a_schedule_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, lr_scheduler_type="cosine", warmup_steps=3)
    assert moved(run.updates)
    rates = [entry["learning_rate"] for entry in run.trainer.state.log_history if "learning_rate" in entry]
    # What is logged at a step is the rate of that step.
    expected = [
        step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / (TRAINED - 3))) / 2
        for step in range(TRAINED)
    ]
    assert rates == pytest.approx([0.01 * rate for rate in expected], abs=1e-9)


def test_the_trained_adapter_is_saved_and_loaded(whole: tuple[Run, Path], tmp_path: Path) -> None:
    model = whole[0].model
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().unload(), tmp_path)
    assert ranks(again) == ranks(model)
    assert len(set(ranks(again).values())) > 1
    torch.testing.assert_close(evaluated(again)[0], evaluated(model)[0], rtol=0, atol=1e-6)
    assert lorank.LoraAdapter.load(tmp_path).ranks == ranks(model)
    # So are the checkpoints of the run, each with the ranks of its step.
    adapter = lorank.LoraAdapter.load(whole[1] / "checkpoint-7")
    assert adapter.ranks == whole[0].updates[0].ranks


def test_evaluations_leave_no_trace(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run = Run(tmp_path, eval_strategy="steps", eval_steps=1)
    assert sum("eval_loss" in entry for entry in run.trainer.state.log_history) == TRAINED
    assert_same_updates(run.updates, whole[0].updates)
    assert_same_weights(run.model, whole[0].model)


class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
    """Comes before all other callbacks, as those of TensorBoard and its like do."""

    seen: list[tuple[int, dict[str, Any]]]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        type(self).seen = []

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_ranks_are_logged_where_trainer_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda _: [Reporter])
    sizes: dict[int, dict[str, float]] = {}

    class Counter(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            found = ranks(kwargs["model"]).values()
            sizes[state.global_step] = {
                "lora_rank_mean": sum(found) / len(found),
                "lora_rank_min": min(found),
                "lora_rank_max": max(found),
                "lora_parameters": size_of(kwargs["model"]),
            }
            by_module = {f"lora_rank/{name}": rank for name, rank in ranks(kwargs["model"]).items()}
            sizes[state.global_step] |= by_module

    model, gard = llama(), GardCallback(**OPTIONS)
    settings = {"eval_strategy": "steps", "eval_steps": 9, "disable_tqdm": disable_tqdm}
    run = trainer(model, tmp_path, gard, Counter(), **settings)
    names = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert names.index("Reporter") < names.index("GardCallback")
    run.train()
    assert len(Reporter.seen) == TRAINED + 3 + 1  # Steps, evaluations (of the last, too), and the summary.
    assert len({size["lora_parameters"] for size in sizes.values()}) > 1
    for step, logs in Reporter.seen:
        assert {key: logs[key] for key in sizes[step]} == sizes[step]
    assert len(run.state.log_history) == len(Reporter.seen)
    for (step, logs), entry in zip(Reporter.seen, run.state.log_history, strict=True):
        line = {key: value for key, value in logs.items() if not key.startswith("lora_rank/")}
        assert len(line) == len(logs) - 14
        assert entry == line | {"step": step}
    printed = "".join(capsys.readouterr())
    assert printed.count("lora_rank_mean") == len(Reporter.seen)
    assert "lora_rank/" not in printed
    # All callbacks are still there, each once.
    run.train()
    found = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert sorted(found) == sorted([*names, "ReadableConsole"])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "lora_ranks.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_every_change_and_nothing_of_an_earlier_run(
    whole: tuple[Run, Path], tmp_path: Path
) -> None:
    run, folder = whole
    expected = [
        {
            "step": str(update.step),
            "module": row.name,
            "rank": str(update.ranks[row.module]),
            "effective_rank": str(row.effective_rank),
            "error": str(update.changes[row.module].error if row.module in update.changes else 0.0),
        }
        for update in run.updates
        for row in update.report
    ]
    assert len(expected) == 3 * 14
    assert table(folder) == expected
    # The same folder, shorter, then longer.
    shutil.copy(folder / "lora_ranks.csv", tmp_path)
    Run(tmp_path, max_steps=7)
    assert table(tmp_path) == expected[:14]
    Run(tmp_path, max_steps=4)
    assert table(tmp_path) == []
    Run(tmp_path, max_steps=13)
    assert {row["step"] for row in table(tmp_path)} == {"6", "12"}


class Failing(transformers.TrainerCallback):  # type: ignore[misc]
    """Fails once, while the model is watched."""

    failed = False

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 4 and not self.failed:
            self.failed = True
            raise RuntimeError("out of luck")


def test_a_training_after_one_that_failed_leaves_no_hooks(tmp_path: Path) -> None:
    model, gard = llama(), GardCallback(**OPTIONS)
    run = trainer(model, tmp_path, gard, Failing())
    with pytest.raises(RuntimeError, match="out of luck"):
        run.train()
    run.train()
    assert num_hooks(model) == 0
    assert [update.step for update in gard.history] == [6, 12, 18]


# Several processes.


def train_together(process: int, folder: str, port: int) -> None:
    """One of two processes, by hand and with Trainer."""
    torch.set_num_threads(1)
    # Some versions of Trainer resume on "cpu:0", of which torch does not know that it is the CPU.
    torch.serialization.register_package(
        0, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("RANK", process),
            ("LOCAL_RANK", process),
            ("WORLD_SIZE", 2),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
            ("OMP_NUM_THREADS", 1),  # Accelerate would take all cores for each.
        ):
            patch.setenv(name, str(value))
        model, gard = llama(), GardCallback(**OPTIONS)
        run = trainer(
            model,
            Path(folder) / "trainer",
            gard,
            per_device_train_batch_size=1,
            ddp_backend="gloo",
            save_strategy="steps",
            save_steps=10,
        )
        run.train()
        result: dict[str, Any] = {"trainer": (model.state_dict(), gard.history)}
        checkpoint = Path(folder) / "trainer" / "checkpoint-10"
        model, gard = llama(), GardCallback(**OPTIONS)
        restore_ranks(model, checkpoint)
        again = trainer(
            model, Path(folder) / "trainer", gard, per_device_train_batch_size=1, ddp_backend="gloo"
        )
        again.train(resume_from_checkpoint=str(checkpoint))
        result["resumed"] = (model.state_dict(), gard.history)
        model = llama()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match=r"pass model\.module"):
            DynamicRanks(wrapped, adamw(model), **OPTIONS)

        def loss_of(_: Any, step: int) -> Any:
            return wrapped(**{key: ids[process::2] for key, ids in batch(step).items()}).loss

        updates = trained(model, loss_of=loss_of)
        result["by hand"] = (model.state_dict(), updates)
        # The second process computes something else: no processors are alike to the last bit.
        model = llama()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        row_of, fit = gradient_scores.gradient_row, rank_budget.fit_ranks
        if process == 1:
            patch.setattr(gradient_scores, "gradient_row", lambda *a: replace(row_of(*a), effective_rank=1.0))
            patch.setattr(rank_budget, "fit_ranks", lambda *a, **k: fit(*a, **k)[::-1])
        updates = trained(model, loss_of=loss_of)
        result["with other last bits"] = (model.state_dict(), updates)
    torch.save(result, f"{folder}/{process}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_that_train_together_have_the_same_ranks(whole: tuple[Run, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_together, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    for name, (weights, updates) in first.items():
        assert moved(updates), name
        assert_same_updates(updates, second[name][1])
        for key, tensor in weights.items():
            assert torch.equal(tensor, second[name][0][key]), key
    for key, tensor in first["trainer"][0].items():
        assert torch.equal(tensor, first["resumed"][0][key]), key
    assert [u.ranks for u in first["by hand"][1]] == [u.ranks for u in first["with other last bits"][1]]
    for one, other in zip(*(result["with other last bits"][1] for result in (first, second)), strict=True):
        assert [row.effective_rank for row in one.report] == [row.effective_rank for row in other.report]
    # Together they see what one process sees that has the whole batch.
    alone = llama()
    updates = trained(alone)
    assert [u.ranks for u in first["by hand"][1]] == [u.ranks for u in updates]
    for one, other in zip(first["by hand"][1], updates, strict=True):
        np.testing.assert_allclose(spectra(one), spectra(other), rtol=1e-2, atol=1e-4 * spectra(one).max())
    assert first["trainer"][1][0].ranks == whole[0].updates[0].ranks


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": "full_shard"}, r"TrainingArguments\(fsdp=\.\.\.\): ranks cannot be changed under FSDP"),
        ({"fsdp": True}, r"under FSDP"),
        ({"fsdp": ["full_shard", "offload"]}, r"under FSDP"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, r"\(deepspeed=\.\.\.\): .* under DeepSpeed"),
        ({"deepspeed": "zero3.json"}, r"under DeepSpeed"),
        (
            {"torch_compile": True},
            r"\(torch_compile=\.\.\.\): .* under torch\.compile.* use profile_gradients",
        ),
        ({"n_gpu": 2}, r"2 devices in one process: .*torchrun --nproc-per-node=2.*CUDA_VISIBLE_DEVICES=0"),
    ],
)
def test_training_that_remembers_shapes_is_refused(settings: Any, message: str, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"fsdp": [], "deepspeed": None, "torch_compile": False, "n_gpu": 1}
    arguments = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, **nothing | settings)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    model = llama()
    gard = GardCallback(**OPTIONS)
    with pytest.raises(NotImplementedError, match=message):
        gard.on_train_begin(arguments, state, None, model=model, optimizer=adamw(model))
    assert num_hooks(model) == 0


def test_trainer_itself_with_torch_compile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"under torch\.compile"):
        trainer(llama(), tmp_path, GardCallback(**OPTIONS), torch_compile=True).train()


eager = functools.partial(torch.compile, backend="eager")


def compile_blocks(model: Any) -> None:
    blocks = model.get_base_model().model.layers
    for index, block in enumerate(blocks):
        blocks[index] = eager(block)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (eager, r"wrapped in OptimizedModule \(torch\.compile\)"),
        (lambda model: model.compile(backend="eager"), r"the model is compiled \(Module\.compile\)"),
        (
            lambda model: model.get_base_model().model.layers[1].compile(backend="eager"),
            r"layers\.1 is compiled \(Module\.compile\)",
        ),
        (lambda model: eager(model.get_base_model().model.layers[1]), "or a part of it, is wrapped"),
        (lambda model: eager(torch.nn.Sequential(model)), "wrapped in OptimizedModule"),
        (compile_blocks, "wrapped in OptimizedModule"),
    ],
    ids=["whole", "in place", "a block in place", "a block", "around it", "blocks within"],
)
def test_compiled_models_are_refused(wrap: Any, message: str) -> None:
    """Whichever handle of the model is given: compiled code passes its hooks by."""
    model = llama()
    compiled = wrap(model)
    with pytest.raises(NotImplementedError, match=message):
        DynamicRanks(model, adamw(model), **OPTIONS)
    with pytest.raises(NotImplementedError, match=message):
        lorank.training.resize_lora(model, {"0.self_attn.q_proj": 2})
    assert set(ranks(model).values()) == {4}
    if getattr(compiled, "_orig_mod", None) is model:
        with pytest.raises(NotImplementedError, match=message):
            DynamicRanks(compiled, adamw(model), **OPTIONS)


def test_a_compiled_model_that_is_gone_is_no_hindrance() -> None:
    model = llama()
    compiled = eager(model)
    circle = [compiled]
    circle.append(circle)
    gc.disable()
    try:
        del compiled, circle  # Garbage that has not been collected yet.
        DynamicRanks(model, adamw(model), **OPTIONS)
    finally:
        gc.enable()
    other = eager(llama())
    DynamicRanks(model, adamw(model), **OPTIONS)
    del other


def test_copies_on_several_devices_are_refused() -> None:
    model = llama()
    parallel = torch.nn.DataParallel(model)
    DynamicRanks(model, adamw(model), **OPTIONS)  # On one device it makes no copies.
    parallel.device_ids = [0, 1]
    with pytest.raises(NotImplementedError, match=r"one process per device \(torchrun\)"):
        DynamicRanks(model, adamw(model), **OPTIONS)


@pytest.mark.parametrize("settings", [{"static_graph": True}, {}])
def test_wrappers_that_remember_shapes_are_refused_at_once(settings: Any, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama()
        wrapper = torch.nn.parallel.DistributedDataParallel(model, **settings)
        if not settings:
            DynamicRanks(model, adamw(model), **OPTIONS)
            wrapper.register_comm_hook(None, allreduce_hook)
        with pytest.raises(NotImplementedError, match="a communication hook or a static graph"):
            DynamicRanks(model, adamw(model), **OPTIONS)
    finally:
        torch.distributed.destroy_process_group()


class Strange(torch.optim.SGD):  # type: ignore[misc]
    """Remembers something whose meaning is its own."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["curvature"] = torch.ones_like(p)
        return super().step(closure)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (lambda ps: torch.optim.Adafactor(ps), "'row_var' of Adafactor cannot be carried over"),
        (lambda ps: Strange(ps, lr=0.1), "the state 'curvature' of Strange cannot be carried over"),
    ],
)
def test_an_unknown_optimizer_is_refused_after_the_first_step(optim: Any, message: str) -> None:
    model = llama()
    optimizer = optim([p for p in model.parameters() if p.requires_grad])
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        model(**batch(0)).loss.backward()
        optimizer.step()
        with pytest.raises(NotImplementedError, match=message):
            dynamic.step()
    assert num_hooks(model) == 0


def test_an_unknown_optimizer_is_refused_as_soon_as_it_remembers_something() -> None:
    """A gradient scaler may skip the first steps."""
    model = llama()
    optimizer = Strange([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        for _ in range(2):
            model(**batch(0)).loss.backward()
            dynamic.step()
        optimizer.step()
        with pytest.raises(NotImplementedError, match="the state 'curvature' of Strange cannot be carried"):
            dynamic.step()


def test_adafactor_is_refused_by_trainer_after_the_first_step(tmp_path: Path) -> None:
    run = trainer(llama(), tmp_path, GardCallback(**OPTIONS), optim="adafactor")
    with pytest.raises(NotImplementedError, match="'exp_avg_sq_row' of Adafactor cannot be carried over"):
        run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be an integer of at least 1, not 0"),
        ({"interval": 2.5}, "interval must be an integer of at least 1, not 2.5"),
        ({"window": True}, "window must be an integer of at least 1, not True"),
        ({"window": 7}, "window 7 is longer than interval 6"),
        ({"max_change": 0}, "max_change must be an integer of at least 1, not 0"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, not -1"),
        ({"freeze_after": -1}, "freeze_after must be an integer of at least 0, not -1"),
        ({"smoothing": 1.0}, r"smoothing must be at least 0 and below 1, not 1\.0"),
        ({"smoothing": math.nan}, "smoothing must be at least 0 and below 1, not nan"),
        ({"energy": 0.0}, r"energy must be above 0 and at most 1, not 0\.0"),
        ({"energy": 1.1}, r"energy must be above 0 and at most 1, not 1\.1"),
        ({"sketch": 0}, "sketch must be a positive integer"),
        ({"budget": "many"}, "a budget is a number of parameters"),
        ({"budget": 3000}, "the adapter has 3,712 parameters, more than the budget of 3,000: begin with"),
        ({"r_max": 3}, r"'model\.layers\.0\.self_attn\.q_proj' has rank 4, outside r_min 1 and r_max 3"),
        ({"r_min": 5}, "has rank 4, outside r_min 5 and r_max 12"),
        ({"adapter_name": "other"}, "no adapter 'other' in the model: it has default"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        DynamicRanks(model, adamw(model), **OPTIONS | options)
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("freeze_after", "warmup", "is_told"), [(6, 0, False), (5, 0, True), (12, 6, False), (11, 6, True)]
)
def test_ranks_that_can_never_change_are_told(freeze_after: int, warmup: int, is_told: bool) -> None:
    model = llama()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        DynamicRanks(model, adamw(model), **OPTIONS, freeze_after=freeze_after, warmup=warmup)
    assert [("ranks will never change" in str(warning.message)) for warning in told] == [True] * is_told


def test_a_training_that_ends_before_the_first_change_is_told(tmp_path: Path) -> None:
    callback = GardCallback(**OPTIONS)
    with pytest.warns(
        UserWarning, match="training ends at step 5, and the first change would be after step 6"
    ):
        trainer(llama(), tmp_path, callback, max_steps=5).train()
    assert callback.history == []


@pytest.mark.parametrize(("freeze_after", "steps"), [(None, [6, 12]), (6, [6]), (18, [6, 12])])
def test_nothing_changes_after_the_last_step(
    tmp_path: Path, freeze_after: int | None, steps: list[int]
) -> None:
    """New ranks would never be trained."""
    run = Run(tmp_path, options={"freeze_after": freeze_after}, max_steps=18)
    assert [update.step for update in run.updates] == steps
    with pytest.warns(
        UserWarning, match="training ends at step 6, and the first change would be after step 6"
    ):
        assert not Run(tmp_path, max_steps=6).updates


def test_an_adapter_that_is_not_trained_is_refused() -> None:
    model = llama()
    optimizer = adamw(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"adapter 'other' is not active \(default is\): call model\.set_adapter"
    ):
        DynamicRanks(model, optimizer, **OPTIONS, adapter_name="other")
    frozen = llama(inference_mode=True)
    with pytest.raises(
        ValueError, match=r"adapter 'default' is not trained .*: load it with is_trainable=True"
    ):
        DynamicRanks(frozen, optimizer, **OPTIONS)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"disabled: call model\.enable_adapter_layers"),
    ):
        DynamicRanks(model, optimizer, **OPTIONS)
    assert num_hooks(model) == num_hooks(frozen) == 0


def test_what_is_no_model_or_no_optimizer_is_refused() -> None:
    model = llama()
    with pytest.raises(TypeError, match="model must be a PEFT model, not str"):
        DynamicRanks("model", adamw(model), **OPTIONS)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, not 'adamw'"):
        lorank.training.resize_lora(model, {"0.self_attn.q_proj": 2}, optimizer="adamw")
    for optimizer in ("adamw", None):
        with pytest.raises(TypeError, match="optimizer must be a torch optimizer, not"):
            DynamicRanks(model, optimizer, **OPTIONS)
    with pytest.raises(TypeError, match=r"ranks must be a mapping by module, not \[2\]"):
        lorank.training.resize_lora(model, [2])  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(whole: tuple[Run, Path], tmp_path: Path) -> None:
    options = {name: np.int64(OPTIONS[name]) for name in ("budget", "interval", "window", "r_max", "sketch")}
    run = Run(tmp_path, options=options, save_strategy="steps", save_steps=6)
    assert_same_updates(run.updates, whole[0].updates)
    state = "checkpoint-6/lorank_gard.safetensors"
    assert (tmp_path / state).read_bytes() == (whole[1] / state).read_bytes()


def test_no_rank_exceeds_a_side_of_its_matrix() -> None:
    model = llama(r=2)
    narrow = {name: min(layer.get_base_layer().weight.shape) for name, layer in layers(model).items()}
    assert min(narrow.values()) < 40
    options = OPTIONS | {"budget": 10**5, "r_max": 64, "max_change": None}
    optimizer = adamw(model)
    with DynamicRanks(model, optimizer, **options) as dynamic:
        for step in range(INTERVAL):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            dynamic.step()
    assert ranks(model) == {name: min(64, side) for name, side in narrow.items()}


@pytest.mark.parametrize("options", [{"r_min": 0}, {"r_min": -1}, {"r_min": 1.5}, {"r_max": 12.5}])
def test_bounds_that_no_rank_can_have(options: Any) -> None:
    """Before training, not at the first change."""
    model = llama()
    with pytest.raises(ValueError, match="r_m"):
        DynamicRanks(model, adamw(model), **OPTIONS | options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "is a Dora.*, not plain LoRA: not supported"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "orthogonal"}, "PEFT loads even ranks only. Set init_lora_weights to True"),
    ],
)
def test_adapters_that_cannot_be_resized_are_refused_at_once(settings: Any, message: str) -> None:
    """Not at the first change, when a hundred steps are done."""
    model = llama(**settings)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        DynamicRanks(model, adamw(model), **OPTIONS)


def test_orthogonal_adapters_train_on_as_the_message_says(tmp_path: Path) -> None:
    model = llama(init_lora_weights="orthogonal")
    DynamicRanks(model, adamw(model), **OPTIONS | {"r_min": 4, "r_max": 4})  # No other rank can come up.
    model.peft_config["default"].init_lora_weights = True
    updates = trained(model)
    assert any(rank % 2 for rank in updates[-1].ranks.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().unload(), tmp_path)
    torch.testing.assert_close(evaluated(again)[0], evaluated(model)[0], rtol=0, atol=1e-6)


def test_sharded_models_are_refused_at_once(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama()
        fully_shard(model)
        with pytest.raises(NotImplementedError, match=r"is sharded .* under FSDP, DeepSpeed ZeRO-3"):
            DynamicRanks(model, adamw(model), **OPTIONS)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_weights_is_refused() -> None:
    model = llama()
    model.get_base_model().model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\..*is on the meta device: load"):
        DynamicRanks(model, adamw(model), **OPTIONS)


def test_a_model_without_a_gradient_to_look_at_is_refused() -> None:
    model = llama(targets=["embed_tokens"])
    with pytest.raises(ValueError, match="adapter 'default' has no module whose gradient can be sketched"):
        DynamicRanks(model, adamw(model))


def test_options_are_refused_before_training_begins() -> None:
    with pytest.raises(ValueError, match="window 9 is longer than interval 6: pass window=6 or less"):
        GardCallback(**OPTIONS | {"window": 9})
