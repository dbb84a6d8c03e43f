"""Adapters of stacked experts: both layouts of PEFT, bare names, and the outputs of PEFT with each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import configured, dense, edited, loaded, saved, trained
from tests.support.command_line import run
from tests.support.outputs import outputs

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def experts(model: Any, folder: Path, *targets: str, **config: Any) -> Path:
    settings = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": list(targets), **config}
    return saved(trained(model, LoraConfig(**settings)), folder)


def laid_out_as_before_019(folder: Path, copies: int, version: str | None = "0.18.1") -> Path:
    """Rewrite an adapter in the layout of PEFT 0.18, which exchanges A and B of every expert."""

    def turn(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".experts." in key and ".lora_A" in key]:
            other = key.replace(".lora_A", ".lora_B")
            a, b = tensors[key], tensors[other]
            rank, (out, _) = len(a) // copies, b.shape
            each_a = a.reshape(copies, rank, -1)
            each_b = b.reshape(out, rank, copies)
            tensors[key] = np.ascontiguousarray(each_b.transpose(2, 1, 0).reshape(copies * rank, out))
            tensors[other] = np.ascontiguousarray(each_a.transpose(2, 1, 0).reshape(-1, rank * copies))

    return configured(edited(folder, turn), peft_version=version)


def assert_read_and_rewritten(model: Any, folder: Path, expected: torch.Tensor, after: Path) -> None:
    adapter = lorank.LoraAdapter.load(folder)
    lorank.compress(adapter, rank_ratio=1.0, progress=False).save(after / "compressed")
    torch.testing.assert_close(outputs(loaded(model, after / "compressed")), expected, rtol=1e-4, atol=1e-5)
    fixed = run("check", folder, "--for", "peft,transformers", "--fix", after / "fixed")
    assert fixed.returncode == 0, fixed.stderr
    torch.testing.assert_close(outputs(loaded(model, after / "fixed")), expected, rtol=1e-4, atol=1e-5)
    assert lorank.check(after / "fixed", ["peft"])[0].status == "right"


TARGETS = {
    "both": ((GATE_UP, DOWN), {}),
    "router": ((GATE_UP, DOWN, "mlp.gate.weight"), {}),
    "gate and up": ((GATE_UP,), {}),
    "down": ((DOWN,), {}),
    "attention too": ((GATE_UP,), {"target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_layout_before_019_is_read_and_rewritten(name: str, tmp_path: Path) -> None:
    targets, more = TARGETS[name]
    model = tiny_models.qwen3_moe()
    today = experts(model, tmp_path / "today", *targets, **more)
    expected, updates = outputs(loaded(model, today)), dense(lorank.LoraAdapter.load(today))
    before = laid_out_as_before_019(today, copies=4)
    found = dense(lorank.LoraAdapter.load(before))
    assert set(found) == set(updates)
    for key, update in updates.items():
        np.testing.assert_allclose(found[key], update, atol=1e-6)
    (verdict,) = lorank.check(before, ["peft"])
    assert (verdict.status, "PEFT before 0.19" in verdict.reason) == ("refuses", True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded(model, before)
    assert_read_and_rewritten(model, before, expected, tmp_path)


def test_square_factors_of_the_earlier_layout_load_wrongly(tmp_path: Path) -> None:
    model = tiny_models.qwen3_moe(moe_intermediate_size=16)
    today = experts(model, tmp_path / "today", GATE_UP)
    expected = outputs(loaded(model, today))
    before = laid_out_as_before_019(today, copies=4)
    (verdict,) = lorank.check(before, ["peft"])
    assert (verdict.status, "swapped" in verdict.reason) == ("wrong", True)
    assert not torch.allclose(outputs(loaded(model, before)), expected, atol=1e-3)
    assert_read_and_rewritten(model, before, expected, tmp_path)


def test_shapes_take_precedence_over_the_version(tmp_path: Path) -> None:
    model = tiny_models.qwen3_moe()
    today = experts(model, tmp_path / "today", GATE_UP, DOWN)
    expected = outputs(loaded(model, today))
    configured(today, peft_version="0.18.1")
    assert lorank.check(today, ["peft"])[0].status == "right"
    for version in ("0.21.2", None):
        before = laid_out_as_before_019(
            experts(model, tmp_path / f"before {version}", GATE_UP, DOWN), 4, version
        )
        (verdict,) = lorank.check(before, ["peft"])
        assert verdict.status == "refuses"
        assert ("although peft_version is 0.21.2" in verdict.reason) == (version is not None)
        assert_read_and_rewritten(model, before, expected, tmp_path / str(version))


def test_width_of_the_model_determines_the_layout_of_one_parameter(tmp_path: Path) -> None:
    model = tiny_models.qwen3_moe()
    today = experts(model, tmp_path / "today", DOWN, target_modules=["q_proj"])
    expected = outputs(loaded(model, today))
    before = laid_out_as_before_019(today, copies=4, version=None)
    assert lorank.check(before, ["peft"])[0].status == "refuses"
    assert_read_and_rewritten(model, before, expected, tmp_path)


def test_stacks_declared_transposed_have_one_layout_in_all_releases(tmp_path: Path) -> None:
    model = tiny_models.gpt_oss()
    folder = configured(experts(model, tmp_path / "a", GATE_UP, DOWN), peft_version="0.18.1")
    expected = outputs(loaded(model, folder))
    assert lorank.check(folder, ["peft"])[0].status == "right"
    assert_read_and_rewritten(model, folder, expected, tmp_path)
    one = experts(model, tmp_path / "one", DOWN)
    configured(one, peft_version="0.18.1", base_model_name_or_path="openai/gpt-oss-20b")
    assert lorank.check(one, ["peft"])[0].status == "right"


def test_written_files_name_the_release_of_their_layout(tmp_path: Path) -> None:
    model = tiny_models.qwen3_moe(moe_intermediate_size=16)
    before = laid_out_as_before_019(experts(model, tmp_path / "a", GATE_UP), 4, "0.17.0")
    adapter = lorank.LoraAdapter.load(before)
    adapter.save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["peft_version"] == "0.19.0"
    again = dense(lorank.LoraAdapter.load(tmp_path / "b"))
    for name, update in dense(adapter).items():
        np.testing.assert_allclose(again[name], update, atol=1e-6)


BARE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "mixtral, all-linear": (tiny_models.mixtral, {"target_modules": "all-linear"}),
    "qwen3_moe, all-linear": (tiny_models.qwen3_moe, {"target_modules": "all-linear"}),
    "qwen3_moe, names of layers": (
        tiny_models.qwen3_moe,
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "mixtral, one parameter": (
        tiny_models.mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
    ),
    "gpt_oss": (
        tiny_models.gpt_oss,
        {"target_modules": ["v_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
    "experts alone": (
        tiny_models.mixtral,
        {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_bare_names_of_parameters_are_read(name: str, tmp_path: Path) -> None:
    build, config = BARE[name]
    model = build()
    settings = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    live = trained(model, LoraConfig(**settings))
    folder = saved(live, tmp_path / "a")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert not all("experts" in target for target in written["target_parameters"])
    expected = outputs(live)
    torch.testing.assert_close(outputs(loaded(model, folder)), expected, rtol=1e-4, atol=1e-5)
    adapter = lorank.LoraAdapter.load(folder)
    stacks = {key.rpartition(".")[2] for key, module in adapter.modules.items() if module.copies == 4}
    assert stacks == {t for t in written["target_parameters"] if "." not in t}
    assert lorank.check(folder, ["peft", "transformers"])[0].status == "right"
    assert_read_and_rewritten(model, folder, expected, tmp_path)
    portable = run("check", folder, "--for", "peft,peft-hotswap", "--fix", tmp_path / "portable")
    assert portable.returncode == 0, portable.stderr
    torch.testing.assert_close(outputs(loaded(model, tmp_path / "portable")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BARE)
def test_compressed_bare_names_load_with_the_certified_error(name: str, tmp_path: Path) -> None:
    build, config = BARE[name]
    model = build()
    live = trained(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}))
    folder = saved(live, tmp_path / "a")
    small = lorank.compress(folder, rank_ratio=0.6, progress=False)
    small.save(tmp_path / "b")
    before, after = (dense(lorank.LoraAdapter.load(tmp_path / x)) for x in "ab")
    lost = np.sqrt(sum(np.square(x - after.get(key, 0)).sum() for key, x in before.items()))
    assert small.certificate is not None
    assert lost == pytest.approx(small.certificate.error, rel=1e-4)
    merged = loaded(model, tmp_path / "b").merge_and_unload()
    for key, update in after.items():
        owner = key if key.endswith((".weight", "gate_up_proj", "down_proj")) else f"{key}.weight"
        weight, base = merged.get_parameter(owner), copy.deepcopy(model).get_parameter(owner)
        added = (weight - base).detach().numpy()
        expected = update.transpose(0, 2, 1) if added.shape != update.shape else update
        np.testing.assert_allclose(added, expected, atol=1e-5)


def separate(folder: Path, rank: Callable[[int, str], int], **config: Any) -> tuple[Path, torch.Tensor]:
    """Write an adapter of separate experts, as in transformers 4; return its folder and logits."""
    from safetensors.numpy import save_file

    model, generator = tiny_models.qwen3_moe(), np.random.default_rng(0)
    tensors = {}
    with torch.no_grad():
        for layer in range(2):
            stack = model.model.layers[layer].mlp.experts
            for expert in range(4):
                for place, kind in enumerate(("gate_proj", "up_proj", "down_proj")):
                    width, out = (24, 32) if kind == "down_proj" else (32, 24)
                    r = rank(expert, kind)
                    a, b = (
                        generator.normal(0, 0.3, shape).astype(np.float32) for shape in ((r, width), (out, r))
                    )
                    name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{kind}"
                    tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                    target = stack.down_proj if kind == "down_proj" else stack.gate_up_proj
                    rows = slice(None) if kind == "down_proj" else slice(24 * place, 24 * (place + 1))
                    target[expert, rows] += torch.from_numpy(b @ a) * 8 / r
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    return folder, outputs(model)


SEPARATE: dict[str, tuple[Callable[[int, str], int], dict[str, Any], bool]] = {
    "one rank": (lambda *_: 4, {}, True),
    "down lower": (lambda _, k: 2 if k == "down_proj" else 4, {"rank_pattern": {"down_proj": 2}}, True),
    "up lower": (lambda _, k: 2 if k == "up_proj" else 4, {"rank_pattern": {"up_proj": 2}}, False),
    "experts unequal": (lambda e, _: 4 if e else 2, {"rank_pattern": {r"experts\.0\.\w+": 2}}, False),
    "rank by pattern": (
        lambda *_: 4,
        {"r": 2, "rank_pattern": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)},
        False,
    ),
    "dropout": (lambda *_: 4, {"lora_dropout": 0.1}, False),
    "expression": (lambda *_: 4, {"target_modules": r".*experts\.\d+\.(gate|up|down)_proj"}, False),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_experts_load_if_they_fit_into_a_stack(name: str, tmp_path: Path) -> None:
    rank, config, fits = SEPARATE[name]
    folder, expected = separate(tmp_path / "a", rank, **config)
    for verdict in lorank.check(folder, ["peft", "transformers"]):
        assert verdict.status == ("right" if fits else "refuses"), verdict
    try:
        got = outputs(PeftModel.from_pretrained(tiny_models.qwen3_moe(), folder).eval())
    except (RuntimeError, ValueError):
        assert not fits
    else:
        assert fits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    fixed = run("check", folder, "--for", "peft,llama.cpp", "--fix", tmp_path / "b")
    assert fixed.returncode == 0, fixed.stdout + fixed.stderr
    torch.testing.assert_close(
        outputs(loaded(tiny_models.qwen3_moe(), tmp_path / "b")), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("profile", ["compact", "portable", "tensor-rank"])
def test_compressed_separate_experts_load_with_the_certified_error(profile: Any, tmp_path: Path) -> None:
    folder, _ = separate(tmp_path / "a", lambda *_: 4)

    def weaken(tensors: dict[str, Any]) -> None:
        for key in tensors:
            if "lora_B" in key:
                tensors[key] *= (0.3 if ".layers.1." in key else 1) * (0.5 if "down_proj" in key else 1)

    edited(folder, weaken)
    small = lorank.compress(folder, avg_rank=2, progress=False)
    assert small.certificate is not None
    ranks = {(name.split(".")[2], name.rpartition(".")[2]): rank for name, rank in small.ranks.items()}
    assert len(set(ranks.values())) > 2
    small.save(tmp_path / "b", profile)
    before, after = (
        loaded(tiny_models.qwen3_moe(), tmp_path / x).merge_and_unload().state_dict() for x in "ab"
    )
    lost = sum((before[key] - after[key]).square().sum().item() for key in before) ** 0.5
    assert lost == pytest.approx(small.certificate.error, rel=1e-4)
    again = lorank.LoraAdapter.load(tmp_path / "b").adapted
    assert {m.name: m.rank for m in again} == {m.name: m.rank for m in small.adapted}
    for verdict in lorank.check(tmp_path / "b", ["peft", "transformers", "vllm"]):
        assert verdict.status == "right", verdict


def test_experts_of_families_not_stacked_by_peft_are_excluded(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    folder, _ = separate(tmp_path / "a", lambda *_: 4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **heads, **experts)).eval()
    (verdict,) = lorank.check(folder, ["peft"], base=model)
    expected = outputs(model)
    same = torch.equal(outputs(PeftModel.from_pretrained(model, folder).eval()), expected)
    assert (verdict.status, verdict.factors == (0, 0)) == (("wrong", True) if same else ("right", False))


def test_gate_without_up_raises(tmp_path: Path) -> None:
    folder, _ = separate(tmp_path / "a", lambda *_: 4, target_modules=["gate_proj", "down_proj"])
    edited(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "up_proj" in key])
    (verdict,) = lorank.check(folder, ["peft"])
    assert (verdict.status, "gate_proj without up_proj" in verdict.reason) == ("refuses", True)
    with pytest.raises(ValueError, match="without also targeting up_proj"):
        loaded(tiny_models.qwen3_moe(), folder)


def test_factors_deeper_than_their_parameters_raise(tmp_path: Path) -> None:
    folder = experts(tiny_models.mixtral(), tmp_path / "a", GATE_UP, DOWN)
    configured(folder, target_parameters=[GATE_UP])
    with pytest.raises(lorank.FormatError, match="target_parameters names 1 of its 2 adapted parameters"):
        lorank.LoraAdapter.load(folder)

    def bury(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if "experts.lora_" in key]:
            tensors[key.replace("experts.", "experts.base_layer.base_layer.")] = tensors.pop(key)

    configured(edited(folder, bury), target_parameters=[GATE_UP, DOWN])
    with pytest.raises(lorank.FormatError, match="has more layers than target_parameters names"):
        lorank.LoraAdapter.load(folder)
    assert load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": [], "target_parameters": [""]}, "do not fit|no experts|has rank"),
        ({"peft_version": "1" * 5000 + ".1"}, None),
        ({"peft_version": {"a": 1}}, None),
    ],
)
def test_hostile_settings_of_experts_raise(
    config: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    folder = experts(tiny_models.mixtral(), tmp_path / "a", "gate_up_proj", "down_proj")
    configured(folder, **config)
    if message is None:
        assert len(lorank.LoraAdapter.load(folder).modules) == 4
        return
    with pytest.raises(lorank.FormatError, match=message):
        lorank.LoraAdapter.load(folder)
