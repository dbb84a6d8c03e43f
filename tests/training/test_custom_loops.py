"""Loops without Trainer: accumulated batches, gradient scalers, saved and restored state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorank.training import DynamicRanks, GardCallback, restore_ranks
from tests.support.dynamic_training import (
    OPTIONS,
    STEPS,
    WINDOW,
    assert_same_updates,
    assert_same_weights,
    batch,
    llama,
    moved,
    spectra,
)
from tests.support.lora_layers import ranks
from tests.support.optimizers import adamw


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
    """Train with float16 and a gradient scaler; the loss of the given steps overflows."""
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


def test_overflowing_steps_are_excluded() -> None:
    model, updates, scales = scaled(torch.amp.GradScaler("cpu", init_scale=8.0), (3, 8, 9, 10, 11))
    assert min(scales) < 8
    # The second window has no gradients, so ranks do not change.
    assert [(update.step, update.report.num_batches) for update in updates] == [(6, 3), (18, 4)]
    assert np.isfinite([spectra(update).max() for update in updates]).all()
    assert ranks(model) == updates[-1].ranks


def test_loop_resumes_from_saved_state(tmp_path: Path) -> None:
    """Interrupt inside a window, at a change, and between windows."""

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


def test_restored_sketches_lie_on_the_devices_of_their_modules() -> None:
    """Restore a state while one module lies on the meta device."""
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


def test_reprs_are_a_few_lines() -> None:
    model = llama()
    dynamic = DynamicRanks(model, adamw(model), interval=8, window=4)
    lines = repr(dynamic).splitlines()
    assert lines[0].startswith(f"DynamicRanks of {len(dynamic.ranks)} modules after 0 steps: ")
    assert lines[0].endswith(" parameters, GardOptions(interval=8, window=4)")
    assert len(lines) == 5
    assert "see dynamic.ranks" in lines[-1]
    assert repr(GardCallback(interval=8, window=4, budget="1%")) == (
        "GardCallback(GardOptions(budget='1%', interval=8, window=4), 0 changes of ranks)"
    )
