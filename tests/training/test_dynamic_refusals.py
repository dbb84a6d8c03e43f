"""Models, optimizers and options that DynamicRanks and GardCallback refuse."""

from __future__ import annotations

import functools
import gc
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard

import lorank
from lorank.training import DynamicRanks, GardCallback
from tests.support.dynamic_training import OPTIONS, batch, llama, num_hooks, trainer
from tests.support.lora_layers import ranks
from tests.support.optimizers import UnknownState, adamw, trainable


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
def test_trainer_arguments_with_fixed_shapes_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"fsdp": [], "deepspeed": None, "torch_compile": False, "n_gpu": 1}
    arguments = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, **nothing | settings)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    model = llama()
    gard = GardCallback(**OPTIONS)
    with pytest.raises(NotImplementedError, match=message):
        gard.on_train_begin(arguments, state, None, model=model, optimizer=adamw(model))
    assert num_hooks(model) == 0


def test_trainer_with_torch_compile_is_refused(tmp_path: Path) -> None:
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
    """Pass the model or its compiled wrapper: compiled code skips hooks in both cases."""
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


def test_deleted_compiled_model_does_not_block_training() -> None:
    model = llama()
    compiled = eager(model)
    circle = [compiled]
    circle.append(circle)
    gc.disable()
    try:
        del compiled, circle  # Both are garbage that is not collected yet.
        DynamicRanks(model, adamw(model), **OPTIONS)
    finally:
        gc.enable()
    other = eager(llama())
    DynamicRanks(model, adamw(model), **OPTIONS)
    del other


def test_data_parallel_copies_are_refused() -> None:
    model = llama()
    parallel = torch.nn.DataParallel(model)
    DynamicRanks(model, adamw(model), **OPTIONS)  # On one device it makes no copies.
    parallel.device_ids = [0, 1]
    with pytest.raises(NotImplementedError, match=r"one process per device \(torchrun\)"):
        DynamicRanks(model, adamw(model), **OPTIONS)


@pytest.mark.parametrize("settings", [{"static_graph": True}, {}])
def test_distributed_wrappers_with_fixed_shapes_are_refused(settings: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (lambda ps: torch.optim.Adafactor(ps), "'row_var' of Adafactor cannot be carried over"),
        (lambda ps: UnknownState(ps, lr=0.1), "the state 'curvature' of UnknownState cannot be carried over"),
    ],
)
def test_unknown_optimizer_state_is_refused_after_the_first_step(optim: Any, message: str) -> None:
    model = llama()
    optimizer = optim(trainable(model))
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        model(**batch(0)).loss.backward()
        optimizer.step()
        with pytest.raises(NotImplementedError, match=message):
            dynamic.step()
    assert num_hooks(model) == 0


def test_unknown_optimizer_state_is_refused_when_it_appears() -> None:
    """Train two steps without the optimizer, as a gradient scaler may do."""
    model = llama()
    optimizer = UnknownState(trainable(model), lr=0.1)
    with DynamicRanks(model, optimizer, **OPTIONS) as dynamic:
        for _ in range(2):
            model(**batch(0)).loss.backward()
            dynamic.step()
        optimizer.step()
        with pytest.raises(
            NotImplementedError, match="the state 'curvature' of UnknownState cannot be carried"
        ):
            dynamic.step()


def test_trainer_with_adafactor_is_refused_after_the_first_step(tmp_path: Path) -> None:
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
        ({"adapter_name": "other"}, "no adapter 'other' in the model, only default"),
    ],
)
def test_invalid_options_raise(options: Any, message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        DynamicRanks(model, adamw(model), **OPTIONS | options)
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("freeze_after", "warmup", "warns"), [(6, 0, False), (5, 0, True), (12, 6, False), (11, 6, True)]
)
def test_options_without_any_change_warn(freeze_after: int, warmup: int, warns: bool) -> None:
    model = llama()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DynamicRanks(model, adamw(model), **OPTIONS, freeze_after=freeze_after, warmup=warmup)
    assert [("ranks will never change" in str(warning.message)) for warning in caught] == [True] * warns


def test_inactive_frozen_and_disabled_adapters_are_refused() -> None:
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


def test_wrong_types_of_model_and_optimizer_raise() -> None:
    model = llama()
    with pytest.raises(TypeError, match="model must be a PEFT model, not str"):
        DynamicRanks("model", adamw(model), **OPTIONS)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, not 'adamw'"):
        lorank.training.resize_lora(model, {"0.self_attn.q_proj": 2}, optimizer="adamw")
    for optimizer in ("adamw", None):
        with pytest.raises(TypeError, match="optimizer must be a torch optimizer, not"):
            DynamicRanks(model, optimizer, **OPTIONS)
    with pytest.raises(TypeError, match=r"ranks must be a mapping from module names, not \[2\]"):
        lorank.training.resize_lora(model, [2])


@pytest.mark.parametrize("options", [{"r_min": 0}, {"r_min": -1}, {"r_min": 1.5}, {"r_max": 12.5}])
def test_invalid_rank_bounds_raise(options: Any) -> None:
    """Check bounds before training instead of at the first change."""
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
def test_unresizable_adapters_are_refused_before_training(settings: Any, message: str) -> None:
    """Check adapters before training instead of at the first change."""
    model = llama(**settings)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        DynamicRanks(model, adamw(model), **OPTIONS)


def test_sharded_models_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama()
        fully_shard(model)
        with pytest.raises(NotImplementedError, match=r"is sharded .* under FSDP, DeepSpeed ZeRO-3"):
            DynamicRanks(model, adamw(model), **OPTIONS)
    finally:
        torch.distributed.destroy_process_group()


def test_modules_on_the_meta_device_are_refused() -> None:
    model = llama()
    model.get_base_model().model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\..*is on the meta device: load"):
        DynamicRanks(model, adamw(model), **OPTIONS)


def test_adapters_without_a_sketchable_module_are_refused() -> None:
    model = llama(targets=["embed_tokens"])
    with pytest.raises(ValueError, match="adapter 'default' has no module whose gradient can be sketched"):
        DynamicRanks(model, adamw(model))


def test_callback_checks_options_at_construction() -> None:
    with pytest.raises(ValueError, match="window 9 is longer than interval 6: pass window=6 or less"):
        GardCallback(**OPTIONS | {"window": 9})
