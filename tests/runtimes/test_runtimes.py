"""Verdicts of `check` against the formulas of runtimes, for every profile and unsupported adapters."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.numpy import load_file

import lorank
from lorank.runtimes import RUNTIMES
from tests.support import tiny_models
from tests.support.adapter_files import configured, loaded, saved, trained
from tests.support.command_line import run

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROFILES = ("compact", "portable", "tensor-rank")
READ_FOLDERS = [name for name, runtime in RUNTIMES.items() if runtime.reads == "folders"]


def updates(folder: Path, runtime: str) -> dict[str, Any] | None:
    """Return the updates that a runtime's formula gives for the files; None if the runtime refuses them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors}

    def pattern(table: dict[str, Any], name: str, default: float) -> float:
        return next((v for k, v in table.items() if re.match(rf"(.*\.)?({k})$", name)), default)

    found = {}
    ranks = {name: tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in factors}
    if runtime in ("sglang", "lmdeploy") and set(ranks.values()) != {config["r"]}:
        return None
    if runtime in ("lorax", "tgi") and len(set(ranks.values())) > 1:
        return None
    if runtime == "peft-hotswap" and config["alpha_pattern"]:
        return None
    for name in factors:
        a = tensors[f"base_model.model.{name}.lora_A.weight"].astype(np.float64)
        b = tensors[f"base_model.model.{name}.lora_B.weight"].astype(np.float64)
        if runtime in ("peft", "transformers", "unsloth", "vllm"):
            alpha = pattern(config["alpha_pattern"], name, config["lora_alpha"])
            r = pattern(config["rank_pattern"], name, config["r"])
            scale = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        elif runtime in ("llama.cpp", "ollama"):
            scale = config["lora_alpha"] / ranks[name]
        elif runtime == "tensorrt-llm":
            scale = config["lora_alpha"] / (math.sqrt(ranks[name]) if config["use_rslora"] else ranks[name])
        elif runtime in ("vllm-old", "aphrodite", "peft-hotswap", "tgi", "exllamav3"):
            scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        else:
            scale = config["lora_alpha"] / config["r"]
        found[name] = scale * b @ a
    return found


CONFIGS = {
    "plain": {"r": 6, "lora_alpha": 9, "target_modules": ALL},
    "rslora": {"r": 6, "lora_alpha": 9, "target_modules": ALL, "use_rslora": True},
    "patterns": {
        "r": 6,
        "lora_alpha": 9,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, "k_proj": 3, "v_proj": 3},
        "alpha_pattern": {"o_proj": 1},
    },
    "ranks": {"r": 6, "lora_alpha": 9, "target_modules": ALL, "rank_pattern": {"o_proj": 2}},
}


def original(name: str, folder: Path) -> Path:
    return saved(trained(tiny_models.llama(), LoraConfig(**CONFIGS[name])), folder)


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    names = set(a) | set(b)
    size = max(np.abs(x).max() for x in a.values())
    return all(np.abs(a.get(n, 0) - b.get(n, 0)).max() <= 1e-6 * size for n in names)


@pytest.mark.parametrize("runtime", READ_FOLDERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_check_agrees_with_the_formulas_of_runtimes(name: str, runtime: str, tmp_path: Path) -> None:
    before = original(name, tmp_path / "before")
    folders = [before]
    small = lorank.compress(lorank.LoraAdapter.load(before), avg_rank=2, progress=False)
    for profile in PROFILES:
        small.save(tmp_path / profile, profile)
        folders.append(tmp_path / profile)
    for folder in folders:
        (verdict,) = lorank.check(folder, [runtime])
        truth, applied = updates(folder, "peft"), updates(folder, runtime)
        assert truth is not None
        if applied is None:
            assert verdict.status == "refuses"
            continue
        assert verdict.status != "refuses", (folder.name, verdict)
        ratios = [np.vdot(applied[n], truth[n]) / np.vdot(truth[n], truth[n]) for n in truth]
        assert verdict.factors == pytest.approx((min(ratios), max(ratios)), rel=1e-6)
        scaled_right = agree(truth, applied)
        if "drops" not in verdict.reason:
            assert (verdict.status == "right") == scaled_right, (folder.name, verdict)


THROUGH_PEFT = {"peft", "transformers", "unsloth"}
PROMISES = {
    "compact": THROUGH_PEFT | {"vllm"},
    "portable": set(READ_FOLDERS),
    "tensor-rank": THROUGH_PEFT | {"vllm", "llama.cpp", "ollama", "tensorrt-llm"},
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CONFIGS)
def test_profiles_load_in_their_runtimes(name: str, profile: Any, tmp_path: Path) -> None:
    adapter = lorank.LoraAdapter.load(original(name, tmp_path / "before"))
    small = lorank.compress(adapter, avg_rank=1.5, progress=False)
    assert len(set(small.ranks.values())) > 1
    small.save(tmp_path / "after", profile)
    truth = updates(tmp_path / "after", "peft")
    assert truth is not None
    for module in small.adapted:
        assert np.abs(truth[module.name] - module.B.astype(float) @ module.A).max() <= 1e-6
    for runtime in PROMISES[profile]:
        applied = updates(tmp_path / "after", runtime)
        assert applied is not None
        assert agree(truth, applied), runtime
    right = {v.runtime for v in lorank.check(tmp_path / "after") if v.status == "right"}
    assert {RUNTIMES[runtime].name for runtime in PROMISES[profile]} <= right


def hotswapped(model: Any, first: Path, second: Path) -> Any:
    live = PeftModel.from_pretrained(copy.deepcopy(model), first)
    rank = max(json.loads((f / "adapter_config.json").read_text())["r"] for f in (first, second))
    prepare_model_for_compiled_hotswap(live, target_rank=rank)
    hotswap_adapter(live, str(second), "default")
    return live.eval()


def test_hotswap_of_portable_adapters_is_right(tmp_path: Path) -> None:
    model = tiny_models.llama()
    for k in (0, 1):
        adapter = lorank.LoraAdapter.from_model(trained(model, LoraConfig(**CONFIGS["patterns"]), seed=k))
        for profile in ("portable", "compact"):
            small = lorank.compress(adapter, avg_rank=2 + k, progress=False)
            small.save(tmp_path / f"{profile}{k}", profile)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = loaded(model, tmp_path / "portable1")(ids).logits
        swapped = hotswapped(model, tmp_path / "portable0", tmp_path / "portable1")(ids).logits
    torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-5)
    (verdict,) = lorank.check(tmp_path / "compact1", ["peft-hotswap"])
    assert (verdict.status, "alpha_pattern" in verdict.reason) == ("refuses", True)
    with pytest.raises(ValueError, match=r"alpha_pattern|Incompatible|config"):
        hotswapped(model, tmp_path / "compact0", tmp_path / "compact1")


def verdicts(folder: Path) -> dict[str, Any]:
    names = {runtime.name: name for name, runtime in RUNTIMES.items()}
    return {names[verdict.runtime]: verdict for verdict in lorank.check(folder)}


def of(folder: Path, base: Any = None, **config: Any) -> dict[str, Any]:
    settings = {"r": 4, "target_modules": ALL, **config}
    return verdicts(saved(trained(base or tiny_models.llama(), LoraConfig(**settings)), folder))


def test_sglang_checks_targets(tmp_path: Path) -> None:
    some = of(tmp_path / "some", target_modules=["q_proj", "v_proj"])
    assert some["sglang"].status == "right"
    up = of(tmp_path / "up", target_modules=["up_proj", "down_proj"])
    assert (up["sglang"].status, "gate_proj with up_proj" in up["sglang"].reason) == ("refuses", True)
    assert of(tmp_path / "gate", target_modules=["gate_proj"])["sglang"].status == "right"
    regex = of(tmp_path / "regex", target_modules=r".*layers\.0\..*_proj")
    assert "regular expression" in regex["sglang"].reason


@pytest.mark.parametrize(
    ("targets", "more", "status"),
    [
        (["q_proj"], {}, "right"),
        (["q_proj"], {"layers_to_transform": [0]}, "wrong"),
        (["q_proj"], {"layers_to_transform": 1}, "wrong"),
        (["layers.1.self_attn.q_proj"], {}, "wrong"),
        (["layers.0.self_attn.q_proj", "v_proj"], {}, "wrong"),
    ],
)
def test_lorax_needs_a_module_type_in_every_block(
    targets: list[str], more: dict[str, Any], status: str, tmp_path: Path
) -> None:
    verdict = of(tmp_path, target_modules=targets, **more)["lorax"]
    assert verdict.status == status
    wanted = "no more than 2 blocks" if status == "right" else "drops self_attn.q_proj"
    assert wanted in verdict.reason


def test_lorax_drops_small_ranks(tmp_path: Path) -> None:
    assert "pads ranks to 8" in of(tmp_path / "a", r=4)["lorax"].reason
    assert "pads ranks" not in of(tmp_path / "b", r=8)["lorax"].reason


def accepts(key: str, runtime: str) -> bool | None:
    """Return True if a runtime that raises at unknown tensors accepts a tensor; None if it ignores it."""
    if key.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")):
        return True  # The weight of the base model is redundant.
    name, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
    if factor == "magnitude_vector":
        return None if runtime == "tensorrt-llm" else False
    if factor in ("A.weight", "B.weight"):
        if runtime == "tensorrt-llm" and re.search(r"\.\d+\.", name) is None:
            return None if name == "lm_head" else False
        return True
    if factor in ("embedding_A", "embedding_B"):
        return True if runtime != "tensorrt-llm" else None if "embed_tokens" in name else False
    if runtime == "llama.cpp" and ("_layernorm" in key or ".norm" in key):
        return None
    if runtime == "tensorrt-llm" and ("lm_head" in key or "embed_tokens" in key):
        return None
    return False


BESIDE_FACTORS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "lora_bias": {"lora_bias": True},
    "head": {"modules_to_save": ["lm_head"]},
    "norm": {"modules_to_save": ["norm"]},
    "embedding": {"target_modules": ["q_proj", "k_proj", "v_proj", "embed_tokens"]},
    "adapted head": {"target_modules": ["q_proj", "k_proj", "v_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("name", BESIDE_FACTORS)
def test_runtimes_for_factors_only_refuse_other_tensors(name: str, tmp_path: Path) -> None:
    found = of(tmp_path, **BESIDE_FACTORS[name])
    keys = load_file(tmp_path / "adapter_model.safetensors")
    for runtime in ("vllm", "vllm-old", "llama.cpp", "tensorrt-llm"):
        answers = {accepts(key, runtime) for key in keys}
        saves = runtime.startswith("vllm") and "modules_to_save" in BESIDE_FACTORS[name]
        expected = "refuses" if saves or False in answers else "wrong" if None in answers else "right"
        assert found[runtime].status == expected, (runtime, found[runtime])
    left_out = any(".lora_" not in key and "base_layer" not in key for key in keys)
    left_out |= any(key.endswith(".bias") for key in keys)
    refused = {"sglang": ("dora", "norm"), "lorax": ("dora", "embedding")}
    for runtime, names in refused.items():
        expected = "refuses" if name in names else "wrong" if left_out else "right"
        assert found[runtime].status == expected, (runtime, found[runtime])


def test_biases_and_experts_are_refused(tmp_path: Path) -> None:
    bert = tiny_models.bert_classifier()
    biases = of(tmp_path / "bias", bert, target_modules=["query"], bias="all")
    assert "bias='all'" in biases["vllm"].reason
    mixtral = tiny_models.mixtral()
    experts = lorank.allocate(mixtral, "uniform", r_min=1, r_max=2).to_lora_config(mixtral)
    stacks = verdicts(saved(trained(mixtral, experts), tmp_path / "experts"))
    assert {stacks[name].status for name in ("sglang", "lorax", "llama.cpp", "tensorrt-llm")} == {"refuses"}


def test_adalora_is_right_only_through_peft(tmp_path: Path) -> None:
    config = AdaLoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_r=4, total_step=10)
    model = get_peft_model(copy.deepcopy(tiny_models.llama()), config)
    found = verdicts(saved(model, tmp_path / "a"))
    assert {name for name, verdict in found.items() if verdict.status == "right"} == THROUGH_PEFT
    ignoring = {"lorax", "tgi", "exllamav3"}
    assert {(found[name].status, found[name].factors) for name in ignoring} == {("wrong", (0.0, 0.0))}
    assert {found[name].status for name in found if name not in THROUGH_PEFT | ignoring} == {"refuses"}


SWAPPED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (tiny_models.llama, {}),
    "rslora": (tiny_models.llama, {"use_rslora": True}),
    "lora_bias": (tiny_models.llama, {"lora_bias": True}),
    "dora": (tiny_models.llama, {"use_dora": True}),
    "tokens": (tiny_models.llama, {"trainable_token_indices": [3, 5]}),
    "alphas": (tiny_models.llama, {"alpha_pattern": {"q_proj": 3}}),
    "ranks": (tiny_models.llama, {"rank_pattern": {"q_proj": 3}}),
    "head": (tiny_models.bert_classifier, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "bias": (tiny_models.bert_classifier, {"target_modules": ["query"], "bias": "all"}),
    "embedding": (tiny_models.bert_classifier, {"target_modules": ["query", "word_embeddings"]}),
    "alora": (tiny_models.llama, {"alora_invocation_tokens": [3, 4]}),
    "replicated layers": (tiny_models.llama, {"layer_replication": [[0, 2], [1, 2]]}),
    "experts": (
        tiny_models.mixtral,
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_hotswap_agrees_with_check(name: str, tmp_path: Path) -> None:
    build, more = SWAPPED[name]
    folders = []
    for k in (0, 1):
        # Two adapters of one kind with different patterns, as after compression.
        more = {**more, "alpha_pattern": {"q_proj": 3 + k}} if name == "alphas" else more
        model = trained(build(), LoraConfig(**{"r": 4, "target_modules": ALL, **more}), seed=k)
        folders.append(saved(model, tmp_path / str(k)))
    verdict = verdicts(folders[1])["peft-hotswap"]
    ids = torch.arange(1, 9)[None]
    live = PeftModel.from_pretrained(build(), folders[0])
    try:
        hotswap_adapter(live, str(folders[1]), "default", torch_device="cpu")
    except (ValueError, KeyError, AttributeError):
        assert verdict.status == "refuses", verdict
        return
    with torch.no_grad():
        got, expected = live.eval()(ids).logits, loaded(build(), folders[1])(ids).logits
    is_right = torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert verdict.status == ("right" if is_right else "wrong"), verdict
    if is_right:
        assert f"use_rslora={name == 'rslora'}, use_dora=False and lora_dropout=0.0" in verdict.reason


def test_targets_that_select_half_of_the_modules_are_wrong(tmp_path: Path) -> None:
    of(tmp_path, target_modules=["q_proj", "v_proj"])
    for targets in (["q_proj"], r".*\.q_proj"):
        configured(tmp_path, target_modules=targets)
        verdict = verdicts(tmp_path)["peft"]
        assert (verdict.status, verdict.factors) == ("wrong", (0.0, 1.0))
        assert "adapts 2 of 4 modules" in verdict.reason
        live = loaded(tiny_models.llama(), tmp_path)
        assert len(lorank.LoraAdapter.from_model(live).modules) == 2
    configured(tmp_path, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    assert "adapts 2 of 4 modules" in verdicts(tmp_path)["peft"].reason


def test_ranks_that_contradict_the_settings_are_fixed(tmp_path: Path) -> None:
    """`add_weighted_adapter` creates such adapters: layers in memory have the scale of the settings."""
    folder = saved(trained(tiny_models.llama(), LoraConfig(**CONFIGS["ranks"])), tmp_path / "a")
    configured(folder, rank_pattern={}, r=8, lora_alpha=8)
    found = verdicts(folder)
    assert (found["peft"].status, "but the settings give rank 8" in found["peft"].reason) == ("refuses", True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded(tiny_models.llama(), folder)
    assert found["llama.cpp"].factors == pytest.approx((8 / 6, 8 / 2))
    assert found["vllm"].status == "right"
    with pytest.raises(lorank.FormatError, match="lorank check --fix"):
        lorank.LoraAdapter.load(folder)
    text = run("check", folder, "--for", "peft,vllm", "--fix", tmp_path / "b")
    assert text.returncode == 0, text.stderr
    tensors = load_file(folder / "adapter_model.safetensors")
    fixed = lorank.LoraAdapter.load(tmp_path / "b")
    for name, module in fixed.modules.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_allclose(module.scaling * module.B @ module.A, b @ a, atol=1e-6)
    assert "the settings' scale was kept" in (tmp_path / "b" / "README.md").read_text()


def test_unknown_runtime_and_missing_adapter_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown runtime 'nobody': choose among"):
        lorank.check(tmp_path, ["nobody"])
    with pytest.raises(FileNotFoundError):
        lorank.check(tmp_path / "none")
    with pytest.raises(TypeError, match="check reads files, not a dict: save the adapter"):
        lorank.check({})  # type: ignore[arg-type]  # The error is under test.
