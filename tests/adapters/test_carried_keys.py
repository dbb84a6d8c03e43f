"""Keys of carried tensors follow the modules that are adapted: PEFT loads every one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import edited, loaded, saved, trained
from tests.support.peft_cases import PROFILES

ALMOST_ALL = 1 - 1e-9
WEAK = 1e-5
"""The size of updates that lose their rank at that energy."""


class Experts(torch.nn.Module):
    """Two stacked weights, a bias and a norm in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(3, 12, 12))
        self.down = torch.nn.Parameter(torch.randn(3, 12, 12))
        self.bias = torch.nn.Parameter(torch.randn(12))
        self.norm = torch.nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = sum(torch.tanh(x @ gate) @ down for gate, down in zip(self.gate, self.down, strict=True))
        normed: torch.Tensor = self.norm(hidden + self.bias)
        return normed


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 12)
        self.second = torch.nn.Linear(12, 12)
        self.experts = Experts()
        self.last = torch.nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.experts(self.second(torch.tanh(self.first(x)))))
        return result


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def made(model: Any, folder: Path, config: LoraConfig, weak: tuple[str, ...] = (), seed: int = 1) -> Any:
    """Save an adapter with trained biases; the factors of weak modules are nearly zero."""
    live = trained(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name and any(part in name for part in weak):
                parameter.mul_(WEAK)
            elif "lora_" not in name and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    saved(live, folder)
    return live


def outputs(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        result: torch.Tensor = model(torch.randn(5, 12))
    return result


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
def test_peft_loads_biases_of_modules_without_rank(bias: Any, profile: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["first", "second"], bias=bias)
    live = made(net(), tmp_path / "a", config, weak=("second",))
    small = lorank.compress(tmp_path / "a", energy=ALMOST_ALL, progress=False)
    assert small.ranks["second"] == 0 < small.ranks["first"]
    small.save(tmp_path / "b", profile)
    torch.testing.assert_close(outputs(loaded(net(), tmp_path / "b")), outputs(live), rtol=1e-4, atol=1e-4)
    again = lorank.LoraAdapter.load(tmp_path / "b")
    again.save(tmp_path / "c", "compact")
    torch.testing.assert_close(outputs(loaded(net(), tmp_path / "c")), outputs(live), rtol=1e-4, atol=1e-4)
    if bias != "none":
        keys = load_file(tmp_path / "c" / "adapter_model.safetensors").keys()
        assert "base_model.model.first.base_layer.bias" in keys


@pytest.mark.parametrize("weak", ["gate", "down", "both"])
def test_peft_loads_biases_inside_stacks_that_lose_a_wrapper(weak: str, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["first"], target_parameters=["experts.gate", "experts.down"], bias="all"
    )
    # The inner layer adapts the first parameter, the outer one the second.
    parts = {"gate": ("experts.base_layer.lora",), "down": ("experts.lora",), "both": ("experts",)}[weak]
    live = made(net(), tmp_path / "a", config, weak=parts)
    small = lorank.compress(tmp_path / "a", energy=ALMOST_ALL, progress=False)
    dropped = ["gate", "down"] if weak == "both" else [weak]
    assert [name for name, rank in small.ranks.items() if not rank] == sorted(
        f"experts.{name}" for name in dropped
    )
    small.save(tmp_path / "b")
    torch.testing.assert_close(outputs(loaded(net(), tmp_path / "b")), outputs(live), rtol=1e-4, atol=1e-4)


class Mixed(torch.nn.Module):
    """A module with a weight and a layer inside; PEFT's layer around the weight appears in the inner name."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(3, 12, 12))
        self.inner = torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(sum(torch.tanh(x @ weight) for weight in self.weights))
        return result


@pytest.mark.parametrize("weak", ["experts.lora", "inner.lora"])
def test_peft_loads_layers_inside_a_layer_without_rank(weak: str, tmp_path: Path) -> None:
    def mixed() -> Any:
        model = net()
        model.experts = Mixed()
        return model

    config = LoraConfig(
        r=2, target_modules=["first", "inner"], target_parameters=["experts.weights"], bias="all"
    )
    live = made(mixed(), tmp_path / "a", config, weak=(weak,))
    small = lorank.compress(tmp_path / "a", energy=ALMOST_ALL, progress=False)
    assert list(small.ranks.values()).count(0) == 1
    small.save(tmp_path / "b")
    torch.testing.assert_close(outputs(loaded(mixed(), tmp_path / "b")), outputs(live), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_peft_loads_resized_tables_of_modules_without_rank(target: str, profile: Any, tmp_path: Path) -> None:
    def resized() -> Any:
        model = tiny_models.llama()
        torch.manual_seed(1)
        model.resize_token_embeddings(model.config.vocab_size + 4, mean_resizing=False)
        return model.eval()

    ids = torch.arange(8)[None] + resized().config.vocab_size - 8
    live = trained(resized(), LoraConfig(r=3, target_modules=["q_proj", target]))
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if target in name:
                if "lora_" in name:
                    parameter.mul_(WEAK)
                else:
                    parameter[-4:].copy_(torch.randn(4, parameter.shape[1]))
        expected = live(ids).logits
    saved(live, tmp_path / "a")
    small = lorank.compress(tmp_path / "a", energy=ALMOST_ALL, progress=False)
    assert 0 in small.ranks.values()
    small.save(tmp_path / "b", profile)
    # Engines that ignore the table of the base model look for this key only.
    keys = load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
    assert any(key.endswith(f"{target}.base_layer.weight") for key in keys)
    with torch.no_grad():
        got = loaded(resized(), tmp_path / "b")(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_merging_adds_a_layer_round_a_trained_bias(weight: float, turned: bool, tmp_path: Path) -> None:
    biased = made(net(), tmp_path / "a", LoraConfig(r=2, target_modules=["first"], bias="all"))
    more = LoraConfig(r=2, target_modules=["first", "second"], target_parameters=["experts.down"])
    other = made(net(), tmp_path / "b", more, seed=2).base_model.model
    paths, weights = [tmp_path / "a", tmp_path / "b"], [1.0, weight]
    if turned:
        paths, weights = paths[::-1], weights[::-1]
    merged = lorank.merge(paths, weights, rank_ratio=1.0, progress=False)
    merged.save(tmp_path / "m")
    base = biased.base_model.model
    with torch.no_grad():
        base.first.base_layer.weight += weight * other.first.get_delta_weight("default")
        base.second.weight += weight * other.second.get_delta_weight("default")
        base.experts.down += weight * other.experts.get_delta_weight("default")
    expected = outputs(biased)
    torch.testing.assert_close(outputs(loaded(net(), tmp_path / "m")), expected, rtol=1e-4, atol=1e-4)
    # Compressing the sum removes the layers.
    lorank.compress(merged, energy=0.3, progress=False).save(tmp_path / "s")
    one = loaded(net(), tmp_path / "s").base_model.model
    bias = getattr(one.second, "base_layer", one.second).bias
    assert torch.equal(bias, base.second.bias)


def test_merging_refuses_a_layer_round_an_adapted_module(tmp_path: Path) -> None:
    for name, config in (
        ("a", LoraConfig(r=2, target_modules=["first", "inner"])),
        ("b", LoraConfig(r=2, target_modules=["first"], target_parameters=["experts.weights"])),
    ):
        model = net()
        model.experts = Mixed()
        made(model, tmp_path / name, config)
    with pytest.raises(ValueError, match=r"'experts.inner' lies inside 'experts', which another adapter"):
        lorank.merge([tmp_path / "a", tmp_path / "b"], rank_ratio=1.0, progress=False)


def test_adapter_of_weight_zero_gives_no_tensors(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        config = LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"])
        made(net(), tmp_path / name, config, seed=seed)
    for weights, name in (([1.0, 0.0], "a"), ([0.0, 1.0], "b")):
        merged = lorank.merge([tmp_path / "a", tmp_path / "b"], weights, rank_ratio=1.0, progress=False)
        merged.save(tmp_path / "m", overwrite=True)
        expected = outputs(loaded(net(), tmp_path / name))
        torch.testing.assert_close(outputs(loaded(net(), tmp_path / "m")), expected, rtol=1e-4, atol=1e-4)


def test_bias_of_factors_without_rank_is_merged(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["first", "second"], lora_bias=True, bias="none")
    live = made(net(), tmp_path / "a", config, weak=("second.lora_A", "second.lora_B.default.weight"))
    small = lorank.compress(tmp_path / "a", energy=ALMOST_ALL, progress=False)
    assert small.ranks["second"] == 0
    lorank.merge([small], [1.0], rank_ratio=1.0, progress=False).save(tmp_path / "m")
    torch.testing.assert_close(outputs(loaded(net(), tmp_path / "m")), outputs(live), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "whole", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [3]}}]
)
def test_factors_and_a_saved_module_of_one_name_raise(whole: dict[str, Any], tmp_path: Path) -> None:
    saved(trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj"], **whole)), tmp_path / "a")
    saved(trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])), tmp_path / "b")
    with pytest.raises(ValueError, match="'lm_head' has factors in one adapter, but another trains it"):
        lorank.merge([tmp_path / "a", tmp_path / "b"], rank_ratio=1.0, progress=False)


def test_keys_of_a_live_model_raise(tmp_path: Path) -> None:
    made(net(), tmp_path / "a", LoraConfig(r=2, target_modules=["first", "second"]))

    def rename(tensors: dict[str, Any]) -> None:
        key = "base_model.model.first.lora_A"
        tensors[f"{key}.default.weight"] = tensors.pop(f"{key}.weight")

    edited(tmp_path / "a", rename)
    with pytest.raises(lorank.FormatError, match=r"first.lora_A.default.weight' has an adapter's name"):
        lorank.LoraAdapter.load(tmp_path / "a")
