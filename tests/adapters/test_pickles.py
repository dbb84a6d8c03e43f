"""Pickled and copied adapters save the same bytes as the original, even without its source."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import lorank
from lorank.adapters.stored import RawTensor, Stored

PREFIX = "base_model.model"
Save = Callable[[Path], Path]

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def randoms(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def peft_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"{PREFIX}.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q", "conv"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "layers.0.q.lora_A.weight": randoms(3, 8, dtype=dtype),
        "layers.0.q.lora_B.weight": randoms(6, 3, dtype=dtype),
        "layers.0.conv.lora_A.weight": randoms(3, 4, 3, 3, dtype=dtype),
        "layers.0.conv.lora_B.weight": randoms(5, 3, 1, 1, dtype=dtype),
        "tokens.lora_embedding_A": randoms(3, 20, dtype=dtype),
        "tokens.lora_embedding_B": randoms(8, 3, dtype=dtype),
    }


def of_type(dtype: torch.dtype) -> Callable[[Path], lorank.LoraAdapter]:
    return lambda folder: lorank.LoraAdapter.load(peft_folder(folder / "source", factors(dtype)))


def with_stacks(folder: Path) -> lorank.LoraAdapter:
    path = "layers.0.mlp.experts"
    tensors = {
        f"{path}.base_layer.lora_A.weight": randoms(2 * 3, 8, dtype=torch.bfloat16),
        f"{path}.base_layer.lora_B.weight": randoms(12, 3 * 2, dtype=torch.bfloat16),
        f"{path}.lora_A.weight": randoms(2 * 3, 6, dtype=torch.bfloat16),
        f"{path}.lora_B.weight": randoms(8, 3 * 2, dtype=torch.bfloat16),
    }
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return lorank.LoraAdapter.load(
        peft_folder(folder / "source", tensors, target_modules=None, target_parameters=targets)
    )


def with_adalora(folder: Path) -> lorank.LoraAdapter:
    tensors = {
        "layers.0.q.lora_A": randoms(3, 8),
        "layers.0.q.lora_B": randoms(6, 3),
        "layers.0.q.lora_E": randoms(3, 1),
    }
    return lorank.LoraAdapter.load(peft_folder(folder / "source", tensors, peft_type="ADALORA", init_r=12))


def with_dora(folder: Path) -> lorank.LoraAdapter:
    tensors = factors(torch.float16) | {
        "layers.0.q.lora_magnitude_vector": randoms(6, dtype=torch.float16),
        "layers.0.conv.lora_magnitude_vector": randoms(1, 5, 1, 1, dtype=torch.bfloat16),
    }
    return lorank.LoraAdapter.load(peft_folder(folder / "source", tensors, use_dora=True))


def with_others(folder: Path) -> lorank.LoraAdapter:
    tensors = factors(torch.bfloat16) | {
        "layers.0.q.lora_B.bias": randoms(6),
        "head.weight": randoms(4, 8, dtype=torch.bfloat16),
        "head.steps": torch.tensor(7),
        "head.mask": torch.tensor([True, False]),
        "head.small": randoms(2, 2).to(torch.float8_e4m3fn),
        "head.half": randoms(2, 2, dtype=torch.float16),
        "head.wide": randoms(2, 2, dtype=torch.float64),
    }
    return lorank.LoraAdapter.load(
        peft_folder(folder / "source", tensors, lora_bias=True, modules_to_save=["head"])
    )


def compressed(folder: Path) -> lorank.LoraAdapter:
    return lorank.compress(of_type(torch.bfloat16)(folder), avg_rank=1.3, progress=False)


def padded(folder: Path) -> lorank.LoraAdapter:
    compressed(folder).save(folder / "padded", "portable")
    shutil.rmtree(folder / "source")
    shutil.move(folder / "padded", folder / "source")
    return lorank.LoraAdapter.load(folder / "source")


def of_image(folder: Path) -> lorank.LoraAdapter:
    tensors = {
        "lora_unet_mid_block_q.lora_down.weight": randoms(3, 8, dtype=torch.float16),
        "lora_unet_mid_block_q.lora_up.weight": randoms(6, 3, dtype=torch.float16),
        "lora_unet_mid_block_q.alpha": torch.tensor(2.0),
        "lora_unet_mid_block_conv.lora_down.weight": randoms(2, 4, 1, 1),
        "lora_unet_mid_block_conv.lora_mid.weight": randoms(3, 2, 3, 3),
        "lora_unet_mid_block_conv.lora_up.weight": randoms(5, 3, 1, 1),
        "lora_unet_mid_block_q.dora_scale": randoms(1, 8, dtype=torch.bfloat16),
        "lora_unet_out.diff": randoms(2, 2, dtype=torch.float16),
    }
    (folder / "source").mkdir()
    save_file(tensors, folder / "source" / "image.safetensors", {"ss_base_model": "some", "ss_steps": "10"})
    return lorank.LoraAdapter.load(folder / "source" / "image.safetensors")


def of_model(folder: Path) -> lorank.LoraAdapter:
    (folder / "source").mkdir()
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)).to(torch.bfloat16)
    config = LoraConfig(r=3, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    return lorank.LoraAdapter.from_model(get_peft_model(model, config, autocast_adapter_dtype=False))


ADAPTERS: dict[str, Callable[[Path], lorank.LoraAdapter]] = {
    "float64": of_type(torch.float64),
    "float32": of_type(torch.float32),
    "float16": of_type(torch.float16),
    "bfloat16": of_type(torch.bfloat16),
    "float8": of_type(torch.float8_e4m3fn),
    "stacks": with_stacks,
    "AdaLoRA": with_adalora,
    "DoRA": with_dora,
    "other tensors": with_others,
    "compressed": compressed,
    "padded": padded,
    "image": of_image,
    "live": of_model,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> lorank.LoraAdapter:
    return ADAPTERS[request.param](tmp_path)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_copy_saves_the_same_bytes(
    adapter: lorank.LoraAdapter, how: str, profile: Any, tmp_path: Path
) -> None:
    adapter.save(tmp_path / "before", profile)
    again = COPIES[how](adapter)
    again.save(tmp_path / "after", profile)
    assert type(again) is lorank.LoraAdapter
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copy_does_not_need_the_source(adapter: lorank.LoraAdapter, how: str, tmp_path: Path) -> None:
    adapter.save(tmp_path / "before")
    again = COPIES[how](adapter)
    for file in (tmp_path / "source").iterdir():
        file.write_bytes(b"")
    again.save(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


def test_copy_keeps_everything_that_can_be_seen(adapter: lorank.LoraAdapter) -> None:
    again = COPIES["pickle"](adapter)
    assert repr(again) == repr(adapter)
    assert (again.notes, again.config, again.format) == (adapter.notes, adapter.config, adapter.format)
    assert again.certificate == adapter.certificate
    for old, new in zip(adapter.modules.values(), again.modules.values(), strict=True):
        assert repr(new) == repr(old)
        np.testing.assert_array_equal(new.A, old.A)
        np.testing.assert_array_equal(new.B, old.B)
        types = [[matrix.dtype for pair in module.factors() for matrix in pair] for module in (old, new)]
        assert types[0] == types[1] or "float8_e4m3fn" in types[0]


def test_copied_adapter_compresses_to_the_same_bytes(adapter: lorank.LoraAdapter, tmp_path: Path) -> None:
    for name, one in {"before": adapter, "after": COPIES["pickle"](adapter)}.items():
        lorank.compress(one, rank_ratio=0.6, progress=False).save(tmp_path / name)
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


@pytest.mark.parametrize("name", ["bfloat16", "compressed", "image", "live"])
def test_spawned_process_saves_the_same_bytes(name: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name](tmp_path)
    adapter.save(tmp_path / "before")
    process = multiprocessing.get_context("spawn").Process(target=adapter.save, args=(tmp_path / "after",))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


def test_deep_copy_of_a_live_adapter_does_not_follow_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    peft_model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    adapter = lorank.LoraAdapter.from_model(peft_model)
    again = copy.deepcopy(adapter)
    before = again.modules["0"].A.copy()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(again.modules["0"].A, before)
    assert not adapter.modules["0"].A.any()


@pytest.mark.parametrize("how", COPIES)
def test_parts_are_copied(how: str, tmp_path: Path) -> None:
    adapter = compressed(tmp_path)
    module = next(iter(adapter.modules.values()))
    np.testing.assert_array_equal(COPIES[how](module).A, module.A)
    assert COPIES[how](adapter.certificate) == adapter.certificate
    stored = Stored(np.arange(3.0))
    np.testing.assert_array_equal(COPIES[how](stored).to_array(), stored.to_array())


def test_bytes_of_every_float_type_have_the_same_values() -> None:
    values = randoms(2, 3)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        stored = Stored(values.to(dtype), dtype=str(dtype).removeprefix("torch."))
        packed = COPIES["pickle"](stored)
        assert isinstance(packed.origin, RawTensor)
        np.testing.assert_array_equal(packed.to_array(), values.to(dtype).double().numpy())


def test_reprs_are_short(adapter: lorank.LoraAdapter) -> None:
    parts = [adapter, *adapter.modules.values(), *adapter.carried.values(), adapter.key_style]
    parts += [module.factors for module in adapter.modules.values()]
    assert all(len(repr(part)) < 300 and "\n" not in repr(part) for part in parts)
