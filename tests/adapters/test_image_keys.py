"""Keys of image files: alphas, biases, magnitudes, adapter names, and tensors beside factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from tests.support.adapter_files import dense, distance, norm

RNG = np.random.default_rng(0)
OUT, IN, RANK = 12, 10, 4

FACTORS = {
    "kohya": ("lora_unet_x", "lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight"),
    "diffusers": ("unet.x", "unet.x.lora.up.weight", "unet.x.lora.down.weight"),
    "processor": ("unet.p.to_q", "unet.p.to_q_lora.up.weight", "unet.p.to_q_lora.down.weight"),
    "text encoder": ("te.x", "te.x.lora_linear_layer.up.weight", "te.x.lora_linear_layer.down.weight"),
    "peft": ("transformer.x", "transformer.x.lora_B.weight", "transformer.x.lora_A.weight"),
    "diffsynth": ("blocks.0.x", "blocks.0.x.lora_B.default.weight", "blocks.0.x.lora_A.default.weight"),
    "up with a name": ("x.y", "x.y.lora_up.mine.weight", "x.y.lora_down.mine.weight"),
    "xlabs": (
        "double_blocks.0.processor.qkv_lora1",
        "double_blocks.0.processor.qkv_lora1.up.weight",
        "double_blocks.0.processor.qkv_lora1.down.weight",
    ),
    "mochi": ("blocks.0.x", "blocks.0.x.lora_B", "blocks.0.x.lora_A"),
}


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def pair(up: str, down: str) -> dict[str, Any]:
    decay = np.geomspace(1, 0.05, RANK, dtype=np.float32)
    return {up: floats(OUT, RANK) * decay, down: floats(RANK, IN)}


def loaded(
    path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> lorank.LoraAdapter:
    save_file(dict(tensors), path, metadata)
    return lorank.LoraAdapter.load(path)


@pytest.mark.parametrize("style", FACTORS)
def test_spellings_of_factors_are_read_and_kept(style: str, tmp_path: Path) -> None:
    name, up, down = FACTORS[style]
    tensors = pair(up, down)
    usual = pair("y.lora_B.weight", "y.lora_A.weight")
    adapter = loaded(tmp_path / "a.safetensors", tensors | usual)
    expected = {
        name: tensors[up].astype(np.float64) @ tensors[down],
        "y": usual["y.lora_B.weight"].astype(np.float64) @ usual["y.lora_A.weight"],
    }
    assert distance(dense(adapter), expected) <= 1e-12 * norm(expected)
    assert not adapter.notes
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    small.save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == (tensors | usual).keys()
    assert small.certificate is not None
    got = {
        name: written[up].astype(np.float64) @ written[down],
        "y": written["y.lora_B.weight"].astype(np.float64) @ written["y.lora_A.weight"],
    }
    assert distance(got, expected) == pytest.approx(small.certificate.error, rel=1e-5)


@pytest.mark.parametrize(
    ("style", "alpha"),
    [
        ("kohya", "lora_unet_x.alpha"),
        ("kohya", "lora_unet_x.lora_alpha"),
        ("kohya", "lora_unet_x.network_alpha"),
        ("kohya", "unet.x.alpha"),
        ("diffusers", "unet.x.alpha"),
        ("diffusers", "unet.x.lora.alpha"),
        ("diffusers", "lora_unet_x.alpha"),
        ("processor", "unet.p.to_q.alpha"),
        ("processor", "unet.p.to_q_lora.alpha"),
        ("processor", "unet.p.to_q_lora.down.weight.alpha"),
        ("text encoder", "te.x.lora_linear_layer.alpha"),
        ("peft", "transformer.x.lora_A.alpha"),
        ("peft", "transformer.x.lora_alpha"),
        ("peft", "transformer.x.alpha.default"),
        ("diffsynth", "blocks.0.x.lora_alpha.default"),
        ("mochi", "blocks.0.x.alpha"),
    ],
)
def test_alphas_under_any_name_are_applied(style: str, alpha: str, tmp_path: Path) -> None:
    name, up, down = FACTORS[style]
    tensors = pair(up, down)
    adapter = loaded(tmp_path / "a.safetensors", tensors | {alpha: np.array(3.0, np.float32)})
    assert adapter.modules[name].scaling == 3 / RANK
    assert [note for note in adapter.notes if alpha in note] or alpha == f"{name}.alpha"
    lorank.compress(adapter, avg_rank=2, progress=False).save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    # The factors contain the scale: names that not all programs read are not written.
    scale = written.get(f"{name}.alpha", 2.0) / 2
    assert sum("alpha" in key for key in written) == (alpha == f"{name}.alpha")
    exact = dense(lorank.compress(adapter, avg_rank=2, progress=False))[name]
    assert np.allclose(scale * written[up].astype(np.float64) @ written[down], exact, atol=1e-5)


def test_alpha_without_factors_is_kept_and_noted(tmp_path: Path) -> None:
    _, up, down = FACTORS["kohya"]
    alone = {"lora_unet_gone.alpha": np.array(3.0, np.float32)}
    adapter = loaded(tmp_path / "a.safetensors", pair(up, down) | alone)
    assert any(
        "1 alphas were not applied" in note and "lora_unet_gone.alpha" in note for note in adapter.notes
    )
    adapter.save(tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors")["lora_unet_gone.alpha"] == 3


def test_two_alphas_of_one_module_raise(tmp_path: Path) -> None:
    _, up, down = FACTORS["kohya"]
    twice = {f"lora_unet_x.{word}": np.array(3.0, np.float32) for word in ("alpha", "network_alpha")}
    with pytest.raises(lorank.FormatError, match=r"x\.network_alpha' have the same meaning"):
        loaded(tmp_path / "a.safetensors", pair(up, down) | twice)


@pytest.mark.parametrize(("value", "is_told"), [("1.0", True), ("4", False), ("4.0", False), ("none", True)])
def test_alpha_in_the_metadata_only_is_noted(value: str, is_told: bool, tmp_path: Path) -> None:
    _, up, down = FACTORS["kohya"]
    adapter = loaded(tmp_path / "a.safetensors", pair(up, down), {"ss_network_alpha": value})
    assert adapter.modules["lora_unet_x"].scaling == 1
    assert any(f"the metadata give ss_network_alpha = {value}" in note for note in adapter.notes) == is_told


def test_two_adapters_in_one_file_raise(tmp_path: Path) -> None:
    tensors = pair("x.lora_B.first.weight", "x.lora_A.first.weight")
    tensors |= pair("x.lora_B.second.weight", "x.lora_A.second.weight")
    with pytest.raises(lorank.FormatError, match="'x': has tensors of two adapters, 'first' and 'second'"):
        loaded(tmp_path / "a.safetensors", tensors)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"x.lora_B.bias": floats(OUT + 1)}, r"a bias of shape \[13\] does not fit 12 outputs"),
        ({"x.lora_A.bias": floats(RANK)}, "'x.lora_A.bias': a bias between the factors"),
        ({"y.lora_B.bias": floats(OUT)}, "'y.lora_B.bias': its module has no factors"),
    ],
)
def test_unfitting_biases_raise(more: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(lorank.FormatError, match=reason):
        loaded(tmp_path / "a.safetensors", pair("x.lora_B.weight", "x.lora_A.weight") | more)


def outputs(path: Path, name: str, up: str, down: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the added outputs of a module in programs that scale factors and bias by alpha / rank."""
    tensors = {key: value.astype(np.float64) for key, value in load_file(path).items()}
    a, b = tensors[down], tensors[up]
    bias = tensors[up.removesuffix(".weight") + ".bias"]
    result: np.ndarray[Any, Any] = (b @ (a @ x) + bias) * tensors.get(f"{name}.alpha", len(a)) / len(a)
    return result


@pytest.mark.parametrize("profile", ["compact", "portable", "tensor-rank"])
@pytest.mark.parametrize("style", FACTORS)
def test_biases_are_scaled_as_factors_are(style: str, profile: Any, tmp_path: Path) -> None:
    name, up, down = FACTORS[style]
    other = "lora_unet_up_blocks_0_strong"
    tensors = pair(up, down) | pair(f"{other}.lora_up.weight", f"{other}.lora_down.weight")
    tensors[up.removesuffix(".weight") + ".bias"] = floats(OUT)
    tensors |= {f"{n}.alpha": np.array(7.0, np.float32) for n in (name, other)}
    x = RNG.standard_normal(IN)
    path = tmp_path / "a.safetensors"
    adapter = loaded(path, tensors)
    expected = outputs(path, name, up, down, x)
    lorank.compress(adapter, energy=1.0, progress=False).save(tmp_path / "b.safetensors", profile)
    assert np.allclose(outputs(tmp_path / "b.safetensors", name, up, down, x), expected, rtol=1e-4, atol=1e-4)
    # A module without rank keeps only its bias.
    weak = loaded(path, tensors | {down: tensors[down] * np.float32(1e-6)})
    small = lorank.compress(weak, energy=1 - 1e-6, progress=False)
    assert small.ranks[name] == 0
    small.save(tmp_path / "c.safetensors", profile)
    bias = 7 / RANK * tensors[up.removesuffix(".weight") + ".bias"]
    assert np.allclose(outputs(tmp_path / "c.safetensors", name, up, down, x), bias, rtol=1e-4, atol=1e-4)
    merged = lorank.merge([adapter, small], [0.5, -2.0], rank_ratio=1.0, progress=False)
    merged.save(tmp_path / "m.safetensors", profile)
    got = outputs(tmp_path / "m.safetensors", name, up, down, x)
    assert np.allclose(got, 0.5 * expected - 2.0 * bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ending",
    [
        "dora_scale",
        "lora.dora_scale",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
        "lora_magnitude_vector.default",
        "magnitude",
    ],
)
def test_magnitudes_under_any_name_are_read(ending: str, tmp_path: Path) -> None:
    strong = pair("x.lora_B.weight", "x.lora_A.weight")
    weak = pair("y.lora_B.weight", "y.lora_A.weight")
    weak["y.lora_B.weight"] *= np.float32(1e-4)
    key = f"y.{ending}"
    adapter = loaded(tmp_path / "a.safetensors", strong | weak | {key: floats(OUT)})
    assert any("DoRA: 1 magnitude vectors" in note for note in adapter.notes)
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    assert small.ranks["y"] == 0
    small.save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert not written["y.lora_B.weight"].any(), "the layer is kept for its magnitude"
    assert key in written
    with pytest.raises(ValueError, match="DoRA magnitudes do not add up"):
        lorank.merge([adapter, adapter], progress=False, rank_ratio=1.0)


def test_module_named_magnitude_is_not_a_magnitude(tmp_path: Path) -> None:
    plain = pair("x.lora_B.weight", "x.lora_A.weight")
    adapter = loaded(tmp_path / "a.safetensors", plain | {"head.magnitude.weight": floats(3, 3)})
    assert list(adapter.notes) == ["1 tensors that are not factors are kept as they are"]


def test_full_differences_are_kept_and_summed(tmp_path: Path) -> None:
    prefix = "diffusion_model.blocks.0"
    parts = []
    for name, kind in (("a", np.float32), ("b", np.float32)):
        tensors = pair(f"{prefix}.q.lora_B.weight", f"{prefix}.q.lora_A.weight")
        tensors |= {f"{prefix}.q.diff_b": floats(OUT), f"{prefix}.norm.diff": floats(OUT).astype(kind)}
        tensors |= {f"{prefix}.q.alpha": np.array(2.0, np.float32), f"{prefix}.{name}.diff": floats(3, 4)}
        tensors[f"{prefix}.norm.set_weight"] = floats(OUT)
        parts.append(tensors)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    small = lorank.compress(tmp_path / "a.safetensors", avg_rank=2, progress=False)
    assert any("the file also holds 3 full differences" in note for note in small.notes)
    small.save(tmp_path / "c.safetensors")
    written = load_file(tmp_path / "c.safetensors")
    for key, value in parts[0].items():
        assert "lora" in key or key.endswith("alpha") or np.array_equal(written[key], value)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merged = lorank.merge(paths, [0.5, -2.0], rank_ratio=1.0, progress=False)
    merged.save(tmp_path / "m.safetensors")
    written = load_file(tmp_path / "m.safetensors")
    first, second = parts
    for key in (f"{prefix}.q.diff_b", f"{prefix}.norm.diff"):
        assert np.allclose(written[key], 0.5 * first[key] - 2.0 * second[key], atol=1e-6)
    assert np.allclose(written[f"{prefix}.a.diff"], 0.5 * first[f"{prefix}.a.diff"], atol=1e-6)
    assert np.allclose(written[f"{prefix}.b.diff"], -2.0 * second[f"{prefix}.b.diff"], atol=1e-6)
    # A replaced weight is not a difference.
    assert np.array_equal(written[f"{prefix}.norm.set_weight"], first[f"{prefix}.norm.set_weight"])
    assert "4 full differences (.diff, .diff_b) were added up" in merged.notes


def test_differences_keep_their_type_and_need_one_shape(tmp_path: Path) -> None:
    factors = pair("x.lora_B.weight", "x.lora_A.weight")
    narrow = floats(OUT).astype(ml_dtypes.bfloat16)
    save_file(factors | {"n.diff": narrow}, tmp_path / "a.safetensors")
    save_file(factors | {"n.diff": floats(OUT + 1)}, tmp_path / "b.safetensors")
    twice = [tmp_path / "a.safetensors"] * 2
    lorank.merge(twice, [1.0, 1.0], rank_ratio=1.0, progress=False).save(tmp_path / "m.safetensors")
    total = load_file(tmp_path / "m.safetensors")["n.diff"]
    assert total.dtype == narrow.dtype
    assert np.array_equal(total.astype(np.float32), 2 * narrow.astype(np.float32))
    with pytest.raises(
        ValueError, match=r"'n.diff' has shape \[12\] in .*a.safetensors and \[13\] in .*b.safe"
    ):
        lorank.merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], progress=False, rank_ratio=1.0)


def test_metadata_about_old_bytes_and_ranks_are_dropped(tmp_path: Path) -> None:
    stale = {
        "sshs_model_hash": "a",
        "sshs_legacy_hash": "b",
        "modelspec.hash_sha256": "c",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "alpha": "4",
    }
    kept = {"modelspec.title": "t", "ss_sd_model_hash": "d", "ss_tag_frequency": "{}"}
    adapter = loaded(tmp_path / "a.safetensors", pair("x.lora_up.weight", "x.lora_down.weight"), stale | kept)
    adapter.save(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        metadata = file.metadata()
    assert not stale.keys() & metadata.keys()
    assert kept.items() <= metadata.items()


def test_tensors_of_other_kinds_are_kept(tmp_path: Path) -> None:
    others = {"bundle_emb.word.string_to_param": floats(2, 5), "text_model.position": np.arange(4)}
    adapter = loaded(tmp_path / "a.safetensors", pair("x.lora_up.weight", "x.lora_down.weight") | others)
    lorank.compress(adapter, avg_rank=2, progress=False).save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert all(np.array_equal(written[key], value) for key, value in others.items())


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_blocks_0_self_attn_q",
        "double_blocks.0.img_attn.qkv",
        "diffusion_model.layers.0.attention.qkv",
    ],
)
def test_blocks_that_diffusers_reads_together_stay_complete(name: str, tmp_path: Path) -> None:
    strong = pair(f"{name}.lora_up.weight", f"{name}.lora_down.weight")
    weak = pair("other.lora_up.weight", "other.lora_down.weight")
    weak["other.lora_up.weight"] *= np.float32(1e-6)
    save_file(strong | weak, tmp_path / "a.safetensors")
    small = lorank.compress(tmp_path / "a.safetensors", energy=1 - 1e-9, progress=False)
    assert small.ranks["other"] == 0
    small.save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert written["other.lora_up.weight"].shape == (OUT, 1)
    assert not written["other.lora_up.weight"].any()
    assert lorank.LoraAdapter.load(tmp_path / "b.safetensors").ranks == small.ranks
