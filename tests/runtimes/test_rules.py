"""Each runtime's own rules, one property of an adapter at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank.runtimes import RUNTIMES, right_profile
from tests.support.adapter_files import configured
from tests.support.command_line import run

PREFIX = "base_model.model."
LAYERS = [f"model.layers.{i}" for i in range(2)]
ATTENTION = [f"{layer}.self_attn.{kind}_proj" for layer in LAYERS for kind in "qkvo"]
QV = [name for name in ATTENTION if name[-6] in "qv"]


def factors(names: Sequence[str], rank: int = 8, width: int = 32) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name in names:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ones((rank, width), np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ones((width, rank), np.float32)
    return tensors


def table(name: str, rank: int = 8) -> dict[str, Any]:
    return {
        f"{PREFIX}{name}.lora_embedding_A": np.ones((rank, 64), np.float32),
        f"{PREFIX}{name}.lora_embedding_B": np.ones((32, rank), np.float32),
    }


def stack(experts: int = 4, rank: int = 8, width: int = 32, inner: int = 48) -> dict[str, Any]:
    at, size = f"{PREFIX}model.layers.0.mlp.experts", experts * rank
    return {
        f"{at}.base_layer.lora_A.weight": np.ones((size, width), np.float32),
        f"{at}.base_layer.lora_B.weight": np.ones((2 * inner, size), np.float32),
        f"{at}.lora_A.weight": np.ones((size, inner), np.float32),
        f"{at}.lora_B.weight": np.ones((width, size), np.float32),
    }


def carried(key: str, *shape: int) -> dict[str, Any]:
    return {PREFIX + key: np.ones(shape, np.float32)}


def write(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """Write an adapter whose targets are its modules."""
    names = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    targets = sorted({name.rpartition(".")[2] for name in names if "experts" not in name})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, **config}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


BOTH = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
GATE_UP = {key.replace(".base_layer", ""): x for key, x in stack().items() if "base_layer" in key}
DOWN = {key: x for key, x in stack().items() if "base_layer" not in key}


def one_by_one(*ranks: int) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for expert, rank in enumerate(ranks):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            tensors |= factors([f"model.layers.0.mlp.experts.{expert}.{kind}"], rank)
    return tensors


# Runtime, tensors, settings, status, and a part of the reason.
Rule = tuple[str, Mapping[str, Any], dict[str, Any], str, str]
RULES: list[Rule] = [
    ("vllm", factors(QV), {}, "right", ""),
    ("vllm", factors(QV), {"use_rslora": True}, "right", ""),
    ("vllm", {**factors(QV), **table("model.embed_tokens")}, {}, "right", ""),
    ("vllm", {**factors(QV), **table("model.wpe")}, {}, "refuses", "other than embed_tokens and lm_head"),
    ("vllm", factors(QV), {"alora_invocation_tokens": [1]}, "refuses", "aLoRA"),
    ("vllm", factors(QV), {"layer_replication": [[0, 2]]}, "refuses", "layer_replication"),
    ("vllm", factors(QV), {"init_lora_weights": "pissa"}, "refuses", "pissa"),
    ("vllm", {**factors(QV), **carried("score.weight", 3, 32)}, {"modules_to_save": ["score"]}, "right", ""),
    ("vllm", factors(QV), {"modules_to_save": ["lm_head"]}, "refuses", "lm_head"),
    ("vllm-old", factors(QV), {"modules_to_save": ["score"]}, "refuses", "score"),
    ("vllm", stack(), BOTH, "right", "--enable-mixed-moe-lora-format"),
    ("vllm", GATE_UP, {"target_parameters": ["experts.gate_up_proj"]}, "refuses", "as down_proj"),
    ("vllm", DOWN, {"target_parameters": ["experts.down_proj"]}, "refuses", "gate_up_proj with"),
    ("vllm", one_by_one(8, 8), {}, "right", ""),
    ("vllm", one_by_one(8, 4), {"rank_pattern": {r"experts\.1\.\w+": 4}}, "refuses", "one rank for all"),
    ("vllm", factors(QV, 16), {"r": 16}, "right", ""),
    ("vllm", factors(QV, 17), {"r": 17}, "right", "--max-lora-rank 32"),
    ("vllm", factors(QV, 64), {"r": 64}, "right", "--max-lora-rank 64"),
    ("vllm", factors(QV, 300), {"r": 300}, "right", "--max-lora-rank 320"),
    ("vllm", factors(QV, 512), {"r": 512}, "right", "--max-lora-rank 512"),
    ("vllm", factors(QV, 513), {"r": 513}, "refuses", "rank 513 is above 512"),
    ("aphrodite", factors(QV, 64), {"r": 64}, "right", "--max-lora-rank 64"),
    ("aphrodite", factors(QV), {"alpha_pattern": {"q_proj": 4}}, "wrong", "1 to 4 times the right scale"),
    ("sglang", factors(QV), {}, "right", ""),
    ("sglang", factors(QV), {"target_modules": "all-linear"}, "right", ""),
    ("sglang", factors(QV), {"target_modules": ".*_proj"}, "refuses", "regular expression"),
    ("sglang", {**factors(["lm_head"]), **table("model.embed_tokens")}, {}, "right", ""),
    ("sglang", one_by_one(8, 8), {}, "right", ""),
    ("sglang", factors(["model.layers.0.mlp.up_proj"]), {}, "refuses", "gate_proj with up_proj"),
    ("sglang", factors(["model.layers.0.mlp.gate_proj"]), {}, "right", ""),
    ("sglang", factors(QV), {"alora_invocation_tokens": [1]}, "wrong", "every token"),
    ("sglang", factors(QV), {"layer_replication": [[0, 2]]}, "refuses", "layer_replication"),
    ("sglang", {**factors(QV), **carried("model.norm.weight", 32)}, {}, "refuses", "trained norm"),
    ("sglang", factors(QV), {"use_rslora": True}, "wrong", "0.3536 times the right scale"),
    ("lorax", factors(QV), {"use_rslora": True}, "wrong", "0.3536 times the right scale"),
    ("tgi", factors(QV), {"use_rslora": True}, "right", "2 blocks"),
    ("tgi", factors(ATTENTION, 4), {"r": 4}, "right", "pads ranks to 8"),
    ("llama.cpp", factors(["lm_head"]), {}, "right", "not tied"),
    ("llama.cpp", factors(["lm_head"]), {"ensure_weight_tying": True}, "refuses", "tied"),
    ("llama.cpp", table("model.embed_tokens"), {"ensure_weight_tying": True}, "refuses", "tied"),
    ("llama.cpp", factors(QV), {"alora_invocation_tokens": [1]}, "wrong", "llama-server"),
    ("llama.cpp", factors(QV), {"layer_replication": [[0, 2]]}, "refuses", "layer_replication"),
    ("llama.cpp", one_by_one(8, 8), {}, "right", ""),
    ("llama.cpp", one_by_one(8, 4), {"rank_pattern": {r"experts\.1\.\w+": 4}}, "refuses", "one rank"),
    (
        "llama.cpp",
        factors(["model.layers.0.mlp.gate"]),
        {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        "right",
        "",
    ),
    ("llama.cpp", stack(), BOTH, "refuses", "expert"),
    ("ollama", factors(QV), {}, "right", "Llama and Gemma 2"),
    ("ollama", factors(QV), {"lora_alpha": 16.0}, "refuses", "needs an integer"),
    ("ollama", factors(QV), {"lora_alpha": 0.5}, "refuses", "needs an integer"),
    ("ollama", factors(["model.layers.0.mlp.gate"]), {}, "refuses", "has no name for"),
    ("ollama", factors(["lm_head"]), {}, "refuses", "has no name for lm_head"),
    ("ollama", factors(QV, 40), {"r": 40}, "refuses", "transposes"),
    ("ollama", factors(QV), {"use_rslora": True}, "wrong", "0.3536 times the right scale"),
    ("tensorrt-llm", factors(["model.layers.0.attn.c_attn"]), {}, "refuses", "no name for"),
    ("tensorrt-llm", one_by_one(8, 4), {"rank_pattern": {r"experts\.1\.\w+": 4}}, "refuses", "one rank"),
    ("exllamav3", factors(QV), {"use_rslora": True}, "right", ""),
    ("exllamav3", {**factors(QV), **table("model.embed_tokens")}, {}, "wrong", "leaves out 1 trained"),
    ("exllamav3", {**factors(QV), **carried("lm_head.weight", 64, 32)}, {}, "wrong", "leaves out 1 trained"),
    ("exllamav3", factors(QV), {"fan_in_fan_out": True}, "refuses", "fan_in_fan_out"),
    ("exllamav3", stack(), BOTH, "wrong", "leaves out 2 trained"),
    ("lmdeploy", factors(QV), {}, "right", ""),
    ("lmdeploy", factors(QV), {"use_rslora": True}, "wrong", "0.3536 times the right scale"),
    ("lmdeploy", factors(QV[1:]), {}, "wrong", "uninitialised memory for self_attn.q_proj"),
    ("lmdeploy", factors(QV, 4), {"rank_pattern": {"._proj": 4}}, "refuses", "another rank"),
    ("lmdeploy", {**factors(QV), **carried("lm_head.weight", 64, 32)}, {}, "refuses", "only factors"),
    ("mlx-lm", factors(QV), {}, "refuses", "its own format"),
    ("diffusers", factors(QV), {}, "refuses", "not PEFT folders"),
    ("comfyui", factors(QV), {}, "refuses", "not PEFT folders"),
    ("tgi", factors(QV), {"init_lora_weights": "olora"}, "wrong", "olora"),
    ("peft-hotswap", factors(QV), {"init_lora_weights": "olora"}, "refuses", "olora"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}-{rule[3]}-{rule[4]}")
def test_each_rule_gives_its_verdict(rule: Rule, tmp_path: Path) -> None:
    runtime, tensors, config, status, reason = rule
    (verdict,) = lorank.check(write(tmp_path, tensors, **config), [runtime])
    assert verdict.status == status, verdict
    assert reason in verdict.reason, verdict
    if status == "right" and not reason:
        assert not verdict.reason


def test_padding_counts_towards_the_largest_rank(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a",
        {**factors(QV[:2], 40), **factors(QV[2:], 8)},
        r=40,
        rank_pattern={r"layers\.1\..*": 8},
    )
    lorank.LoraAdapter.load(folder).save(tmp_path / "b", "portable")
    (verdict,) = lorank.check(tmp_path / "b", ["vllm"])
    assert (verdict.status, verdict.reason) == ("right", "needs --max-lora-rank 64")


def test_every_runtime_names_the_version_of_its_rules(tmp_path: Path) -> None:
    folder = write(tmp_path, factors(QV))
    assert all(runtime.version for runtime in RUNTIMES.values())
    text = run("check", folder).stdout
    content = json.loads(run("check", folder, "--json").stdout)
    for runtime, row in zip(RUNTIMES.values(), content, strict=True):
        assert (row["runtime"], row["version"]) == (runtime.name, runtime.version)
        assert runtime.version.split()[0] in text


def test_runtimes_of_another_format_do_not_fail_a_check(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(ATTENTION))
    lorank.LoraAdapter.load(folder).save(tmp_path / "b", "portable")
    assert run("check", tmp_path / "b").returncode == 0
    assert run("check", tmp_path / "b", "--for", "mlx-lm").returncode == 1


@pytest.mark.parametrize(
    ("runtimes", "profile"),
    [
        (["peft", "vllm", "transformers", "unsloth"], "compact"),
        (["ollama", "peft"], "tensor-rank"),
        (["vllm-old"], "portable"),
        (None, "portable"),
        (["diffusers", "comfyui"], "compact"),
    ],
)
def test_first_profile_that_all_runtimes_load_is_chosen(runtimes: list[str] | None, profile: str) -> None:
    assert right_profile(runtimes) == profile


def fails_after(change: Callable[[Path], object], folder: Path, target: Path) -> Any:
    change(folder)
    return run("check", folder, "--for", "peft,vllm", "--fix", target)


def test_fix_checks_the_written_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(QV, 600), r=600)
    result = fails_after(lambda f: configured(f, use_rslora=True), folder, tmp_path / "b")
    assert result.returncode == 1
    assert "does not load correctly in vLLM" in result.stderr
    assert lorank.check(tmp_path / "b", ["peft"])[0].status == "right"
