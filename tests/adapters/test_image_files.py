"""Files of image adapters: alphas, settings in the metadata, certificates, cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from lorank.adapters.writing import write_adapter
from tests.support.adapter_files import dense, distance, norm
from tests.support.image_files import write_image_adapter

RNG = np.random.default_rng(0)
SIZES = {"to_q": (24, 16), "to_k": (12, 16)}
METADATA = "lora_adapter_metadata"


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        found: dict[str, str] = file.metadata()
    return found


def diffusers_file(path: Path, settings: dict[str, Any], rank: int = 6, **more: Any) -> dict[str, Any]:
    """Write a file as saved by diffusers, for modules of two parts without alphas; return the products."""
    tensors, products = {}, {}
    for part in ("transformer", "text_encoder"):
        for name, (out, fan_in) in SIZES.items():
            b = RNG.standard_normal((out, rank)) * np.geomspace(1, 0.05, rank)
            a = RNG.standard_normal((rank, fan_in))
            module = f"{part}.blocks.0.{name}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            products[module] = b @ a
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    save_file(tensors | more, path, {"format": "pt", METADATA: json.dumps(settings)})
    return products


SETTINGS = {
    "transformer.r": 6,
    "transformer.lora_alpha": 12,
    "transformer.alpha_pattern": {"to_k": 3},
    "transformer.target_modules": ["to_q", "to_k"],
    "transformer.lora_dropout": 0.25,
    "text_encoder.r": 6,
    "text_encoder.lora_alpha": 6,
    "text_encoder.use_rslora": True,
}
SCALES = {
    "transformer.blocks.0.to_q": 2.0,
    "transformer.blocks.0.to_k": 0.5,
    "text_encoder.blocks.0.to_q": 6**0.5,
    "text_encoder.blocks.0.to_k": 6**0.5,
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (out, fan_in) in SIZES.items():
            setattr(self, name, torch.nn.Linear(fan_in, out, bias=False))


def as_diffusers_loads(path: Path, part: str) -> dict[str, Any]:
    """Return the updates of one part of a pipeline by loading its settings and tensors in PEFT."""
    content = json.loads(header(path)[METADATA])
    settings = {key.removeprefix(f"{part}."): x for key, x in content.items() if key.startswith(f"{part}.")}
    state = {
        key.removeprefix(f"{part}."): torch.from_numpy(x)
        for key, x in load_file(path).items()
        if key.startswith(f"{part}.")
    }
    assert not any(key.endswith(".alpha") for key in state), "diffusers takes alphas or settings, not both"
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block()])
    inject_adapter_in_model(LoraConfig(**settings), model)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    return {
        f"{part}.{name}": layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_settings_of_diffusers_are_read_and_written_again(tmp_path: Path) -> None:
    products = diffusers_file(tmp_path / "a.safetensors", SETTINGS)
    adapter = lorank.LoraAdapter.load(tmp_path / "a.safetensors")
    assert {name: m.scaling for name, m in adapter.modules.items()} == pytest.approx(SCALES)
    updates = {name: SCALES[name] * x for name, x in products.items()}
    theirs = as_diffusers_loads(tmp_path / "a.safetensors", "transformer")
    assert distance(theirs, {n: updates[n] for n in theirs}) <= 1e-6 * norm(updates)
    small = lorank.compress(adapter, avg_rank=3, progress=False)
    assert len(set(small.ranks.values())) > 1
    for profile in ("compact", "portable", "tensor-rank"):
        target = tmp_path / f"{profile}.safetensors"
        small.save(target, profile)
        for part in ("transformer", "text_encoder"):
            loaded = as_diffusers_loads(target, part)
            ours = {name: update for name, update in dense(small).items() if name in loaded}
            assert distance(loaded, ours) <= 1e-6 * norm(updates)
        assert json.loads(header(target)[METADATA])["transformer.lora_dropout"] == 0.25
        assert distance(dense(lorank.LoraAdapter.load(target)), dense(small)) <= 1e-6 * norm(updates)
    merged = lorank.merge([small, adapter], [0.5, 2.0], rank_ratio=1.0, progress=False)
    merged.save(tmp_path / "m.safetensors")
    again = dense(lorank.LoraAdapter.load(tmp_path / "m.safetensors"))
    target_sum = {name: 0.5 * dense(small)[name] + 2.0 * updates[name] for name in updates}
    assert distance(again, target_sum) <= 1e-6 * norm(target_sum)


def test_alpha_tensors_take_precedence_over_settings(tmp_path: Path) -> None:
    alpha = {"transformer.blocks.0.to_q.alpha": np.array(3.0, np.float32)}
    diffusers_file(tmp_path / "a.safetensors", SETTINGS, **alpha)
    modules = lorank.LoraAdapter.load(tmp_path / "a.safetensors").modules
    assert modules["transformer.blocks.0.to_q"].scaling == 0.5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, not settings"),
        ('{"transformer.r": "6"}', "r is '6'"),
        ('{"transformer.r": 5, "text_encoder.r": 6}', "has rank 6, but the settings in the metadata state 5"),
        ('{"transformer.r": 6, "transformer.init_lora_weights": "pissa"}', "changes the base model"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_settings_raise(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    diffusers_file(path, SETTINGS)
    save_file(load_file(path), path, {METADATA: text})
    with pytest.raises(lorank.FormatError, match=reason) as error:
        lorank.LoraAdapter.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float64, np.float16])
def test_alphas_of_any_number_type_are_read(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_image_adapter(path, "kohya")
    tensors = load_file(path)
    alphas = {key: np.array(3, dtype) for key in tensors if key.endswith(".alpha")}
    assert len(alphas) == 2
    save_file(tensors | alphas, path)
    scalings = sorted(module.scaling for module in lorank.LoraAdapter.load(path).modules.values())
    assert scalings == pytest.approx([3 / 6, 3 / 4])
    save_file(tensors | dict.fromkeys(alphas, np.ones(2, dtype)), path)
    with pytest.raises(lorank.FormatError, match=r"alpha' of shape \[2\] is not one number"):
        lorank.LoraAdapter.load(path)


def test_ranks_beyond_the_precision_of_alphas_are_kept(tmp_path: Path) -> None:
    tensors = {
        "m.lora_up.weight": RNG.standard_normal((400, 301)).astype(ml_dtypes.bfloat16),
        "m.lora_down.weight": RNG.standard_normal((301, 350)).astype(ml_dtypes.bfloat16),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lorank.compress(tmp_path / "a.safetensors", rank_ratio=1.0, progress=False).save(
        tmp_path / "b.safetensors"
    )
    again = lorank.LoraAdapter.load(tmp_path / "b.safetensors").modules["m"]
    assert (again.rank, again.dtype, again.scaling) == (301, "bfloat16", 1.0)


def test_names_resembling_other_methods_are_read(tmp_path: Path) -> None:
    names = ("unet.model.diffusion_model.soft_gate", "unet.model.diffusion_model.b1")
    tensors = {
        f"{name}.{key}": np.ones(shape, np.float32)
        for name in names
        for key, shape in {
            "lora_up.weight": (6, 3),
            "lora_down.weight": (3, 4),
            "dora_scale": (6, 1),
        }.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = lorank.LoraAdapter.load(tmp_path / "a.safetensors")
    assert set(adapter.modules) == set(names)
    assert [note for note in adapter.notes if "DoRA: 2 magnitude vectors" in note]
    assert not any("not factors" in note for note in adapter.notes)


def test_duplicate_factors_raise(tmp_path: Path) -> None:
    tensors = {
        "m.lora_up.weight": np.ones((6, 3), np.float32),
        "m.lora_B.weight": np.ones((6, 3), np.float32),
        "m.lora_down.weight": np.ones((3, 4), np.float32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(lorank.FormatError, match="have the same meaning"):
        lorank.LoraAdapter.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_certificates_state_the_rounding_error(profile: Any, dtype: Any, tmp_path: Path) -> None:
    write_image_adapter(tmp_path / "a.safetensors", "kohya")
    small = lorank.compress(tmp_path / "a.safetensors", avg_rank=3, progress=False)
    assert small.certificate is not None
    for target in (tmp_path / "b.safetensors", tmp_path / "folder"):
        written = write_adapter(small, target, profile, dtype, overwrite=False)
        again = lorank.LoraAdapter.load(target)
        assert again.certificate == written.certificate
        assert again.certificate is not None
        assert again.certificate.modules == small.certificate.modules
        added = distance(dense(small), dense(again))
        if dtype == "float32":
            assert again.certificate.rounding_error is None
        else:
            assert again.certificate.rounding_error == pytest.approx(added, rel=1e-5)
            assert added > 0
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "energy retained" in card
    assert "kohya's scripts or diffusers" in card
    assert "peft" not in card.casefold()
    assert json.loads((tmp_path / "folder" / "lorank.json").read_text())["error"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "folder"]


def test_unfitting_certificate_in_a_file_is_ignored(tmp_path: Path) -> None:
    write_image_adapter(tmp_path / "a.safetensors", "kohya")
    path = tmp_path / "b.safetensors"
    lorank.compress(tmp_path / "a.safetensors", avg_rank=3, progress=False).save(path)
    save_file(load_file(path), path, {**header(path), "lorank.certificate": "{"})
    adapter = lorank.LoraAdapter.load(path)
    assert adapter.certificate is None
    assert any("lorank.certificate was ignored, because it is damaged" in note for note in adapter.notes)
    # Overwriting a file removes its earlier certificate.
    lorank.LoraAdapter.load(tmp_path / "a.safetensors").save(path, overwrite=True)
    assert "lorank.certificate" not in header(path)
