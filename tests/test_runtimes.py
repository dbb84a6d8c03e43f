"""Every profile under every runtime's own formula, and what `check` says of everything else."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.numpy import load_file

import lorank
import tiny_models
from adapter_files import loaded, saved, trained
from lorank.runtimes import RUNTIMES

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROFILES = ("compact", "portable", "tensor-rank")


def updates(folder: Path, runtime: str) -> dict[str, Any] | None:
    """The updates that a runtime applies, by its formula, straight from the files; None if it refuses."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors}

    def pattern(table: dict[str, Any], name: str, default: float) -> float:
        return next((v for k, v in table.items() if re.match(rf"(.*\.)?({k})$", name)), default)

    found = {}
    ranks = {name: tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in factors}
    if runtime in ("sglang", "lorax") and set(ranks.values()) != {config["r"]}:
        return None
    if runtime == "peft-hotswap" and config["alpha_pattern"]:
        return None
    for name in factors:
        a = tensors[f"base_model.model.{name}.lora_A.weight"].astype(np.float64)
        b = tensors[f"base_model.model.{name}.lora_B.weight"].astype(np.float64)
        if runtime in ("peft", "vllm"):
            alpha = pattern(config["alpha_pattern"], name, config["lora_alpha"])
            r = pattern(config["rank_pattern"], name, config["r"])
            scale = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        elif runtime in ("llama.cpp", "tensorrt-llm"):
            scale = config["lora_alpha"] / ranks[name]
        elif runtime in ("vllm-old", "peft-hotswap"):
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


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_check_says_what_the_formulas_give(name: str, runtime: str, tmp_path: Path) -> None:
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
        if verdict.status == "refuses":
            assert "together" in verdict.reason, "a reason beyond scales"
            continue
        ratios = [np.vdot(applied[n], truth[n]) / np.vdot(truth[n], truth[n]) for n in truth]
        assert verdict.factors == pytest.approx((min(ratios), max(ratios)), rel=1e-6)
        scaled_right = agree(truth, applied)
        if "drops" not in verdict.reason:
            assert (verdict.status == "right") == scaled_right, (folder.name, verdict)


PROMISES = {
    "compact": {"peft", "vllm"},
    "portable": set(RUNTIMES),
    "tensor-rank": {"peft", "vllm", "llama.cpp", "tensorrt-llm"},
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CONFIGS)
def test_profiles_keep_their_promises(name: str, profile: Any, tmp_path: Path) -> None:
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


def test_other_reasons(tmp_path: Path) -> None:
    model = tiny_models.llama()

    def of(name: str, base: Any = model, **config: Any) -> dict[str, Any]:
        return verdicts(saved(trained(base, LoraConfig(r=4, **config)), tmp_path / name))

    dora = of("dora", target_modules=ALL, use_dora=True)
    assert dora["peft"].status == "right"
    assert {dora[name].status for name in ("vllm", "vllm-old", "sglang", "lorax", "llama.cpp")} == {"refuses"}
    some = of("some", target_modules=["q_proj", "v_proj"])
    assert (some["sglang"].status, "together" in some["sglang"].reason) == ("refuses", True)
    assert "regular expression" in of("regex", target_modules=r".*layers\.0\..*_proj")["sglang"].reason
    layer = of("layer", target_modules=["q_proj", "k_proj", "v_proj"], layers_to_transform=[0])
    assert layer["lorax"].status == "right"
    names = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.0.self_attn.v_proj"]
    half = of("half", target_modules=names)["lorax"]
    assert (half.status, "drops self_attn.v_proj" in half.reason) == ("wrong", True)
    extra = of("head", target_modules=ALL, modules_to_save=["lm_head"])
    assert "modules_to_save" in extra["vllm"].reason
    assert (extra["llama.cpp"].status, extra["peft"].status) == ("wrong", "right")
    biases = of("bias", tiny_models.bert_classifier(), target_modules=["query"], bias="all")
    assert "bias='all'" in biases["vllm"].reason
    mixtral = tiny_models.mixtral()
    experts = lorank.allocate(mixtral, "uniform", r_min=1, r_max=2).to_lora_config(mixtral)
    stacks = verdicts(saved(trained(mixtral, experts), tmp_path / "experts"))
    assert {stacks[name].status for name in ("sglang", "lorax", "llama.cpp", "tensorrt-llm")} == {"refuses"}


def test_questions_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runtime 'ollama': choose among"):
        lorank.check(tmp_path, ["ollama"])
    with pytest.raises(FileNotFoundError):
        lorank.check(tmp_path / "none")
