"""Rewritten image files load in diffusers with the same update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorank

diffusers = pytest.importorskip("diffusers")

ALL = 1 - 1e-9
"""The energy that keeps all values but those that are zero up to rounding."""

UPS = ("lora_up.weight", "lora_down.weight")
LETTERS = ("lora_B.weight", "lora_A.weight")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes))


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def qwen() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=2
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )


def pipeline(kind: str, **parts: Any) -> Any:
    """Return a pipeline of these parts and nothing else."""
    names = [
        name for name in inspect.signature(getattr(diffusers, kind).__init__).parameters if name != "self"
    ]
    arguments = {name: parts.get(name) for name in names}
    if "requires_safety_checker" in arguments:
        arguments["requires_safety_checker"] = False
    return getattr(diffusers, kind)(**arguments)


def factors(
    model: Any,
    spelled: Callable[[str], str],
    selected: Callable[[str], bool],
    ends: tuple[str, str],
    alpha: float | None,
) -> dict[str, torch.Tensor]:
    """Return factors of rank 4 for linear layers, whose products have ranks from 0 to 4."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and selected(name)
    ]
    for i, (name, layer) in enumerate(layers):
        rank = i % 5
        b = torch.randn(layer.out_features, rank, generator=generator)
        tensors[f"{spelled(name)}.{ends[0]}"] = b @ torch.randn(rank, 4, generator=generator)
        tensors[f"{spelled(name)}.{ends[1]}"] = torch.randn(4, layer.in_features, generator=generator)
        if alpha is not None:
            tensors[f"{spelled(name)}.alpha"] = torch.tensor(alpha)
    return tensors


def in_wan(name: str) -> str:
    for theirs, ours in {
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        "to_": "",
        "net.0.proj": "0",
        "net.2": "2",
    }.items():
        name = name.replace(theirs, ours)
    return name


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def of_sd(alpha: float | None) -> dict[str, torch.Tensor]:
    """Write a file for a UNet and its text encoder with the key names of kohya's scripts."""
    layers = factors(unet(), flat("lora_unet_"), lambda n: ".attn" in n or ".ff." in n, UPS, alpha)
    names = [name for name, _ in text_encoder().named_modules()]
    prefix = "lora_te_" if any(name.startswith("text_model") for name in names) else "lora_te_text_model_"
    return layers | factors(text_encoder(), flat(prefix), lambda n: ".layers." in n, UPS, alpha)


def in_blocks(name: str) -> bool:
    return "blocks." in name


def of_flux(name: str) -> bool:
    # An alpha of `proj_out` applies to all names with this ending, unless it is the first of the file.
    return in_blocks(name) or name in (
        "time_text_embed.timestep_embedder.linear_1",
        "context_embedder",
        "proj_out",
    )


def of_wan_with_biases() -> dict[str, torch.Tensor]:
    tensors = factors(wan(), lambda n: f"diffusion_model.{in_wan(n)}", in_blocks, LETTERS, None)
    for key in [key for key in tensors if key.endswith(LETTERS[0])]:
        tensors[key.replace(LETTERS[0], "diff_b")] = torch.randn(tensors[key].shape[0])
    return tensors | {"diffusion_model.blocks.0.norm3.diff": torch.randn(24)}


def of_flux_with_biases(alpha: float | None) -> dict[str, torch.Tensor]:
    tensors = factors(flux(), lambda n: f"transformer.{n}", of_flux, LETTERS, alpha)
    for key in [key for key in tensors if key.endswith(LETTERS[0])]:
        tensors[key.replace("weight", "bias")] = torch.randn(tensors[key].shape[0])
    return tensors


def of_xlabs() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    shapes = {"qkv_lora1": 96, "qkv_lora2": 96, "proj_lora1": 32, "proj_lora2": 32}
    for i, (name, outputs) in enumerate(shapes.items()):
        key = f"double_blocks.0.processor.{name}"
        tensors[f"{key}.up.weight"] = torch.randn(outputs, i + 1) @ torch.randn(i + 1, 4)
        tensors[f"{key}.down.weight"] = torch.randn(4, 32)
    tensors["single_blocks.0.processor.proj_lora.up.weight"] = torch.zeros(32, 4)
    tensors["single_blocks.0.processor.proj_lora.down.weight"] = torch.randn(4, 160)
    return tensors


def transformer_case(kind: str, model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    return tensors, lambda: pipeline(kind, transformer=model())


CASES: dict[str, Callable[[], Any]] = {
    **{
        f"sd, alpha {alpha}": lambda alpha=alpha: (
            of_sd(alpha),
            lambda: pipeline("StableDiffusionPipeline", unet=unet(), text_encoder=text_encoder()),
        )
        for alpha in (2.0, None)
    },
    "sd3": lambda: transformer_case(
        "StableDiffusion3Pipeline",
        sd3,
        factors(sd3(), lambda n: f"transformer.{n}", in_blocks, LETTERS, None),
    ),
    **{
        f"flux with biases, alpha {alpha}": lambda alpha=alpha: transformer_case(
            "FluxPipeline", flux, of_flux_with_biases(alpha)
        )
        for alpha in (2.0, None)
    },
    "flux, xlabs": lambda: transformer_case("FluxPipeline", flux, of_xlabs()),
    # Diffusers before 0.42 drops alphas of these keys, so an alpha other than the rank is ambiguous.
    "qwen, alpha 4": lambda: transformer_case(
        "QwenImagePipeline", qwen, factors(qwen(), str, in_blocks, LETTERS, 4.0)
    ),
    "qwen, an adapter's name in keys": lambda: transformer_case(
        "QwenImagePipeline",
        qwen,
        factors(qwen(), str, in_blocks, ("lora_B.default.weight", "lora_A.default.weight"), None),
    ),
    "qwen, kohya": lambda: transformer_case(
        "QwenImagePipeline", qwen, factors(qwen(), flat("lora_unet_"), in_blocks, UPS, 2.0)
    ),
    "wan, alpha 2": lambda: transformer_case(
        "WanPipeline", wan, factors(wan(), lambda n: f"diffusion_model.{in_wan(n)}", in_blocks, UPS, 2.0)
    ),
    "wan with differences of biases": lambda: transformer_case("WanPipeline", wan, of_wan_with_biases()),
    "wan, kohya": lambda: transformer_case(
        "WanPipeline", wan, factors(wan(), lambda n: flat("lora_unet_")(in_wan(n)), in_blocks, UPS, 2.0)
    ),
}


def loaded(pipe: Any, path: Path) -> dict[str, tuple[torch.Tensor, Any]]:
    """Return the update of every adapted layer and the difference of its bias."""
    pipe.load_lora_weights(str(path))
    found = {}
    for part in ("unet", "transformer", "text_encoder"):
        for name, layer in getattr(getattr(pipe, part, None), "named_modules", list)():
            if hasattr(layer, "get_delta_weight"):
                (adapter,) = layer.active_adapters
                bias = getattr(layer.lora_B[adapter], "bias", None)
                added = None if bias is None else bias.detach() * layer.scaling[adapter]
                found[f"{part}.{name}"] = layer.get_delta_weight(adapter).detach(), added
    return found


@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_the_same_update(case: str, tmp_path: Path) -> None:
    tensors, make = CASES[case]()
    save_file(tensors, tmp_path / "in.safetensors", {"format": "pt"})
    expected = loaded(make(), tmp_path / "in.safetensors")
    assert len(expected) > 8
    (verdict,) = lorank.check(tmp_path / "in.safetensors", ["diffusers"])
    loses_a_norm = any(key.endswith("norm3.diff") for key in tensors)
    assert verdict.status == ("wrong" if loses_a_norm else "right"), verdict
    small = lorank.compress(tmp_path / "in.safetensors", energy=ALL, progress=False)
    assert set(small.ranks.values()) == {0, 1, 2, 3, 4}
    for profile in ("compact", "portable"):
        target = tmp_path / f"{profile}.safetensors"
        small.save(target, profile)
        got = loaded(make(), target)
        assert got.keys() <= expected.keys()
        for name, (update, added) in expected.items():
            again, added_again = got.get(name, (torch.zeros_like(update), None))
            torch.testing.assert_close(again, update, rtol=1e-4, atol=1e-4)
            if added is not None:
                torch.testing.assert_close(added_again, added, rtol=1e-4, atol=1e-4)
        assert as_by_rank(target) == pytest.approx(
            as_by_rank(tmp_path / "in.safetensors"), rel=1e-4, abs=1e-4
        )


def test_xlabs_file_of_double_blocks_alone_is_read(tmp_path: Path) -> None:
    tensors = {key: x for key, x in of_xlabs().items() if key.startswith("double_blocks.")}
    save_file(tensors, tmp_path / "a.safetensors")
    expected = loaded(pipeline("FluxPipeline", transformer=flux()), tmp_path / "a.safetensors")
    modules = lorank.LoraAdapter.load(tmp_path / "a.safetensors").modules.values()
    norms = [np.square(m.scaling * m.B @ m.A).sum() for m in modules]
    assert sum(norms) == pytest.approx(sum(x.square().sum().item() for x, _ in expected.values()), rel=1e-4)


def as_by_rank(path: Path) -> dict[str, float]:
    """Return a random projection of every update, scaled by alpha / rank, or by 1 without an alpha."""
    tensors = {key: x.double().numpy() for key, x in load_file(path).items()}
    found = {}
    for key, a in tensors.items():
        if ".lora_A" not in key and ".lora_down" not in key:
            continue
        b = tensors[key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")]
        module = key.partition(".lora_")[0]
        weights = np.random.default_rng(0).standard_normal((b.shape[0], a.shape[1]))
        found[module] = float(tensors.get(f"{module}.alpha", len(a)) / len(a) * np.sum(weights * (b @ a)))
    return {module: value for module, value in found.items() if abs(value) > 1e-3}


def test_text_encoders_of_flux_get_their_ranks_as_alphas(tmp_path: Path) -> None:
    names = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": 1, "lora_unet_final_layer_linear": 3}
    tensors = {}
    for name, rank in names.items():
        tensors |= {
            f"{name}.lora_up.weight": torch.randn(16, rank) @ torch.randn(rank, 4),
            f"{name}.lora_down.weight": torch.randn(4, 12),
            f"{name}.alpha": torch.tensor(4.0),
        }
    save_file(tensors, tmp_path / "in.safetensors")
    lorank.compress(tmp_path / "in.safetensors", energy=ALL, progress=False).save(
        tmp_path / "out.safetensors"
    )
    # Diffusers drops the alpha of the last layer.
    written = load_file(tmp_path / "out.safetensors")
    assert {name: int(written[f"{name}.alpha"]) for name in names} == names
