"""Adapters of PEFT read from files, and damaged or unsupported ones refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, VeraConfig, get_peft_model
from safetensors.numpy import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import configured, dense, distance, edited, saved, trained
from tests.support.peft_cases import KEY, case


def test_pickled_adapters_are_read(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({key: torch.from_numpy(x) for key, x in tensors.items()}, folder / "adapter_model.bin")
    from_safetensors = dense(lorank.LoraAdapter.load(folder))
    (folder / "adapter_model.safetensors").unlink()
    assert distance(dense(lorank.LoraAdapter.load(folder)), from_safetensors) == 0


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (VeraConfig(target_modules=["q_proj"]), "VERA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ],
)
def test_other_methods_raise_with_their_name(config: Any, method: str, tmp_path: Path) -> None:
    folder = saved(get_peft_model(tiny_models.llama(), config), tmp_path / "a")
    with pytest.raises(lorank.FormatError, match=f"is a {method} adapter"):
        lorank.LoraAdapter.load(folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_initialisations_that_change_the_base_raise_with_their_name(init: str, tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    configured(folder, init_lora_weights=init)
    with pytest.raises(lorank.FormatError, match=f"initialised by '{init}', which changes the base model"):
        lorank.LoraAdapter.load(folder)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop(KEY), "has no lora_A"),
        (lambda t: t.update({KEY: t[KEY][:5]}), "do not fit each other"),
        (lambda t: t.update({KEY: np.zeros((0, 32), np.float32)}), "are not matrices"),
        (lambda t: t.update({KEY: np.zeros(32, np.float32)}), "are not matrices"),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
)
def test_damaged_factors_raise(edit: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path) -> None:
    model, config = case("llama")
    folder = edited(saved(trained(model, config), tmp_path / "a"), edit)
    with pytest.raises(lorank.FormatError, match=reason):
        lorank.LoraAdapter.load(folder)


def test_ranks_that_contradict_the_settings_raise(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    configured(folder, r=7)
    with pytest.raises(lorank.FormatError, match="has rank 6, but the settings state 7"):
        lorank.LoraAdapter.load(folder)


def test_nan_raises_with_its_module(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = edited(
        saved(trained(model, config), tmp_path / "a"), lambda t: t[KEY].__setitem__((0, 0), np.nan)
    )
    with pytest.raises(lorank.NumericalError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        lorank.compress(lorank.LoraAdapter.load(folder), avg_rank=1, progress=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", None),
        ("r", "8"),
        ("r", True),
        ("r", -6),
        ("r", 0),
        pytest.param("r", 10**400, id="r-huge"),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", False),
        ("lora_alpha", float("nan")),
        pytest.param("lora_alpha", 10**400, id="lora_alpha-huge"),
        ("rank_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": [1]}),
        ("rank_pattern", ["q_proj"]),
    ],
)
def test_non_numeric_settings_raise_with_their_name(key: str, value: Any, tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    configured(folder, **{key: value})
    with pytest.raises(lorank.FormatError) as error:
        lorank.LoraAdapter.load(folder)
    named = (
        repr(value["q_proj"])
        if isinstance(value, dict)
        else "list"
        if isinstance(value, list)
        else repr(value)
    )
    for word in (str(folder), key, named[:35]):
        assert word in str(error.value)
    with pytest.raises(lorank.FormatError, match=key):
        lorank.check(folder)


def test_missing_magnitudes_are_noted(tmp_path: Path) -> None:
    model, config = case("dora")
    folder = saved(trained(model, config), tmp_path / "a")
    assert not any("no magnitude" in note for note in lorank.LoraAdapter.load(folder).notes)
    edited(folder, lambda tensors: tensors.pop(KEY.replace("lora_A.weight", "lora_magnitude_vector")))
    notes = lorank.LoraAdapter.load(folder).notes
    assert any(
        "1 modules have no magnitude vector; the first is model.layers.0.self_attn.q_proj" in n for n in notes
    )
    (verdict,) = lorank.check(folder, ["peft"])
    assert (verdict.status, "magnitudes of 1 modules anew" in verdict.reason) == ("wrong", True)


def test_folders_without_adapter_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "something.safetensors").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, "."):
        with pytest.raises(lorank.FormatError, match=r"holds neither adapter_config\.json nor"):
            lorank.LoraAdapter.load(path)
    with pytest.raises(FileNotFoundError, match="an empty path"):
        lorank.LoraAdapter.load("")


def test_paths_are_accepted_and_wrong_arguments_raise(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    adapter = lorank.LoraAdapter.load(folder)
    knobs: dict[str, Any] = {"avg_rank": 2, "progress": False}
    expected = lorank.compress(adapter, **knobs).ranks
    for path in (folder, str(folder)):
        assert lorank.compress(path, **knobs).ranks == expected
        assert lorank.family(path, [2], progress=False)[2].ranks == expected
        assert lorank.elastic(path, progress=False).ranks == adapter.ranks
        assert lorank.merge([path, adapter], **knobs).ranks == expected
        with pytest.raises(TypeError, match="merge takes a list of adapters, not one"):
            lorank.merge(path, **knobs)
    with pytest.raises(TypeError, match="a LoraAdapter or a path, not an object of type dict"):
        lorank.compress({}, **knobs)
    for call in (lorank.compress, lorank.extract, lorank.merge, lorank.LoraAdapter.load):
        two = (folder, folder) if call is lorank.extract else (folder,)
        with pytest.raises(TypeError, match="unknown option 'rank': choose among rank_ratio"):
            call(*two, rank=2)
