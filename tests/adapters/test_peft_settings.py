"""PEFT files whose settings and tensors describe other methods than LoRA or contradict each other."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors.numpy import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import configured, dense, edited, loaded, saved, trained
from tests.support.command_line import run
from tests.support.outputs import outputs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MODULE = "model.layers.0.self_attn.q_proj"


def plain(folder: Path, **settings: Any) -> Path:
    config = LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": LINEAR, **settings})
    return saved(trained(tiny_models.llama(), config), folder)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"kasa_config": KasaConfig()}, "KaSA"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=LINEAR, nblocks=2)}, "BD-LoRA"),
    ],
)
def test_variants_with_another_update_raise_with_their_name(
    settings: dict[str, Any], method: str, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "a", **settings)
    with pytest.raises(lorank.FormatError, match=f"is a {method} adapter .* whose update is not a product"):
        lorank.LoraAdapter.load(folder)


def test_variants_of_other_layers_raise_with_their_name(tmp_path: Path) -> None:
    folder = configured(plain(tmp_path / "a"), use_qalora=True)
    with pytest.raises(lorank.FormatError, match="is a QALoRA adapter"):
        lorank.LoraAdapter.load(folder)


class Grouped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 3, groups=4)


def test_grouped_convolutions_raise_with_their_name(tmp_path: Path) -> None:
    folder = saved(trained(Grouped(), LoraConfig(r=4, target_modules=["conv"])), tmp_path / "a")
    with pytest.raises(lorank.FormatError, match="'conv': is a convolution in 4 groups"):
        lorank.LoraAdapter.load(folder)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"base_model.model.{MODULE}.lora_E", "has lora_E of AdaLoRA"),
        (f"base_model.model.{MODULE}.lora_diag", "belongs to KaSA"),
        (KEY.removeprefix("base_model.model."), "have the same meaning"),
        (KEY.removesuffix(".weight"), "have the same meaning"),
        (f"base_model.model.{MODULE}.lora_embedding_A", "have the same meaning"),
        (f"base_model.model.{MODULE}.lora_B.bias", r"a bias of shape \[6, 32\] does not fit 32 outputs"),
        ("base_model.model.elsewhere.lora_B.bias", "'base_model.model.elsewhere.lora_B.bias': its module"),
    ],
)
def test_contradicting_tensors_raise_with_their_name(key: str, reason: str, tmp_path: Path) -> None:
    folder = edited(plain(tmp_path / "a"), lambda tensors: tensors.update({key: tensors[KEY].copy()}))
    with pytest.raises(lorank.FormatError, match=reason) as error:
        lorank.LoraAdapter.load(folder)
    assert str(folder) in str(error.value)


def test_biases_of_another_length_raise(tmp_path: Path) -> None:
    key = f"base_model.model.{MODULE}.lora_B.bias"
    folder = plain(tmp_path / "a", lora_bias=True)
    edited(folder, lambda tensors: tensors.update({key: tensors[key][:-1].copy()}))
    with pytest.raises(
        lorank.FormatError, match=rf"{MODULE}.*a bias of shape \[31\] does not fit 32 outputs"
    ):
        lorank.LoraAdapter.load(folder)


def test_factors_of_two_kinds_of_layers_raise(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[f"base_model.model.{MODULE}.lora_embedding_A"] = tensors.pop(KEY)

    folder = edited(plain(tmp_path / "a"), rename)
    with pytest.raises(lorank.FormatError, match="one factor of an embedding and one of another layer"):
        lorank.LoraAdapter.load(folder)


DEEP = "(" * 5000 + ")" * 5000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {"a{4294967296}": 3}),
        ("alpha_pattern", {DEEP: 3}),
        ("rank_pattern", {"(": 3}),
        ("target_parameters", [1]),
        ("target_parameters", 5),
        ("target_parameters", "experts"),
        ("modules_to_save", 5),
        ("modules_to_save", "classifier"),
        ("target_modules", [["q_proj"]]),
        ("target_modules", 5),
        ("exclude_modules", {"a": 1}),
        ("use_rslora", "false"),
        ("use_dora", 1),
        ("bias", ["all"]),
        ("base_model_name_or_path", ["a"]),
    ],
)
def test_hostile_settings_raise_with_one_line(key: str, value: Any, tmp_path: Path) -> None:
    folder = configured(plain(tmp_path / "a"), **{key: value})
    with pytest.raises(lorank.FormatError) as error:
        lorank.LoraAdapter.load(folder)
    message = str(error.value)
    assert key in message
    assert str(folder) in message
    assert len(message) < 500
    for command in (
        ("info", folder),
        ("check", folder),
        ("compress", folder, "-o", tmp_path / "o", "--auto"),
    ):
        failed = run(*command)
        assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr


def test_settings_for_training_only_are_dropped_and_noted(tmp_path: Path) -> None:
    folder = plain(tmp_path / "a", monteclora_config=MontecloraConfig())
    adapter = lorank.LoraAdapter.load(folder)
    assert any("MonteCLoRA" in note for note in adapter.notes)
    small = lorank.compress(adapter, rank_ratio=0.5, progress=False)
    small.save(tmp_path / "b")
    assert LoraConfig.from_pretrained(tmp_path / "b").monteclora_config is None
    assert not any("sampler" in key for key in load_file(tmp_path / "b" / "adapter_model.safetensors"))
    expected = copy.deepcopy(tiny_models.llama())
    parameters = dict(expected.named_parameters())
    for name, update in dense(small).items():
        parameters[f"{name}.weight"].data += torch.from_numpy(update).float()
    torch.testing.assert_close(
        outputs(loaded(tiny_models.llama(), tmp_path / "b")), outputs(expected), rtol=1e-4, atol=1e-5
    )


def test_activated_lora_is_kept_and_noted(tmp_path: Path) -> None:
    folder = plain(tmp_path / "a", alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    small = lorank.compress(folder, rank_ratio=0.5, progress=False)
    assert any("aLoRA" in note for note in small.notes)
    small.save(tmp_path / "b")
    assert LoraConfig.from_pretrained(tmp_path / "b").alora_invocation_tokens == [3, 4]


def test_every_variant_of_peft_is_classified() -> None:
    """Variants that are unknown to lorank must not be read as plain LoRA."""
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    known = {"use_dora", "use_qalora", "use_bdlora", "kasa_config"}
    plain_at_inference = {"velora_config", "alora_invocation_tokens", "arrow_config", "monteclora_config"}
    assert variants <= known | plain_at_inference
