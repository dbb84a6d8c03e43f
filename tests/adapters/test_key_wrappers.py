"""Keys with names of wrappers: read and written without these names, and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file

import lorank
from lorank.adapters.formats.key_wrappers import ANYWHERE
from lorank.runtimes import RUNTIMES
from tests.support import tiny_models
from tests.support.adapter_files import configured, edited, loaded, saved, trained
from tests.support.command_line import run
from tests.support.outputs import outputs

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}

WRAPPED: dict[str, Callable[[str], str]] = {
    **{f"{name} in front": lambda key, name=name: f"{name}.{key}" for name in ANYWHERE},
    **{
        f"{name} within": lambda key, name=name: key.replace("layers.1.", f"layers.1.{name}.")
        for name in ANYWHERE
    },
    "one in another": lambda key: f"_orig_mod.module.{key.replace('.self_attn.', '._orig_mod.self_attn.')}",
    "module in front": lambda key: f"module.{key}",
    "modules in front": lambda key: f"module.module.{key}",
    "module within": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
}


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    def edit(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    return edited(folder, edit)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper_names_are_removed_and_reported(name: str, tmp_path: Path) -> None:
    model = tiny_models.llama()
    live = trained(model, LoraConfig(**CONFIG, modules_to_save=["lm_head"]))
    clean = saved(live, tmp_path / "clean")
    keys, expected = set(load_file(clean / "adapter_model.safetensors")), outputs(loaded(model, clean))
    wrapped = rename(saved(live, tmp_path / "wrapped"), WRAPPED[name])
    adapter = lorank.LoraAdapter.load(wrapped)
    assert set(adapter.modules) == set(lorank.LoraAdapter.load(clean).modules)
    assert "held the names of wrappers" in adapter.notes[0]
    for verdict in lorank.check(wrapped, ["peft", "peft-hotswap", "vllm", "llama.cpp", "lmdeploy"]):
        assert verdict.status != "right"
    fixed = run("check", wrapped, "--for", "peft", "--fix", tmp_path / "fixed")
    assert fixed.returncode == 0, fixed.stderr
    assert set(load_file(tmp_path / "fixed" / "adapter_model.safetensors")) == keys
    torch.testing.assert_close(outputs(loaded(model, tmp_path / "fixed")), expected, rtol=1e-4, atol=1e-5)


def test_runtimes_that_match_ends_of_keys_find_wrapped_models(tmp_path: Path) -> None:
    live = trained(tiny_models.llama(), LoraConfig(**CONFIG))
    front = rename(saved(live, tmp_path / "a"), WRAPPED["_orig_mod in front"])
    assert lorank.check(front, ["exllamav3"])[0].status == "right"
    within = rename(saved(live, tmp_path / "b"), WRAPPED["_fsdp_wrapped_module within"])
    (verdict,) = lorank.check(within, ["exllamav3"])
    assert (verdict.status, verdict.factors) == ("wrong", (0.0, 1.0))
    assert "leaves out 2 of 4 modules without an error" in verdict.reason


def test_every_reason_names_the_wrapper(tmp_path: Path) -> None:
    live = trained(tiny_models.llama(), LoraConfig(**CONFIG))
    folder = rename(saved(live, tmp_path), WRAPPED["_checkpoint_wrapped_module within"])
    for name, verdict in zip(RUNTIMES, lorank.check(folder), strict=True):
        if verdict.reads_format:
            assert verdict.status != "right", name
            assert "keys hold _checkpoint_wrapped_module" in verdict.reason


def test_module_with_the_name_of_a_wrapper_is_kept(tmp_path: Path) -> None:
    live = trained(tiny_models.llama(), LoraConfig(**CONFIG))
    one = rename(saved(live, tmp_path / "one"), lambda key: key.replace("layers.0.", "layers.0.module."))
    assert "model.layers.0.module.self_attn.q_proj" in lorank.LoraAdapter.load(one).modules
    some = rename(
        saved(live, tmp_path / "some"),
        lambda key: key.replace(PREFIX, f"{PREFIX}module.") if "q_proj" in key else key,
    )
    assert "module.model.layers.0.self_attn.q_proj" in lorank.LoraAdapter.load(some).modules
    own = rename(saved(live, tmp_path / "own"), WRAPPED["module within"])
    targets = [f"module.model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"]
    configured(own, target_modules=targets)
    assert set(lorank.LoraAdapter.load(own).modules) == set(targets)
    assert lorank.check(own, ["peft"])[0].status == "right"


def test_keys_equal_without_wrappers_raise(tmp_path: Path) -> None:
    folder = saved(trained(tiny_models.llama(), LoraConfig(**CONFIG)), tmp_path)

    def double(tensors: dict[str, Any]) -> None:
        key = next(iter(tensors))
        tensors[f"_orig_mod.{key}"] = tensors[key].copy()

    edited(folder, double)
    with pytest.raises(lorank.FormatError, match=r"_orig_mod.*have the same meaning"):
        lorank.LoraAdapter.load(folder)
