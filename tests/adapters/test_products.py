"""LoHa and LoKr read as LoRA, compared with PEFT's own updates and with dense products in NumPy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.numpy import save_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, loaded
from tests.support.outputs import outputs

RNG = np.random.default_rng(0)


def values(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32) / math.sqrt(shape[0])


CONFIGS = {
    "loha": LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "up_proj"], init_weights=False),
    "loha patterns": LoHaConfig(
        r=3, alpha=6, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}, init_weights=False
    ),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "up_proj"], init_weights=False),
    "lokr whole": LoKrConfig(r=64, alpha=6, target_modules=["q_proj", "up_proj"], init_weights=False),
    "lokr both": LoKrConfig(
        r=1,
        alpha=6,
        target_modules=["q_proj", "up_proj"],
        decompose_both=True,
        decompose_factor=4,
        init_weights=False,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.llama(), CONFIGS[name]).eval()
    model.save_pretrained(tmp_path / "a")
    adapter = lorank.LoraAdapter.load(tmp_path / "a")
    updates = dense(adapter)
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            expected = layer.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(updates[path], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    expected_outputs = outputs(model)
    lorank.compress(adapter, energy=1.0, progress=False).save(tmp_path / "b")
    torch.testing.assert_close(
        outputs(loaded(tiny_models.llama(), tmp_path / "b")), expected_outputs, rtol=1e-4, atol=1e-5
    )
    lorank.convert(tmp_path / "a", "peft").save(tmp_path / "c", "exact")
    torch.testing.assert_close(
        outputs(loaded(tiny_models.llama(), tmp_path / "c")), expected_outputs, rtol=1e-4, atol=1e-5
    )


def test_compression_has_the_error_of_a_dense_decomposition(tmp_path: Path) -> None:
    from peft.tuners.lora.conversion import convert_to_lora

    torch.manual_seed(0)
    model = get_peft_model(tiny_models.llama(), CONFIGS["loha"]).eval()
    model.save_pretrained(tmp_path / "a")
    small = lorank.compress(tmp_path / "a", avg_rank=4, scope="module", progress=False)
    updates = dense(lorank.LoraAdapter.load(tmp_path / "a"))
    tails = {name: np.linalg.svd(update, compute_uv=False)[4:] for name, update in updates.items()}
    expected = math.sqrt(sum(float(np.square(tail).sum()) for tail in tails.values()))
    assert small.certificate is not None
    assert small.certificate.error == pytest.approx(expected, rel=1e-5)
    _, theirs = convert_to_lora(model, rank=4)
    for name, module in small.modules.items():
        key = f"base_model.model.{name}.lora_{{}}.weight"
        other = theirs[key.format("B")].numpy() @ theirs[key.format("A")].numpy()
        np.testing.assert_allclose(module.B @ module.A, other, atol=2e-5 * np.abs(other).max() + 1e-6)


def kron(first: Any, second: Any) -> Any:
    return np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)


LYCORIS: dict[str, tuple[dict[str, Any], Any]] = {}
_A = [values(6, 3), values(3, 10), values(6, 2), values(2, 10)]
LYCORIS["loha"] = (
    {"hada_w1_a": _A[0], "hada_w1_b": _A[1], "hada_w2_a": _A[2], "hada_w2_b": _A[3], "alpha": 2.0},
    2 / 3 * (_A[0] @ _A[1]) * (_A[2] @ _A[3]),
)
_T = [values(2, 2, 3, 3), values(2, 2, 3, 3), values(2, 6), values(2, 5), values(2, 6), values(2, 5)]
LYCORIS["loha tucker"] = (
    {
        "hada_t1": _T[0],
        "hada_t2": _T[1],
        "hada_w1_a": _T[2],
        "hada_w1_b": _T[3],
        "hada_w2_a": _T[4],
        "hada_w2_b": _T[5],
    },
    np.einsum("ijkl,ip,jq->pqkl", _T[0], _T[2], _T[3]) * np.einsum("ijkl,ip,jq->pqkl", _T[1], _T[4], _T[5]),
)
_K = [values(2, 4), values(5, 3), values(3, 3), values(3, 6), values(5, 3, 3, 3), values(3, 3, 3, 3)]
LYCORIS["lokr whole"] = ({"lokr_w1": _K[0], "lokr_w2": _K[1], "alpha": 9.0}, kron(_K[0], _K[1]))
LYCORIS["lokr factors"] = (
    {"lokr_w1": _K[0], "lokr_w2_a": _K[1], "lokr_w2_b": _K[3], "alpha": 6.0, "scalar": 0.5},
    6 / 3 * 0.5 * kron(_K[0], _K[1] @ _K[3]),
)
LYCORIS["lokr kernel"] = ({"lokr_w1": _K[0], "lokr_w2": _K[4]}, kron(_K[0], _K[4]))
LYCORIS["lokr tucker"] = (
    {"lokr_w1": _K[0], "lokr_t2": _K[5], "lokr_w2_a": values(3, 4), "lokr_w2_b": values(3, 6), "alpha": 3.0},
    None,
)
_P = LYCORIS["lokr tucker"][0]
LYCORIS["lokr tucker"] = (
    _P,
    kron(_K[0], np.einsum("ijkl,ip,jq->pqkl", _P["lokr_t2"], _P["lokr_w2_a"], _P["lokr_w2_b"])),
)


def lycoris_file(path: Path, tensors: dict[str, Any]) -> Path:
    save_file({f"lora_unet_a.{key}": np.asarray(x, np.float32) for key, x in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", LYCORIS)
def test_updates_of_lycoris_equal_dense_products(name: str, tmp_path: Path) -> None:
    tensors, expected = LYCORIS[name]
    file = lycoris_file(tmp_path / "a.safetensors", tensors)
    adapter = lorank.LoraAdapter.load(file)
    module = adapter.modules["lora_unet_a"]
    assert module.kind == ("conv" if expected.ndim == 4 else "linear")
    assert module.a_tail == expected.shape[1:]
    update = dense(adapter)["lora_unet_a"].reshape(expected.shape)
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(
        module.singular_values[: min(update.reshape(len(update), -1).shape)],
        np.linalg.svd(update.reshape(len(update), -1), compute_uv=False)[: module.rank],
        rtol=1e-6,
        atol=1e-9,
    )
    small = lorank.compress(adapter, energy=1.0, progress=False)
    small.save(tmp_path / "b.safetensors")
    again = dense(lorank.LoraAdapter.load(tmp_path / "b.safetensors"))["lora_unet_a"].reshape(expected.shape)
    np.testing.assert_allclose(again, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("loha", {"hada_w1_b": None}, "has no hada_w1_b"),
        ("loha", {"hada_w2_b": values(3, 10)}, "do not fit each other"),
        ("loha", {"hada_w2_b": values(2, 9)}, "both sides of its product differ"),
        ("loha", {"hada_w2_a": values(0, 2)}, "without values"),
        ("loha tucker", {"hada_t1": values(3, 2, 3, 3)}, "do not fit each other"),
        ("lokr whole", {"lokr_w2": None}, "has no lokr_w2_a"),
        ("lokr whole", {"lokr_w1_a": values(2, 2)}, "one is too many"),
        ("lokr whole", {"lokr_w1": values(3)}, "is not a matrix"),
        ("lokr factors", {"lokr_w2_a": values(5, 4)}, "do not fit each other"),
        ("lokr factors", {"alpha": values(2)}, "not a single number"),
    ],
)
def test_damaged_products_raise(name: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tensors = {key: x for key, x in {**LYCORIS[name][0], **change}.items() if x is not None}
    file = lycoris_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(lorank.FormatError, match=reason) as error:
        lorank.LoraAdapter.load(file)
    assert str(file) in str(error.value)
    assert "lora_unet_a" in str(error.value)
