"""AdaLoRA adapters with masked ranks keep PEFT's scale at any remaining rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import configured, edited, loaded, saved
from tests.support.outputs import outputs

INIT_RANK = 6
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def masked(folder: Path, kept: dict[str, int], **settings: Any) -> Path:
    """Save an AdaLoRA adapter with random values and the given number of ranks for modules in `kept`."""
    config = AdaLoraConfig(
        target_modules=["q_proj", "up_proj"], init_r=INIT_RANK, total_step=10, **{"lora_alpha": 5, **settings}
    )
    model = get_peft_model(copy.deepcopy(tiny_models.llama()), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    # The state of PEFT's rank allocator at the end of training.
    model.peft_config["default"].rank_pattern = {
        f"{module}.lora_E": [i < rank for i in range(INIT_RANK)] for module, rank in kept.items()
    }
    return saved(model.eval(), folder)


@pytest.mark.parametrize("lora_alpha", [5, -1])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_masked_modules_keep_the_scale_of_their_initial_rank(
    rank: int, lora_alpha: int, tmp_path: Path
) -> None:
    folder = masked(tmp_path / "a", {Q: rank, UP: 2}, lora_alpha=lora_alpha)
    adapter = lorank.LoraAdapter.load(folder)
    assert (adapter.ranks[Q], adapter.ranks[UP]) == (rank, 2)
    expected = outputs(loaded(tiny_models.llama(), folder))
    for profile in ("compact", "portable", "tensor-rank"):
        whole = lorank.compress(adapter, rank_ratio=1.0, progress=False)
        whole.save(tmp_path / profile, profile)
        got = outputs(loaded(tiny_models.llama(), tmp_path / profile))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("factor", "shape", "reason"),
    [
        ("lora_B", (32, 9), "do not fit each other"),
        ("lora_E", (9, 1), "do not fit each other"),
        ("lora_E", (6,), "do not fit each other"),
        ("lora_A", (6, 0), "are not matrices"),
    ],
)
def test_unfitting_factors_raise(factor: str, shape: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    key = f"base_model.model.{Q}.{factor}"
    folder = edited(masked(tmp_path / "a", {}), lambda t: t.update({key: np.ones(shape, np.float32)}))
    with pytest.raises(lorank.FormatError, match=rf"{Q}.*{reason}"):
        lorank.LoraAdapter.load(folder)


def test_non_numeric_initial_rank_raises(tmp_path: Path) -> None:
    folder = masked(tmp_path / "a", {})
    configured(folder, init_r="6")
    with pytest.raises(lorank.FormatError, match="init_r is '6'"):
        lorank.LoraAdapter.load(folder)
