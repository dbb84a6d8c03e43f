"""Base models, adapters and PEFT's merged models, in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch

import lorank
from lorank.baking.bake import Baked
from tests.support.adapter_files import trained


def saved_pair(model: Any, config: Any, folder: Path, **options: Any) -> tuple[Path, Path, Any]:
    """Save a model and a trained adapter; return both folders, and the live model with the adapter."""
    model.save_pretrained(folder / "base", **options)
    adapted = trained(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ("lora_" not in name or "magnitude" in name):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = parameter.data * (1 + 0.1 * noise) + 0.01 * noise.abs()
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", adapted


def baked_beside(base: Path, adapter: Path, **options: Any) -> Baked:
    """Bake an adapter into the folder `baked` beside it."""
    return lorank.bake(base, adapter, adapter.parent / "baked", progress=False, **options)


def assert_equal_models(found: Any, expected: Any, *, tolerance: float = 2e-6) -> None:
    """Assert that two models have the same parameters up to float32 rounding."""
    own, other = found.state_dict(), expected.state_dict()
    assert own.keys() == other.keys()
    for name, value in own.items():
        scale = max(1.0, other[name].abs().max().item()) if value.is_floating_point() else 1.0
        difference = (value.double() - other[name].double()).abs().max().item() if value.numel() else 0.0
        assert value.shape == other[name].shape
        assert difference <= tolerance * scale, (name, difference)


def merged(adapted: Any) -> Any:
    """Return PEFT's merged model."""
    assert isinstance(adapted, peft.PeftModel)
    return adapted.merge_and_unload()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs for the forward pass of a text or image model."""
    generator = torch.Generator().manual_seed(3)
    name = model.main_input_name
    if name == "pixel_values":
        return {name: torch.randn(1, 3, 16, 16, generator=generator)}
    found = {name: torch.randint(2, 60, (2, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(2, 60, (2, 5), generator=generator)
    return found


def logits(model: Any) -> torch.Tensor:
    """Return the outputs of a model for fixed inputs."""
    with torch.no_grad():
        return model.eval()(**inputs(model))[0]  # type: ignore[no-any-return]
