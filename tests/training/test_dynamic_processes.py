"""Two processes that train together choose the same ranks."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorank.training import DynamicRanks, GardCallback, gradient_scores, rank_budget, restore_ranks
from tests.support.dynamic_training import (
    OPTIONS,
    Run,
    assert_same_updates,
    batch,
    llama,
    moved,
    spectra,
    trained,
    trainer,
)
from tests.support.optimizers import adamw


def train_together(process: int, folder: str, port: int) -> None:
    """Train as one of two processes, in a loop and with Trainer."""
    torch.set_num_threads(1)
    # Some versions of Trainer resume on "cpu:0", which torch does not accept as the CPU.
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
            ("OMP_NUM_THREADS", 1),  # Otherwise Accelerate uses all cores in each process.
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
        # The second process computes other values, as processors may differ in the last bits.
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


def test_distributed_processes_choose_equal_ranks(full_run: tuple[Run, Path], tmp_path: Path) -> None:
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
    # The gradients of both equal those of one process with the full batch.
    alone = llama()
    updates = trained(alone)
    assert [u.ranks for u in first["by hand"][1]] == [u.ranks for u in updates]
    for one, other in zip(first["by hand"][1], updates, strict=True):
        np.testing.assert_allclose(spectra(one), spectra(other), rtol=1e-2, atol=1e-4 * spectra(one).max())
    assert first["trainer"][1][0].ranks == full_run[0].updates[0].ranks
