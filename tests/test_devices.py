"""The same on every device that there is: profiles, ranks that move, Trainer, resizing, adapters.

On a machine without a GPU these run on the CPU alone, through the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

import lorank
import test_dynamic_ranks as loops
import test_profiling as profiles
import test_resizing as resizing
import tiny_models
from adapter_files import dense, distance, norm
from lorank.training import DynamicRanks, GardCallback, resize_lora, restore_ranks

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]
# Trainer refuses float16 on a CPU.
PRECISIONS = [("cpu", "bf16"), *([("cuda", "bf16"), ("cuda", "fp16")] if HAS_GPU else [])]


@pytest.fixture(autouse=True, scope="module")
def _full_float32() -> Iterator[None]:
    """One thread, and no products of shortened float32 numbers."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def text_batches(device: str) -> list[dict[str, torch.Tensor]]:
    return [on(device, batch) for batch in profiles.text_batches()]


# Profiles.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_spectra_are_those_of_float64(device: str, checkpointing: bool) -> None:
    expected = profiles.true_gradients(tiny_models.llama().double(), text_batches("cpu"))
    model = tiny_models.llama().to(device)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    report = lorank.profile_gradients(model, text_batches(device), sketch=None, progress=False)
    assert len(report) == 14
    profiles.assert_true(report, expected)
    assert all(parameter.device.type == device for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_spectra_under_autocast(device: str) -> None:
    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return model(**batch).loss

    expected = profiles.true_gradients(tiny_models.llama(), text_batches("cpu"))
    model = tiny_models.llama().to(device)
    report = lorank.profile_gradients(model, text_batches(device), sketch=None, loss=loss, progress=False)
    profiles.assert_true(report, expected, tolerance=0.03)


@pytest.mark.parametrize("device", DEVICES)
def test_sketches_are_the_same_on_every_device(device: str) -> None:
    here, there = (
        lorank.profile_gradients(tiny_models.llama().to(where), text_batches(where), sketch=8, progress=False)
        for where in ("cpu", device)
    )
    assert profiles.same_spectra(here, there, tolerance=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_tasks_are_the_same_on_every_device(device: str) -> None:
    here, there = (
        lorank.profile_tasks(tiny_models.llama().to(where), text_batches(where), progress=False)
        for where in ("cpu", device)
    )
    assert [row.module for row in there] == [row.module for row in here]
    for one, other in zip(here, there, strict=True):
        assert (other.k_star, other.predicted_rank) == (one.k_star, one.predicted_rank), one.module
        np.testing.assert_allclose(other.singular_values, one.singular_values, rtol=1e-3, atol=1e-6)


# Ranks that move in a loop of one's own.


def mixed_precision_loop(device: str) -> tuple[Any, Any, list[Any]]:
    """float16 with a gradient scaler and a fused optimizer; the model, the optimizer and its updates."""
    model = loops.llama().to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=3)
    updates = []
    with DynamicRanks(model, optimizer, scaler=scaler, **loops.OPTIONS) as dynamic:
        for step in range(loops.STEPS):
            with torch.autocast(device, torch.float16):
                loss = model(**on(device, loops.batch(step))).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            updates.append(dynamic.step())
            # The ranks that it begins with may cost more.
            assert loops.size_of(model) == dynamic.num_parameters
            assert not updates[-1] or loops.size_of(model) <= loops.BUDGET
    return model, optimizer, [update for update in updates if update is not None]


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_move_under_mixed_precision(device: str) -> None:
    model, optimizer, updates = mixed_precision_loop(device)
    assert loops.moved(updates)
    assert loops.ranks(model) == updates[-1].ranks
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    for parameter in grouped:
        assert parameter.device.type == device
        state = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == parameter.shape
            assert (state[key].device, state[key].dtype) == (parameter.device, parameter.dtype)
        # A fused optimizer counts where its parameters are.
        assert state["step"].device == parameter.device
        assert bool(torch.isfinite(parameter).all())


@pytest.mark.parametrize("device", DEVICES)
def test_growing_changes_no_output_and_shrinking_is_certified(device: str) -> None:
    model = loops.llama().to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    kinds = set()
    with DynamicRanks(model, optimizer, **loops.OPTIONS) as dynamic:
        for step in range(loops.STEPS):
            model(**on(device, loops.batch(step))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            old, before = updates_of(model), logits(model, device)
            update = dynamic.step()
            new, after = updates_of(model), logits(model, device)
            if update is None or not any(change.error for change in update.changes.values()):
                torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
                kinds.add("kept")
                continue
            kinds.add("shrunk")
            for name, change in update.changes.items():
                error, scale = np.linalg.norm(new[name] - old[name]), np.linalg.norm(old[name])
                assert error == pytest.approx(change.error, rel=1e-4, abs=1e-6 * scale)
    assert kinds == {"kept", "shrunk"}


def updates_of(model: Any) -> dict[str, Any]:
    """Every update in float64, from the factors where they are."""
    return {
        name: layer.scaling["default"] * (b.detach().double() @ a.detach().double()).cpu().numpy()
        for name, layer in loops.layers(model).items()
        for a, b in [loops.factors(layer)]
    }


def logits(model: Any, device: str) -> torch.Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(**on(device, loops.batch(1000, 4))).logits
    model.train(training)
    return found


# Trainer.


def trainer(model: Any, device: str, precision: str, folder: Path, gard: GardCallback, **more: Any) -> Any:
    settings = {precision: True, "use_cpu": device == "cpu", "optim": "adamw_torch_fused", **more}
    return loops.trainer(model, folder, gard, **settings)


@pytest.mark.parametrize(("device", "precision"), PRECISIONS)
def test_trainer_moves_ranks_and_resumes(device: str, precision: str, tmp_path: Path) -> None:
    model, gard = loops.llama(), GardCallback(**loops.OPTIONS)
    whole = trainer(model, device, precision, tmp_path, gard, save_strategy="steps", save_steps=7)
    whole.train()
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert loops.moved(gard.history)
    assert loops.ranks(model) == gard.history[-1].ranks
    assert loops.num_hooks(model) == 0
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all()

    again, resumed_gard = loops.llama(), GardCallback(**loops.OPTIONS)
    checkpoint = tmp_path / "checkpoint-7"
    restore_ranks(again, checkpoint)
    resumed = trainer(again, device, precision, tmp_path, resumed_gard)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    later = [update for update in gard.history if update.step > 7]
    assert [update.ranks for update in resumed_gard.history] == [update.ranks for update in later]
    for one, other in zip(later, resumed_gard.history, strict=True):
        # Sums on a GPU may be taken in any order.
        np.testing.assert_allclose(loops.spectra(other), loops.spectra(one), rtol=1e-3, atol=1e-6)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5, msg=name)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(loops.llama().unload().to(device), tmp_path / "adapter")
    assert {parameter.device.type for parameter in loaded.parameters()} == {device}
    left = updates_of(model)
    for name, update in updates_of(loaded).items():
        np.testing.assert_array_equal(update, left[name])


# Resizing, and adapters of live models.


@pytest.mark.parametrize("device", DEVICES)
def test_resizing(device: str) -> None:
    model = resizing.mixed().to(device)
    ids = resizing.MIXED_IDS.to(device)
    before = resizing.output(model, ids)
    changes = resize_lora(model, {"table": 7, "kernel": 5, "first": 6, "last": 9})
    assert all(change.error == 0 for change in changes.values())
    torch.testing.assert_close(resizing.output(model, ids), before, rtol=0, atol=1e-6)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    updates = resizing.dense(model.cpu())
    model.to(device)
    wanted = {"table": 1, "kernel": 2, "first": 3, "last": 2}
    changes = resize_lora(model, wanted)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    for name, update in resizing.dense(model.cpu()).items():
        size = np.linalg.norm(updates[name])
        np.testing.assert_allclose(update, resizing.truncated(updates[name], wanted[name]), atol=1e-6 * size)
        assert changes[name].error == pytest.approx(np.linalg.norm(update - updates[name]), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_spectra_of_a_live_model(device: str) -> None:
    model = tiny_models.llama()
    expected = [(row.name, row.alpha_hill, row.mp_spikes) for row in lorank.analyze(model, progress=False)]
    found = lorank.analyze(model.to(device), progress=False)
    assert [(row.name, row.alpha_hill, row.mp_spikes) for row in found] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_is_taken_compressed_and_put_back(device: str) -> None:
    model = loops.llama().eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = lorank.compress(lorank.LoraAdapter.from_model(model), rank_ratio=0.5, progress=False)
    model.to(device)
    small = lorank.compress(lorank.LoraAdapter.from_model(model), rank_ratio=0.5, progress=False)
    assert small.ranks == expected.ranks
    small.into_model(model)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    again = dense(lorank.LoraAdapter.from_model(model))
    kept = {name: update for name, update in dense(expected).items() if name in again}
    assert distance(again, kept) <= 1e-6 * norm(kept)
