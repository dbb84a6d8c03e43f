"""Image adapters with the keys of kohya's scripts and of diffusers, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from tests.support.adapter_files import dense, distance, norm
from tests.support.image_files import RNG, STYLES, write_image_adapter


@pytest.mark.parametrize("alpha", [3.0, None])
@pytest.mark.parametrize("style", STYLES)
def test_keys_and_scales_survive(style: str, alpha: float | None, tmp_path: Path) -> None:
    updates = write_image_adapter(tmp_path / "a.safetensors", style, alpha)
    adapter = lorank.LoraAdapter.load(tmp_path / "a.safetensors")
    assert distance(dense(adapter), updates) <= 1e-12 * norm(updates)
    for profile in ("compact", "portable", "tensor-rank"):
        small = lorank.compress(adapter, avg_rank=3, progress=False)
        target = tmp_path / f"{profile}.safetensors"
        small.save(target, profile)
        again = lorank.LoraAdapter.load(target)
        assert small.certificate is not None
        error = distance({name: dense(again)[name] for name in updates}, updates)
        assert error == pytest.approx(small.certificate.error, abs=1e-6 * norm(updates))
        written, before = load_file(target), load_file(tmp_path / "a.safetensors")
        assert {key for key in written if not key.endswith(".alpha")} == {
            key for key in before if not key.endswith(".alpha")
        }
        with safe_open(target, "np") as file:
            assert file.metadata()["ss_base_model_version"] == "sdxl"
            assert "ss_network_dim" not in file.metadata()


def test_padding_is_removed_with_its_metadata(tmp_path: Path) -> None:
    write_image_adapter(tmp_path / "a.safetensors", "kohya")
    small = lorank.compress(tmp_path / "a.safetensors", rank_ratio=0.5, progress=False)
    assert len(set(small.ranks.values())) > 1
    small.save(tmp_path / "b.safetensors", "portable")
    again = lorank.LoraAdapter.load(tmp_path / "b.safetensors")
    assert again.ranks == small.ranks
    again.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "np") as file:
        assert "lorank.ranks" not in file.metadata()
    merged = lorank.merge([again, small], rank_ratio=1.0, progress=False)
    assert merged.ranks == small.ranks


def test_convolutions_with_and_without_mid_kernels_are_read(tmp_path: Path) -> None:
    out, rank, fan_in = 10, 4, 6
    up = RNG.standard_normal((out, rank, 1, 1)).astype(np.float32)
    down = RNG.standard_normal((rank, fan_in, 3, 3)).astype(np.float32)
    mid = RNG.standard_normal((rank, rank, 3, 3)).astype(np.float32)
    narrow = RNG.standard_normal((rank, fan_in, 1, 1)).astype(np.float32)
    tensors = {
        "lora_unet_conv.lora_up.weight": up,
        "lora_unet_conv.lora_down.weight": down,
        "lora_unet_conv.alpha": np.array(2.0, np.float32),
        "lora_unet_cp.lora_up.weight": up,
        "lora_unet_cp.lora_mid.weight": mid,
        "lora_unet_cp.lora_down.weight": narrow,
        "lora_unet_one.lora_up.weight": up,
        "lora_unet_one.lora_down.weight": narrow,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    flat = up.reshape(out, rank).astype(np.float64)
    expected = {
        "lora_unet_conv": 0.5 * flat @ down.reshape(rank, -1),
        # A convolution applies down, then mid, then up.
        "lora_unet_cp": np.einsum("or,rskl,si->oikl", flat, mid, narrow[:, :, 0, 0]).reshape(out, -1),
        "lora_unet_one": flat @ narrow.reshape(rank, -1),
    }
    adapter = lorank.LoraAdapter.load(tmp_path / "a.safetensors")
    assert any("mid kernels" in note for note in adapter.notes)
    assert {name: module.kind for name, module in adapter.modules.items()} == dict.fromkeys(expected, "conv")
    assert distance(dense(adapter), expected) <= 1e-6 * norm(expected)
    whole = lorank.compress(adapter, rank_ratio=1.0, progress=False)
    whole.save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert not any("mid" in key for key in written)
    assert written["lora_unet_cp.lora_down.weight"].shape[1:] == (fan_in, 3, 3)
    assert written["lora_unet_one.lora_down.weight"].shape[1:] == (fan_in, 1, 1)
    assert written["lora_unet_conv.lora_up.weight"].shape[2:] == (1, 1)
    assert distance(dense(lorank.LoraAdapter.load(tmp_path / "b.safetensors")), expected) <= 1e-6 * norm(
        expected
    )


def test_image_adapters_are_merged(tmp_path: Path) -> None:
    first = write_image_adapter(tmp_path / "a.safetensors", "kohya", 3.0)
    second = write_image_adapter(tmp_path / "b.safetensors", "kohya", None)
    loaded = [lorank.LoraAdapter.load(tmp_path / f"{name}.safetensors") for name in "ab"]
    merged = lorank.merge(loaded, [0.5, -2.0], rank_ratio=1.0, progress=False)
    merged.save(tmp_path / "c.safetensors")
    target = {name: 0.5 * first[name] - 2.0 * second[name] for name in first}
    assert distance(dense(lorank.LoraAdapter.load(tmp_path / "c.safetensors")), target) <= 1e-6 * norm(target)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_unet_a.oft_blocks", "OFT"),
        ("lora_unet_a.on_input", "IA3"),
        ("lora_unet_a.diff", "a full difference"),
        ("lora_unet_a.a1.weight", "GLoRA"),
    ],
)
def test_other_methods_raise_with_their_name(key: str, method: str, tmp_path: Path) -> None:
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(lorank.FormatError, match=rf"'{key}' belongs to {method}"):
        lorank.LoraAdapter.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m.lora_up.weight": None}, "has no lora_up"),
        ({"m.lora_down.weight": np.ones((5, 4), np.float32)}, "do not fit each other"),
        ({"m.lora_up.weight": np.ones(3, np.float32)}, "are not matrices"),
        ({"m.lora_mid.weight": np.ones((2, 2), np.float32)}, "do not fit each other"),
    ],
)
def test_damaged_files_raise(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tensors = {
        "m.lora_up.weight": np.ones((6, 3), np.float32),
        "m.lora_down.weight": np.ones((3, 4), np.float32),
    }
    tensors = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(lorank.FormatError, match=reason):
        lorank.LoraAdapter.load(tmp_path / "a.safetensors")


def test_files_without_factors_raise(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(lorank.FormatError, match="holds the weights of a model, not an adapter"):
        lorank.LoraAdapter.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        lorank.LoraAdapter.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lorank.FormatError, match="holds neither"):
        lorank.LoraAdapter.load(tmp_path / "empty")
