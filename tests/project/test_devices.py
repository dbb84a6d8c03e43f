"""Equal results on every available device: profiles, dynamic ranks, Trainer, resizing, adapters.

On a machine without a GPU these tests run the same code on the CPU.
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
from lorank.profiling.sketch import GradientSketches
from lorank.profiling.targets import find_targets
from lorank.training import DynamicRanks, GardCallback, resize_lora, restore_ranks
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, norm
from tests.support.devices import DEVICES, HAS_GPU, on
from tests.support.dynamic_training import (
    BUDGET,
    OPTIONS,
    STEPS,
    assert_same_updates,
    assert_same_weights,
    batch,
    llama,
    loss_on,
    moved,
    num_hooks,
    size_of,
    spectra,
    trained,
    trainer,
)
from tests.support.gradient_oracle import Array, assert_true, true_gradients
from tests.support.lora_layers import ranks, truncated, updates_of
from tests.support.outputs import outputs
from tests.support.profiled_models import text_batches_on
from tests.support.resizable_models import MIXED_IDS, mixed
from tests.support.task_oracle import assert_task, recorded

# Trainer refuses float16 on a CPU.
PRECISIONS = [("cpu", "bf16"), *([("cuda", "bf16"), ("cuda", "fp16")] if HAS_GPU else [])]
# Both keep step counts on the device of the parameters; AdamW refuses capturable steps on a CPU.
OPTIMIZERS = [(device, "fused") for device in DEVICES] + ([("cuda", "capturable")] if HAS_GPU else [])
LOOPS = [(*optimizer, dtype) for optimizer in OPTIMIZERS for dtype in (torch.float16, torch.bfloat16)]


@pytest.fixture(autouse=True, scope="module")
def _reproducible() -> Iterator[None]:
    """Use one thread, deterministic algorithms, and no TF32 products."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setenv(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # Required by torch for deterministic products on a GPU.
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(is_deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


# Profiles.


def profiled_llama(device: str, checkpointing: bool = False) -> Any:
    model = tiny_models.llama().to(device)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    return model


@pytest.fixture(scope="module")
def gradients() -> dict[str, Array]:
    """Return gradients in float64 by autograd on the CPU."""
    return true_gradients(tiny_models.llama().double(), text_batches_on("cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_spectra_equal_those_of_float64(device: str, checkpointing: bool, gradients: Any) -> None:
    model = profiled_llama(device, checkpointing)
    report = lorank.profile_gradients(model, text_batches_on(device), sketch=None, progress=False)
    assert len(report) == 14
    assert_true(report, gradients)
    assert all(parameter.device.type == device for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_spectra_under_autocast_are_close_to_float64(
    device: str, dtype: torch.dtype, tolerance: float, checkpointing: bool, gradients: Any
) -> None:
    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast(device, dtype):
            return model(**batch).loss

    model = profiled_llama(device, checkpointing)
    report = lorank.profile_gradients(model, text_batches_on(device), sketch=None, loss=loss, progress=False)
    assert_true(report, gradients, tolerance)
    with pytest.raises(AssertionError):  # Products are rounded.
        assert_true(report, gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_sketches_are_equal_on_every_device(device: str, gradients: Any) -> None:
    """Sketches are projections of the true gradients, on any device of model and batches."""
    model = profiled_llama(device)
    report = lorank.profile_gradients(model, text_batches_on("cpu"), sketch=8, seed=3, progress=False)
    targets = find_targets(tiny_models.llama(), None).chosen
    drawn = GradientSketches(targets, 8, 3)
    sketched = {}
    for index, target in enumerate(targets):
        out, fan_in = target.info.shape
        left, right = drawn._projection(index, "out", out), drawn._projection(index, "in", fan_in)
        assert left is not None
        assert right is not None
        name = f"{target.info.module}.weight"
        whole = gradients[name].reshape(-1, out, fan_in)
        sketched[name] = (left.double().numpy().T @ whole @ right.double().numpy()).reshape(len(whole), -1)
    assert_true(report, sketched)


@pytest.mark.parametrize("device", DEVICES)
def test_tasks_equal_those_of_float64(device: str) -> None:
    model = profiled_llama(device)
    report = lorank.profile_tasks(model, text_batches_on("cpu"), progress=False)
    assert len(report) == 14
    tape = recorded(tiny_models.llama().double(), text_batches_on("cpu"), [row.name for row in report])
    for row in report:
        assert_task(row, *tape.rows(row.name), folds=5, space="prediction")


# Dynamic ranks in a loop without Trainer.


def mixed_precision_loop(device: str, kind: str, dtype: torch.dtype) -> tuple[Any, Any, list[Any]]:
    """Train in float16 with a gradient scaler or in bfloat16; return the model, optimizer and updates."""
    model = llama().to(device)
    optimizer = adamw(model, kind)
    is_scaled = dtype == torch.float16
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=3, enabled=is_scaled)
    updates = []
    with DynamicRanks(model, optimizer, scaler=scaler if is_scaled else None, **OPTIONS) as dynamic:
        # One step after the last change, so that the optimizer steps after each.
        for step in range(STEPS + 1):
            with torch.autocast(device, dtype):
                loss = loss_on(device, model, step)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            updates.append(dynamic.step())
            assert size_of(model) == dynamic.num_parameters <= BUDGET
    return model, optimizer, [update for update in updates if update is not None]


def adamw(model: Any, kind: str) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **{kind: True})


@pytest.mark.parametrize(("device", "kind", "dtype"), LOOPS)
def test_ranks_change_under_mixed_precision(device: str, kind: str, dtype: torch.dtype) -> None:
    model, optimizer, updates = mixed_precision_loop(device, kind, dtype)
    assert [update.step for update in updates] == [6, 12, 18]
    assert moved(updates)
    assert ranks(model) == updates[-1].ranks
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    for parameter in grouped:
        assert parameter.device.type == device
        state = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == parameter.shape
            assert (state[key].device, state[key].dtype) == (parameter.device, parameter.dtype)
            assert bool(torch.isfinite(state[key]).all())
        assert (state["step"].device, state["step"].dtype) == (parameter.device, torch.float32)
        assert float(state["step"]) == STEPS + 1
        assert bool(torch.isfinite(parameter).all())


@pytest.mark.parametrize(("device", "kind", "dtype"), LOOPS)
def test_two_loops_are_identical(device: str, kind: str, dtype: torch.dtype) -> None:
    model, optimizer, updates = mixed_precision_loop(device, kind, dtype)
    again, other, repeated = mixed_precision_loop(device, kind, dtype)
    assert_same_updates(repeated, updates)
    assert_same_weights(again, model)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_change_under_data_parallelism(device: str, tmp_path: Path) -> None:
    """The wrapper sees the new shapes; in a group of one process it does not change gradients."""
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama().to(device)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        updates = trained(model, loss_of=lambda _, step: loss_on(device, wrapped, step))
    finally:
        torch.distributed.destroy_process_group()
    alone = llama().to(device)
    expected = trained(alone, loss_of=lambda model, step: loss_on(device, model, step))
    assert moved(updates)
    assert_same_updates(updates, expected)
    assert_same_weights(model, alone)


@pytest.mark.parametrize("device", DEVICES)
def test_growing_keeps_outputs_and_shrinking_has_the_stated_errors(device: str) -> None:
    model = llama().to(device)
    optimizer = adamw(model, "fused")
    kinds, updates = set(), []
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        for step in range(STEPS):
            loss_on(device, model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            old, before = updates_of(model), logits(model, device)
            update = dynamic.step()
            new, after = updates_of(model), logits(model, device)
            if update is not None:
                updates.append(update)
            if update is None or not any(change.error for change in update.changes.values()):
                torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
                kinds.add("grown" if update is not None and update.changes else "as it was")
                continue
            kinds.add("shrunk")
            for name, change in update.changes.items():
                error, scale = np.linalg.norm(new[name] - old[name]), np.linalg.norm(old[name])
                assert error == pytest.approx(change.error, rel=1e-4, abs=1e-6 * scale)
    assert kinds == {"as it was", "grown", "shrunk"}
    # A loop on the CPU with a plain optimizer gives the same ranks.
    expected = trained(llama())
    assert [update.ranks for update in updates] == [update.ranks for update in expected]
    for one, other in zip(expected, updates, strict=True):
        largest = spectra(one).max()
        np.testing.assert_allclose(spectra(other), spectra(one), rtol=0, atol=1e-3 * largest)


def logits(model: Any, device: str) -> torch.Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(**on(device, batch(1000, 4))).logits
    model.train(training)
    return found


# Trainer.


def device_trainer(
    model: Any, device: str, precision: str, folder: Path, gard: GardCallback, **more: Any
) -> Any:
    settings = {precision: True, "use_cpu": device == "cpu", "optim": "adamw_torch_fused", **more}
    return trainer(model, folder, gard, **settings)


@pytest.mark.parametrize(("device", "precision"), PRECISIONS)
def test_trainer_changes_ranks_and_resumes(device: str, precision: str, tmp_path: Path) -> None:
    model, gard = llama(), GardCallback(**OPTIONS)
    whole = device_trainer(model, device, precision, tmp_path, gard, save_strategy="steps", save_steps=5)
    whole.train()
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert moved(gard.history)
    assert ranks(model) == gard.history[-1].ranks
    assert num_hooks(model) == 0
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all()

    # Resume within a window: its sketches return to the device of the model.
    again, resumed_gard = llama().to(device), GardCallback(**OPTIONS)
    checkpoint = tmp_path / "checkpoint-10"
    restore_ranks(again, checkpoint)
    resumed = device_trainer(again, device, precision, tmp_path, resumed_gard)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_updates(resumed_gard.history, [update for update in gard.history if update.step > 10])
    assert_same_weights(again, model)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama().unload().to(device), tmp_path / "adapter")
    assert {parameter.device.type for parameter in loaded.parameters()} == {device}
    assert ranks(loaded) == ranks(model)
    left = updates_of(model)
    for name, update in updates_of(loaded).items():
        np.testing.assert_array_equal(update, left[name])


# Resizing, and adapters of live models.


@pytest.mark.parametrize("device", DEVICES)
def test_resizing_keeps_the_device_and_truncates_exactly(device: str) -> None:
    model = mixed().to(device)
    ids = MIXED_IDS.to(device)
    before = outputs(model, ids)
    changes = resize_lora(model, {"table": 7, "kernel": 5, "first": 6, "last": 9})
    assert all(change.error == 0 for change in changes.values())
    torch.testing.assert_close(outputs(model, ids), before, rtol=0, atol=1e-6)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    updates = updates_of(model.cpu())
    model.to(device)
    wanted = {"table": 1, "kernel": 2, "first": 3, "last": 2}
    changes = resize_lora(model, wanted)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    for name, update in updates_of(model.cpu()).items():
        size = np.linalg.norm(updates[name])
        np.testing.assert_allclose(update, truncated(updates[name], wanted[name]), atol=1e-6 * size)
        assert changes[name].error == pytest.approx(np.linalg.norm(update - updates[name]), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_spectra_and_ranks_of_a_live_model_equal_those_of_its_weights(device: str) -> None:
    model = tiny_models.llama()
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    model.to(device)
    report = lorank.analyze(model, keep_eigenvalues=True, progress=False)
    assert len(report) == 16
    for row in report:
        weight = weights[f"{row.name}.weight"].astype(np.float64)
        expected = np.linalg.svd(weight, compute_uv=False)[::-1] ** 2
        np.testing.assert_allclose(row.eigenvalues, expected, rtol=0, atol=1e-12 * expected[-1])
    for method in ("htsr", "linear-decay"):
        found, expected_ranks = (
            lorank.allocate(source, method, r_max=12, progress=False).ranks for source in (model, weights)
        )
        assert found == expected_ranks


@pytest.mark.parametrize("device", DEVICES)
def test_adapter_is_read_compressed_and_inserted(device: str) -> None:
    model = llama().eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    updates = updates_of(model)
    model.to(device)
    small = lorank.compress(lorank.LoraAdapter.from_model(model), rank_ratio=0.5, progress=False)
    # The largest half of all singular values.
    values = {name: np.linalg.svd(update, compute_uv=False)[:4] for name, update in updates.items()}
    least = np.sort(np.concatenate([*values.values()]))[::-1][2 * len(updates) - 1]
    assert small.ranks == {name: int((some >= least).sum()) for name, some in values.items()}
    kept = {name: truncated(updates[name], rank) for name, rank in small.ranks.items()}
    assert distance(dense(small), kept) <= 1e-6 * norm(kept)
    small.into_model(model)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    again = dense(lorank.LoraAdapter.from_model(model))
    assert set(again) == {name for name, rank in small.ranks.items() if rank}
    assert distance(again, {name: kept[name] for name in again}) <= 1e-6 * norm(kept)
