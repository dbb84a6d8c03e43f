"""Dynamic ranks in a training loop: comparison with exact gradients, budgets, bounds and windows."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lorank
from lorank.training import DynamicRanks
from tests.support import tiny_models
from tests.support.dynamic_training import (
    BUDGET,
    INTERVAL,
    OPTIONS,
    WINDOW,
    assert_same_updates,
    assert_same_weights,
    batch,
    evaluated,
    llama,
    moved,
    num_hooks,
    size_of,
    text,
    trained,
)
from tests.support.lora_layers import layers, ranks, truncated, updates_of
from tests.support.optimizers import adamw


def exact_gradients(model: Any, step: int) -> dict[str, Any]:
    """Return the gradients of base weights, computed by autograd in a copy with trainable base weights."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
    weights = {name: layer.get_base_layer().weight for name, layer in layers(twin).items()}
    for weight in weights.values():
        weight.requires_grad_()
    twin(**batch(step)).loss.backward()
    return {name: weight.grad.double().flatten().numpy() for name, weight in weights.items()}


def test_ranks_equal_those_from_exact_gradients() -> None:
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
    # The gradient of an embedding cannot be sketched: the module keeps its rank and its share of the budget.
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
    # The rest of the budget is too small for one more rank of any module below its upper bound.
    for update in updates:
        before = history[update.step - 1]
        for name, rank in update.ranks.items():
            free = rank < min(7, before[name] + (max_change or 7))
            cost = sum(layers(model)[name].get_base_layer().weight.shape)
            assert not free or update.num_parameters + cost > 2800


def test_budget_is_a_share_of_the_base_model_or_the_size_of_the_adapter() -> None:
    base = sum(p.numel() for p in tiny_models.llama().parameters())
    model = llama()
    updates = trained(model, 6, budget="20%")
    assert size_of(model) == updates[-1].num_parameters <= 0.2 * base < size_of(model) + 112
    model = llama()
    size = size_of(model)
    updates = trained(model, budget=None)
    assert any(update.changes for update in updates)
    assert all(update.num_parameters <= size for update in updates)


def test_ranks_stay_during_warmup_and_after_freeze() -> None:
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
    # Hooks exist only in windows that end in a change.
    watched = [step + 1 for step, count in hooks.items() if count]
    assert watched == [15, 16, 17, 18, 21, 22, 23, 24]
    assert {count for count in hooks.values() if count} == {14}
    assert not trained(llama(), 12, warmup=12)
    assert not trained(llama(), 12, freeze_after=5)
    assert [update.step for update in trained(llama(), 12, warmup=11)] == [12]


def dense_loss(model: Any, updates: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Return the loss with given updates in place of the adapter, and the gradient norm of each weight."""
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


def test_growing_keeps_outputs_and_shrinking_changes_them_by_the_stated_errors() -> None:
    """Compare the loss on a fixed batch immediately before and after every change."""
    model = llama()
    optimizer = adamw(model)
    kinds = set()
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        for step in range(36):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            old, (logits, loss) = updates_of(model), evaluated(model)
            state = torch.get_rng_state()
            update = dynamic.step()
            assert torch.equal(torch.get_rng_state(), state)  # The random state of dropout is unchanged.
            new, (new_logits, new_loss) = updates_of(model), evaluated(model)
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
            # The mean value theorem and the Cauchy-Schwarz inequality bound the change of the loss.
            path = np.linspace(0, 1, 5)
            between = [{name: old[name] + t * (new[name] - old[name]) for name in old} for t in path]
            norms = [dense_loss(model, updates)[1] for updates in between]
            allowed = sum(error * max(norm[name] for norm in norms) for name, error in errors.items())
            assert abs(new_loss - loss) <= 1.05 * allowed + 1e-6
    assert kinds == {"as it was", "grown", "shrunk"}


def test_passes_between_steps_do_not_affect_training() -> None:
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


def test_hooks_are_removed_after_the_block_and_after_an_error() -> None:
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


class MixedLayers(torch.nn.Module):
    """A convolution, a layer without gradient, and linear layers of a given class."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = torch.nn.Conv2d(2, 8, 3, padding=1)
        self.first, self.aside, self.last = linear(128, 64), linear(64, 64), linear(64, 64)

    def forward(self, x: Any) -> Any:
        hidden = torch.tanh(self.first(torch.tanh(self.kernel(x)).flatten(1)))
        return self.last(hidden) + 0 * self.aside(hidden).detach()


@pytest.mark.parametrize("bits", [32, 4])
def test_convolutions_and_four_bit_layers_change_ranks(bits: int) -> None:
    linear: Any = torch.nn.Linear
    if bits == 4:
        linear = pytest.importorskip("bitsandbytes").nn.Linear4bit
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["kernel", "first", "aside", "last"])
    model = get_peft_model(MixedLayers(linear).to("cpu"), config).train()
    size = size_of(model)

    def loss_of(model: Any, step: int) -> Any:
        x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.flatten(1)[:, :1]).square().mean()

    updates = trained(
        model, loss_of=loss_of, budget=size, between=lambda model, _: check_size(model, size), max_change=1
    )
    assert [update.step for update in updates] == [6, 12, 18]
    assert updates[-1].ranks == ranks(model)
    # The layer without gradient loses ranks to the others.
    rows = {row.module: row for row in updates[-1].report}
    assert rows["aside"].flags == ("no gradient reached it",)
    assert ranks(model)["aside"] <= 2
    assert max(ranks(model).values()) > 4


def test_windows_without_gradients_keep_ranks_and_warn() -> None:
    """Train without base gradients, as if compiled code skipped the hooks."""
    silent = 2 * INTERVAL

    def loss_of(model: Any, step: int) -> Any:
        if step < silent:
            return sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return model(**batch(step)).loss

    model, seen = llama(r=2), []
    pattern = "step 6: no gradient reached any adapted module in the last 4 steps, so ranks stay as they are"
    with pytest.warns(UserWarning, match=pattern) as caught:
        updates = trained(model, loss_of=loss_of, between=lambda model, _: seen.append(ranks(model)))
    assert sum("no gradient" in str(warning.message) for warning in caught) == 1
    assert {rank for found in seen[:silent] for rank in found.values()} == {2}
    assert [update.step for update in updates] == [18]
    # Windows without gradients are excluded from smoothing.
    assert all(row.effective_rank.is_integer() and row.effective_rank > 0 for row in updates[0].report)


def check_size(model: Any, limit: int) -> None:
    assert size_of(model) <= limit


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


def test_orthogonal_adapters_train_after_their_initialisation_is_reset(tmp_path: Path) -> None:
    model = llama(init_lora_weights="orthogonal")
    # PEFT loads orthogonal adapters of even rank only: these bounds allow rank 4 alone.
    DynamicRanks(model, adamw(model), **OPTIONS | {"r_min": 4, "r_max": 4})
    model.peft_config["default"].init_lora_weights = True
    updates = trained(model)
    assert any(rank % 2 for rank in updates[-1].ranks.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().unload(), tmp_path)
    torch.testing.assert_close(evaluated(again)[0], evaluated(model)[0], rtol=0, atol=1e-6)
