"""Verdicts of `check` on files with the keys of kohya and diffusers, compared with diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank.runtimes import RUNTIMES
from tests.support.command_line import run

diffusers = pytest.importorskip("diffusers")

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
QUERY, OUT, FEED, ENTRY = (
    f"{BLOCK}_attn1_to_q",
    f"{BLOCK}_attn2_to_out_0",
    f"{BLOCK}_ff_net_2",
    "down_blocks_0_attentions_0_proj_in",
)
LIVE = {
    QUERY: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    OUT: "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    FEED: "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    ENTRY: "down_blocks.0.attentions.0.proj_in",
}
SHAPES = {QUERY: (8, 8), OUT: (8, 8), FEED: (8, 32), ENTRY: (8, 8)}


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
        use_linear_projection=True,
    )


def kohya(file: Path, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Path:
    generator = np.random.default_rng(0)
    tensors = {}
    for name, rank in ranks.items():
        out, width = SHAPES[name]
        tensors[f"lora_unet_{name}.lora_down.weight"] = generator.normal(size=(rank, width))
        tensors[f"lora_unet_{name}.lora_up.weight"] = generator.normal(size=(out, rank))
        if name in alphas:
            tensors[f"lora_unet_{name}.alpha"] = np.array(alphas[name])
    save_file({key: x.astype(np.float32) for key, x in tensors.items()}, file)
    return file


def in_diffusers(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the updates that diffusers applies, by kohya's names."""
    pipeline, model = diffusers.StableDiffusionPipeline, unet()
    state, alphas = pipeline.lora_state_dict(str(file))
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, adapter_name="a")
    found = {}
    for name, path in LIVE.items():
        layer = model.get_submodule(path)
        if hasattr(layer, "scaling"):
            product = layer.lora_B["a"].weight @ layer.lora_A["a"].weight
            found[f"lora_unet_{name}"] = (layer.scaling["a"] * product).detach().numpy()
    return found


RANKS = {QUERY: 4, OUT: 2, FEED: 4, ENTRY: 2}
CASES: dict[str, tuple[Mapping[str, int], Mapping[str, float], bool]] = {
    "one rank, one alpha": (dict.fromkeys(RANKS, 4), dict.fromkeys(RANKS, 2.0), True),
    "one alpha": (RANKS, dict.fromkeys(RANKS, 2.0), True),
    "no alphas": (RANKS, {}, True),
    "alphas as ranks": (RANKS, {name: float(rank) for name, rank in RANKS.items()}, False),
    "other alphas of layers outside attention": (
        {FEED: 4, ENTRY: 2, QUERY: 4, OUT: 4},
        {FEED: 1.0, ENTRY: 3.0, QUERY: 2.0, OUT: 2.0},
        True,
    ),
    "the most frequent alpha is another": (
        {FEED: 4, ENTRY: 2, QUERY: 4},
        {FEED: 1.0, ENTRY: 1.0, QUERY: 2.0},
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    ranks, alphas, is_right = CASES[name]
    file = kohya(tmp_path / "a.safetensors", ranks, alphas)
    adapter = lorank.LoraAdapter.load(file)
    truth = {key: m.scaling * m.B.astype(float) @ m.A for key, m in adapter.modules.items()}
    applied = in_diffusers(file)
    assert set(applied) == set(truth)
    ratios = [np.vdot(applied[key], x) / np.vdot(x, x) for key, x in truth.items()]
    verdict, comfy = lorank.check(file, ["diffusers", "comfyui"])
    assert verdict.factors == pytest.approx((min(ratios), max(ratios)), rel=1e-5)
    assert verdict.status == ("right" if is_right else "wrong")
    assert comfy.status == "right"
    fixed = run("check", file, "--for", "diffusers,comfyui", "--fix", tmp_path / "b.safetensors")
    assert fixed.returncode == 0, fixed.stdout + fixed.stderr
    fixed = in_diffusers(tmp_path / "b.safetensors")
    for key, update in truth.items():
        np.testing.assert_allclose(fixed[key], update, rtol=1e-4, atol=1e-5)


def transformer_file(
    file: Path, names: Mapping[str, int], metadata: dict[str, str] | None = None, **more: Any
) -> Path:
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, rank in names.items():
        tensors[f"transformer.{name}.lora_A.weight"] = generator.normal(size=(rank, 8)).astype(np.float32)
        tensors[f"transformer.{name}.lora_B.weight"] = generator.normal(size=(8, rank)).astype(np.float32)
    save_file(tensors | more, file, metadata)
    return file


FOUR = np.array(4.0, dtype=np.float32)


def test_alphas_beside_keys_of_diffusers_are_refused_outside_flux(tmp_path: Path) -> None:
    sd3, flux = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"
    plain = transformer_file(tmp_path / "plain.safetensors", {sd3: 2})
    assert {v.status for v in lorank.check(plain, ["diffusers", "comfyui"])} == {"right"}
    alpha = transformer_file(tmp_path / "alpha.safetensors", {sd3: 2}, **{f"transformer.{sd3}.alpha": FOUR})
    (verdict,) = lorank.check(alpha, ["diffusers"])
    assert (verdict.status, "key without 'lora'" in verdict.reason) == ("refuses", True)
    pipeline = diffusers.StableDiffusion3Pipeline
    state = pipeline.lora_state_dict(str(alpha))
    assert not all("lora" in key for key in state)
    taken = transformer_file(tmp_path / "flux.safetensors", {flux: 2}, **{f"transformer.{flux}.alpha": FOUR})
    assert lorank.check(taken, ["diffusers"])[0].status == "right"


def test_settings_in_the_metadata_are_unknown_to_comfyui(tmp_path: Path) -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]}
    file = transformer_file(
        tmp_path / "a.safetensors",
        {"transformer_blocks.0.attn.to_q": 4},
        {"lora_adapter_metadata": json.dumps(settings)},
    )
    verdict, comfy = lorank.check(file, ["diffusers", "comfyui"])
    assert verdict.status == "right"
    assert (comfy.status, comfy.factors) == ("wrong", (0.5, 0.5))


def spoil(tensors: dict[str, Any]) -> None:
    tensors[f"lora_unet_{QUERY}.lora_down.weight"][0, 0] = np.nan


def magnitudes(tensors: dict[str, Any]) -> None:
    tensors[f"lora_unet_{QUERY}.dora_scale"] = np.ones((8, 1), np.float32)


@pytest.mark.parametrize(
    ("edit", "runtimes", "reason"),
    [(spoil, ("diffusers", "comfyui"), "holds NaN"), (magnitudes, ("diffusers",), "dora_scale")],
)
def test_damaged_files_of_kohya_are_wrong(
    edit: Callable[[dict[str, Any]], None], runtimes: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    file = kohya(tmp_path / "a.safetensors", {QUERY: 4}, {QUERY: 4.0})
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    for verdict in lorank.check(file, ["diffusers", "comfyui"]):
        is_wrong = verdict.runtime.lower() in runtimes
        assert verdict.status == ("wrong" if is_wrong else "right"), verdict
        assert not is_wrong or reason in verdict.reason


def test_runtimes_without_image_files_refuse_them(tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors", {QUERY: 4}, {})
    for name, verdict in zip(RUNTIMES, lorank.check(file), strict=True):
        if name not in ("diffusers", "comfyui"):
            wanted = "its own format" if name == "mlx-lm" else "reads PEFT folders only"
            assert (verdict.status, verdict.reads_format) == ("refuses", False)
            assert wanted in verdict.reason
    assert run("check", file).returncode == 0
    assert run("check", file, "--for", "peft").returncode == 1
