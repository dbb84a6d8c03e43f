"""Profiles of models whose weights Accelerate keeps on the meta device between calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import lorank
from lorank.sources import open_source
from lorank.training import DynamicRanks
from tests.support import tiny_models

CPU = torch.device("cpu")
BLOCK = "model.layers.1"


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    made = []
    for seed in range(count):
        ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
        made.append({"input_ids": ids, "labels": ids})
    return made


def block_on_cpu(model: Any, _folder: Path) -> Any:
    accelerate.cpu_offload(model.model.layers[1], CPU)
    return model


def everything_on_cpu(model: Any, _folder: Path) -> Any:
    return accelerate.cpu_offload(model, CPU)


def everything_on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder, CPU)


def dispatched(model: Any, folder: Path) -> Any:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    places |= {BLOCK: "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def whole_blocks(model: Any, _folder: Path) -> Any:
    """Offload a model whose blocks have one hook for the weights of all modules within."""
    return accelerate.cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"])


def hooks_in_a_row(model: Any, folder: Path) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, ModelHook())
    return block_on_cpu(model, folder)


WAYS = [block_on_cpu, everything_on_cpu, everything_on_disk, dispatched, whole_blocks, hooks_in_a_row]
Way = Callable[[Any, Path], Any]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_profiles_of_offloaded_models_equal_those_of_plain_ones(way: Way, tmp_path: Path) -> None:
    model = way(tiny_models.llama(), tmp_path)
    projection = model.get_submodule(f"{BLOCK}.mlp.up_proj")
    assert projection.weight.is_meta
    for profile in (lorank.profile_gradients, lorank.profile_tasks):
        plain: Any = profile(tiny_models.llama(), batches(), progress=False)
        found: Any = profile(model, batches(), progress=False)
        assert found.to_json()["modules"] == plain.to_json()["modules"]
        assert (found.skipped, found.num_parameters) == (plain.skipped, plain.num_parameters)
    assert projection.weight.is_meta
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_spectra_of_offloaded_weights_equal_those_of_plain_ones(way: Way, tmp_path: Path) -> None:
    plain = lorank.analyze(tiny_models.llama(), progress=False)
    found = lorank.analyze(way(tiny_models.llama(), tmp_path), progress=False)
    assert found.modules == plain.modules


@pytest.mark.parametrize("way", [everything_on_cpu, everything_on_disk], ids=lambda way: way.__name__)
def test_offloaded_tied_weights_count_once(way: Way, tmp_path: Path) -> None:
    plain, found = open_source(tiny_models.llama_tied()), open_source(way(tiny_models.llama_tied(), tmp_path))
    assert found.num_parameters == plain.num_parameters
    assert [m.info for m in found.matrices] == [m.info for m in plain.matrices]
    assert [(s.name, s.reason) for s in found.skipped] == [(s.name, s.reason) for s in plain.skipped]


def test_frozen_offloaded_weight_stays_frozen() -> None:
    model = accelerate.cpu_offload(tiny_models.llama(), CPU)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lorank.profile_gradients(model, batches(1), progress=False)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_weight_without_values_raises() -> None:
    model = tiny_models.llama()
    accelerate.cpu_offload(model.model.layers[0], CPU)
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is on the meta device: load"):
        lorank.profile_gradients(model, batches(1), progress=False)


def test_ranks_of_an_offloaded_base_follow_its_gradients() -> None:
    def trained(model: Any) -> Any:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        with DynamicRanks(model, optimizer, interval=3, window=3, r_max=8) as ranks:
            for batch in batches():
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                update = ranks.step()
        assert update is not None
        return update

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["up_proj", "q_proj"])
    plain = get_peft_model(tiny_models.llama(), config)
    offloaded = get_peft_model(tiny_models.llama(), config)
    offloaded.load_state_dict(plain.state_dict())
    for layer in offloaded.get_base_model().model.layers:
        accelerate.cpu_offload(layer.mlp.up_proj.base_layer, CPU)
    expected, found = trained(plain), trained(offloaded)
    assert found.ranks == expected.ranks
    assert list(found.report) == list(expected.report)


class Packed(nn.Module):
    """A quantized layer whose codes lorank cannot read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(2, 8, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_unreadable_layers_are_named_with_a_reason() -> None:
    model = nn.Sequential()
    model.first, model.packed, model.last = nn.Linear(8, 8), Packed(), nn.Linear(8, 1)
    options: dict[str, Any] = {"loss": lambda m, x: m(x).square().mean(), "progress": False}
    for profile in (lorank.profile_gradients, lorank.profile_tasks):
        report: Any = profile(model, [torch.randn(20, 8) for _ in range(2)], **options)
        assert [row.name for row in report] == ["first", "last"]
        assert [skipped.name for skipped in report.skipped] == ["packed"]
        assert "Packed" in report.skipped[0].reason
        one: Any = profile(model, [torch.randn(20, 8)], targets=["first"], **options)
        assert not one.skipped
