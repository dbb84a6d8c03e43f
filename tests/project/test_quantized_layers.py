"""Weights of four and eight bits on every available device: spectra, profiles, dynamic ranks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorank
from lorank.training import resize_lora
from tests.support import tiny_models
from tests.support.adapter_files import distance, norm
from tests.support.bitsandbytes_layers import LAYERS
from tests.support.devices import DEVICES, on
from tests.support.dynamic_training import BUDGET, batch, llama, loss_on, moved, size_of, trained
from tests.support.gradient_oracle import assert_true, true_gradients
from tests.support.lora_layers import layers, ranks, truncated, updates_of
from tests.support.profiled_models import text_batches_on
from tests.support.spectrum_oracle import assert_spectrum

bnb = pytest.importorskip("bitsandbytes.nn")

# Products with 8-bit weights round their inputs, too; those with 4-bit weights do not.
TOLERANCE = {"8bit": 0.05, "fp4": 1e-5, "nf4": 1e-5}
CASES = [(device, kind) for device in DEVICES for kind in TOLERANCE]
every_case = pytest.mark.parametrize(("device", "kind"), CASES)


def quantized(model: Any, kind: str, device: str) -> Any:
    """Quantize all linear layers but the head; return the model on a device."""
    layer, options = LAYERS[kind]
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            small = getattr(bnb, layer)(linear.in_features, linear.out_features, bias=False, **options)
            small.load_state_dict(linear.state_dict())
            model.set_submodule(name, small)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = (
        kind == "8bit",
        kind != "8bit",
    )  # PEFT reads these attributes.
    return model.to(device)


def dequantized(model: Any) -> Any:
    """Return the model on the CPU with weights dequantized by bitsandbytes."""
    from bitsandbytes import functional

    plain = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.Linear4bit):
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.Linear8bitLt):
            weight = layer.weight.data.float() * (layer.weight.SCB.float() / 127)[:, None]
        else:
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = weight.reshape(linear.weight.shape).float().cpu()
        plain.set_submodule(name, linear)
    return plain.cpu()


@every_case
def test_spectra_equal_those_of_dequantized_weights(device: str, kind: str) -> None:
    model = quantized(tiny_models.llama(), kind, device)
    weights = dict(dequantized(model).named_parameters())
    report = lorank.analyze(model, keep_eigenvalues=True, progress=False)
    assert len(report) == 16
    for row in report:
        assert_spectrum(row, weights[f"{row.name}.weight"].detach().double().numpy(), rtol=1e-4)
    assert lorank.allocate(model, r_max=12, progress=False).ranks


@every_case
def test_gradients_equal_those_of_dequantized_weights(device: str, kind: str) -> None:
    model = quantized(tiny_models.llama(), kind, device)
    gradients = true_gradients(dequantized(model).double(), text_batches_on("cpu"))
    report = lorank.profile_gradients(model, text_batches_on(device), sketch=None, progress=False)
    assert len(report) == 14
    assert_true(report, gradients, TOLERANCE[kind])


@every_case
def test_tasks_equal_those_of_dequantized_weights(device: str, kind: str) -> None:
    model = quantized(tiny_models.llama(), kind, device)
    plain = lorank.profile_tasks(dequantized(model), text_batches_on("cpu"), progress=False)
    report = lorank.profile_tasks(model, text_batches_on("cpu"), progress=False)
    assert [row.module for row in report] == [row.module for row in plain]
    assert len(report) == 14
    assert report.num_samples == plain.num_samples > 0
    for row, expected in zip(report, plain, strict=True):
        if kind != "8bit":
            assert (row.k_star, row.predicted_rank) == (expected.k_star, expected.predicted_rank)


@every_case
def test_ranks_change_over_quantized_weights(device: str, kind: str) -> None:
    model = llama(prepared=lambda base: quantized(base, kind, device))
    assert all("bnb" in type(layer).__module__ for layer in layers(model).values())
    updates = trained(model, loss_of=lambda model, step: loss_on(device, model, step))
    assert [update.step for update in updates] == [6, 12, 18]
    assert moved(updates)
    assert ranks(model) == updates[-1].ranks
    assert size_of(model) <= BUDGET
    assert {parameter.device.type for parameter in model.parameters()} == {device}


@every_case
def test_adapters_over_quantized_weights_are_resized_and_compressed(device: str, kind: str) -> None:
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    # In training mode, as bitsandbytes packs weights for CPU inference, for which these are too small.
    model = get_peft_model(quantized(tiny_models.llama(), kind, device), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = on(device, batch(0))
    with torch.no_grad():
        before, old = model(**ids).logits, updates_of(model)
        resize_lora(model, dict.fromkeys(old, 6))
        torch.testing.assert_close(model(**ids).logits, before, rtol=0, atol=1e-5)
    changes = resize_lora(model, dict.fromkeys(old, 2))
    for name, update in updates_of(model).items():
        np.testing.assert_allclose(update, truncated(old[name], 2), atol=1e-6)
        assert changes[name].error == pytest.approx(np.linalg.norm(update - old[name]), rel=1e-4)
    small = lorank.compress(
        lorank.LoraAdapter.from_model(model), rank_ratio=0.5, scope="module", progress=False
    )
    small.into_model(model)
    assert set(small.ranks.values()) == {1}
    assert ranks(model) == small.ranks
    wanted = {name: module.B @ module.A for name, module in small.modules.items()}
    assert distance(updates_of(model), wanted) <= 1e-6 * norm(wanted)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
