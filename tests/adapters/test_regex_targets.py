"""Written targets select exactly the adapted modules in PEFT, also where other names end with theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorank
from lorank.adapters.profiles import PROFILES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(8, 8)
        self.proj_in = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj_out(torch.tanh(self.proj_in(x)))


class Nested(nn.Module):
    """A model in which names of modules are ends of other names, inside and outside blocks."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.inner = Nested(depth - 1) if depth else nn.Identity()
        self.proj_out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.proj_out(self.inner(x))


HOW: list[dict[str, Any]] = [
    {"target_modules": "proj_out"},
    {"target_modules": "blocks.1.proj_out"},
    {"target_modules": r"blocks\.\d+\.proj_(in|out)"},
    {"target_modules": r"(?i)INNER\.(blocks\.[02]\.)?proj_out"},
    {"target_modules": r".*\.0\.proj_out|proj_out"},
    {"target_modules": ["proj_out"], "exclude_modules": r"(.*\.)?blocks\..*"},
    {"target_modules": ["proj_out", "proj_in"], "exclude_modules": ["inner.proj_out", "0.proj_in"]},
    {"target_modules": ["proj_out"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    {"target_modules": ["proj_in"], "layers_to_transform": 0},
    {"target_modules": ["proj_out"]},
    {"target_modules": "all-linear"},
]


def net() -> Nested:
    torch.manual_seed(0)
    return Nested().eval()


def adapted(model: Any) -> dict[str, int]:
    """Return the ranks of the layers that PEFT adapts."""
    layers = model.base_model.model.named_modules()
    return {name: layer.r["default"] for name, layer in layers if hasattr(layer, "lora_A")}


def trained(how: dict[str, Any], silent: str = "") -> Any:
    """Return a model with random factors, which are zero for modules whose name matches."""
    model = get_peft_model(net(), LoraConfig(r=4, lora_alpha=6, **how)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not (silent and silent in name):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def assert_same(folder: Path, model: Any, left_out: str = "") -> None:
    """Compare the adapted modules and the outputs."""
    found = PeftModel.from_pretrained(net(), folder).eval()
    assert set(adapted(found)) == {n for n in adapted(model) if not (left_out and left_out in n)}
    x = torch.randn(5, 8)
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_compressed_adapter_adapts_the_modules_of_the_original(
    how: dict[str, Any], profile: Any, tmp_path: Path
) -> None:
    model = trained(how)
    model.save_pretrained(tmp_path / "in")
    whole = lorank.compress(tmp_path / "in", energy=1.0, progress=False)
    whole.save(tmp_path / "whole", profile)
    assert_same(tmp_path / "whole", model)
    live = lorank.compress(lorank.LoraAdapter.from_model(model), energy=1.0, progress=False)
    live.save(tmp_path / "live", profile)
    assert_same(tmp_path / "live", model)
    small = lorank.compress(tmp_path / "in", avg_rank=2, progress=False)
    small.save(tmp_path / "small", profile)
    found = PeftModel.from_pretrained(net(), tmp_path / "small")
    assert set(adapted(found)) == {
        name for name, rank in small.ranks.items() if rank or profile == "portable"
    }


@pytest.mark.parametrize("silent", ["blocks.1.", "inner."])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_modules_without_rank_are_not_adapted_again(how: dict[str, Any], silent: str, tmp_path: Path) -> None:
    model = trained(how, silent)
    if all(silent in name for name in adapted(model)):
        pytest.skip("nothing would be left")
    model.save_pretrained(tmp_path / "in")
    lorank.compress(tmp_path / "in", energy=1.0, progress=False).save(tmp_path / "out")
    assert_same(tmp_path / "out", model, silent)


def test_merged_adapter_adapts_the_modules_of_both(tmp_path: Path) -> None:
    for name, targets in (("a", "blocks.1.proj_out"), ("b", "blocks.2.proj_in")):
        trained({"target_modules": targets}).save_pretrained(tmp_path / name)
    merged = lorank.merge([tmp_path / "a", tmp_path / "b"], energy=1.0, force=True, progress=False)
    merged.save(tmp_path / "sum")
    found = adapted(PeftModel.from_pretrained(net(), tmp_path / "sum"))
    assert set(found) == {"blocks.1.proj_out", "blocks.2.proj_in"}


def test_list_of_targets_stays_a_list(tmp_path: Path) -> None:
    """Engines that require a list of targets can load the written adapter."""
    trained(HOW[0]).save_pretrained(tmp_path / "in")
    lorank.compress(tmp_path / "in", avg_rank=2, progress=False).save(tmp_path / "out", "portable")
    (verdict,) = lorank.check(tmp_path / "out", ["sglang"])
    assert verdict.status == "right"


@pytest.mark.parametrize("targets", ["proj_out", r".*\.0\.proj_out|proj_out", r"inner\..*", ["0.proj_in"]])
@pytest.mark.parametrize("knows", ["the model", "all names", "names of targets"])
def test_allocation_adapts_the_modules_that_it_lists(targets: Any, knows: str) -> None:
    model = net()
    if knows == "names of targets":
        source: Any = lorank.analyze(model, include=targets, progress=False)
    else:
        source = model
    allocation = lorank.allocate(source, "uniform", r_base=3, r_max=8, targets=targets, progress=False)
    config = allocation.to_lora_config(model if knows == "the model" else None)
    found = adapted(get_peft_model(net(), config))
    expected = dict(allocation.ranks)
    if knows == "names of targets" and "inner.proj_out" not in expected:
        # `inner.` may be a prefix of names in the live model.
        found.pop("inner.proj_out", None)
    assert found == expected


def test_names_outside_blocks_fit_a_model_with_a_prefix() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Nested(0)

    allocation = lorank.allocate(
        lorank.analyze(Nested(0), include="proj_out", progress=False), "uniform", r_base=3, progress=False
    )
    assert list(adapted(get_peft_model(Wrapped(), allocation.to_lora_config()))) == ["model.proj_out"]
