"""Settings that lorank writes and PEFT loads and saves again: targets, patterns and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, loaded, norm, saved, trained
from tests.support.peft_cases import PROFILES

LINEAR = ["q_proj", "v_proj", "up_proj"]


def live_layers(peft_model: Any) -> dict[str, Any]:
    return {n: x for n, x in peft_model.base_model.model.named_modules() if "default" in getattr(x, "r", {})}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("layers", [[1], 0])
def test_choice_of_layers_is_kept(layers: Any, profile: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=LINEAR, layers_to_transform=layers, layers_pattern="layers")
    adapter = lorank.LoraAdapter.load(saved(trained(tiny_models.llama(), config), tmp_path / "a"))
    adapter.save(tmp_path / "b", profile)
    peft_model = loaded(tiny_models.llama(), tmp_path / "b")
    assert set(live_layers(peft_model)) == set(adapter.modules)


@pytest.mark.parametrize("profile", PROFILES)
def test_peft_applies_and_saves_written_settings(profile: Any, tmp_path: Path) -> None:
    settings = {"r": 6, "lora_alpha": 9, "target_modules": LINEAR, "alpha_pattern": {"q_proj": 40}}
    folder = saved(trained(tiny_models.llama(), LoraConfig(**settings)), tmp_path / "a")
    small = lorank.compress(folder, avg_rank=2, progress=False)
    assert len(set(small.ranks.values())) > 2
    small.save(tmp_path / "b", profile)
    peft_model = loaded(tiny_models.llama(), tmp_path / "b")
    largest = max(small.ranks.values())
    for name, layer in live_layers(peft_model).items():
        rank = largest if profile == "portable" else small.ranks[name]
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(largest / rank if profile == "tensor-rank" else 1)
    saved(peft_model, tmp_path / "c")
    written, again = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "bc")
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "exclude_modules"):
        assert again[key] == written[key], key
    assert sorted(again["target_modules"]) == sorted(written["target_modules"])
    # The metadata of PEFT's own file do not state the padding.
    reread = dense(lorank.LoraAdapter.load(tmp_path / "c"))
    kept = {name: update for name, update in dense(small).items() if name in reread}
    assert distance(kept, reread) <= 1e-6 * norm(kept)
