"""Resumed and distributed trainings whose ranks were changed by resize_lora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import lorank
from lorank.training import resize_lora, restore_ranks
from tests.support import tiny_models
from tests.support.adapter_files import trained
from tests.support.lora_layers import ranks, scalings
from tests.support.optimizers import trainable
from tests.support.outputs import outputs
from tests.support.resizable_models import LLAMA, assert_untouched, linear, saved_and_loaded, snapshot


class Dataset(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(i, i + 8) % 64
        return {"input_ids": ids, "labels": ids}


RESIZED = {"0.self_attn.q_proj": 7, "0.mlp.up_proj": 1, "1.mlp.up_proj": 2}


class Resizing(transformers.TrainerCallback):
    """A callback that changes ranks after the third step."""

    def on_step_end(self, _: Any, state: Any, *__: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            resize_lora(kwargs["model"], RESIZED, optimizer=kwargs["optimizer"])


def adapted_llama(**settings: Any) -> Any:
    torch.manual_seed(1)
    base = tiny_models.llama()
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA, **settings))


def trainer(model: Any, folder: Path, callbacks: list[Any]) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return transformers.Trainer(model, arguments, train_dataset=Dataset(), callbacks=callbacks)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, rank_stabilized: bool
) -> None:
    model = adapted_llama(use_rslora=rank_stabilized)
    trainer(model, tmp_path / "whole", [Resizing()]).train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"

    resumed = adapted_llama(use_rslora=rank_stabilized)
    changes = restore_ranks(resumed, checkpoint)
    assert {c.new_rank for c in changes.values()} == {1, 2, 4, 7}
    assert ranks(resumed) == ranks(model)
    assert scalings(resumed) == pytest.approx(scalings(model), rel=1e-15)
    config, expected = (m.peft_config["default"].to_dict() for m in (resumed, model))
    assert {k: v for k, v in config.items() if "target" not in k} == {
        k: v for k, v in expected.items() if "target" not in k
    }
    trainer(resumed, tmp_path / "resumed", []).train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = adapted_llama()
    assert not torch.equal(outputs(fresh), outputs(model))


def test_scalings_of_a_rank_stabilized_config_are_restored(tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=2, lora_alpha=3, target_modules=LLAMA, use_rslora=True))
    resize_lora(model, RESIZED)
    model.save_pretrained(tmp_path)
    other = adapted_llama()
    restore_ranks(other, tmp_path)
    other.load_adapter(tmp_path, "default")
    assert scalings(other) == pytest.approx(scalings(model), rel=1e-14)
    assert other.peft_config["default"].use_rslora is False
    torch.testing.assert_close(outputs(other), outputs(model))
    again = saved_and_loaded(other, tiny_models.llama(), tmp_path / "again")
    torch.testing.assert_close(outputs(again), outputs(model))


def test_ranks_of_an_adapter_in_its_subfolder_are_restored(tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=LLAMA))
    model.add_adapter("second", LoraConfig(r=3, target_modules=LLAMA))
    resize_lora(model, {"0.mlp.up_proj": 6}, adapter_name="second")
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(tiny_models.llama(), LoraConfig(r=3, target_modules=LLAMA), adapter_name="second")
    changes = restore_ranks(fresh, tmp_path, adapter_name="second")
    assert changes["model.layers.0.mlp.up_proj"].new_rank == 6


def test_unfitting_checkpoints_raise(tmp_path: Path) -> None:
    model = adapted_llama()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        restore_ranks(model, tmp_path / "none")
    with pytest.raises(lorank.FormatError, match=r"holds no adapter_config\.json"):
        restore_ranks(model, tmp_path)
    trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["k_proj"])).save_pretrained(tmp_path / "k")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"module 'model.layers.0.self_attn.k_proj' of the checkpoint is not adapted"
    ):
        restore_ranks(model, tmp_path / "k")
    trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="holds no factors of 6 adapted modules, such as 'model"):
        restore_ranks(model, tmp_path / "q")
    assert_untouched(model, before)


def train_together(process: int, folder: str) -> None:
    """Train as one of two processes, each with half of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=process, world_size=2)
    model = linear()
    static = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
    with pytest.raises(NotImplementedError, match="or a static graph, which depend on the shapes"):
        resize_lora(model, {"0": 6})
    del static
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel: pass model\.module"):
        resize_lora(wrapped, {"0": 6})
    train_with_resizes(model, lambda x: wrapped(x[process::2]))
    torch.save(model.state_dict(), f"{folder}/{process}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_with_resizes(model: Any, forward: Any) -> None:
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    for i in range(6):
        if i in (2, 4):
            wanted = {"0": 6, "2": 2} if i == 2 else {"0": 3}
            resize_lora(model, wanted, optimizer=optimizer)
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(i)).double()
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()


def test_distributed_processes_stay_equal_across_resizes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_together, (str(tmp_path),), nprocs=2)
    alone = linear()
    train_with_resizes(alone, alone)
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    for name, expected in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-7, atol=1e-9)
