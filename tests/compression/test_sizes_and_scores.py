"""Sizes as budgets, scores relative to the base model, and families of several knobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import saved, trained
from tests.support.command_line import ok, outcome

ANOTHER = {"x.weight": np.ones((4, 4))}
CONFIG: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}


@pytest.fixture(scope="module")
def base() -> Any:
    model = tiny_models.llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1" in name:
                parameter.mul_(30)
    return model


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(trained(base, LoraConfig(**CONFIG)), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def base_folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    base.save_pretrained(path)
    return path


def factor_bytes(folder: Path) -> int:
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(x.numel() * x.element_size() for name, x in tensors.items() if "lora_" in name)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float64"])
@pytest.mark.parametrize("option", ["--size", "--budget"])
def test_written_factors_fit_into_the_size(
    folder: Path, tmp_path: Path, dtype: str | None, option: str
) -> None:
    out = tmp_path / "out"
    ok("compress", folder, "-o", out, option, "6KiB", *(["--dtype", dtype] if dtype else []))
    assert 6 * 1024 - 8 * 200 < factor_bytes(out) <= 6 * 1024


def test_size_equals_a_budget_of_parameters(folder: Path) -> None:
    by_size = lorank.compress(folder, budget="6KiB", progress=False)
    assert by_size.ranks == lorank.compress(folder, budget=6 * 1024 // 4, progress=False).ranks


@pytest.mark.parametrize("text", ["6kib", "6 MB", "MiB", "-1MiB", "1e3MiB", "nanMiB"])
def test_malformed_size_is_a_usage_error(folder: Path, tmp_path: Path, text: str) -> None:
    status, _, errors = outcome("compress", folder, "-o", tmp_path / "out", f"--size={text}")
    assert status == 2
    assert "--size" in errors


def test_size_excludes_other_amounts(folder: Path, tmp_path: Path) -> None:
    assert outcome("compress", folder, "-o", tmp_path / "out", "--size", "1MiB", "--energy", "0.5")[0] == 2
    assert outcome("compress", folder, "-o", tmp_path / "out", "--size", "0KiB")[0] == 2


def test_relative_score_divides_by_the_frobenius_norm(base: Any, folder: Path) -> None:
    adapter = lorank.LoraAdapter.load(folder)
    weights = dict(base.named_parameters())
    scores = {
        name: module.singular_values / float(weights[f"{name}.weight"].detach().double().norm())
        for name, module in adapter.modules.items()
    }
    small = lorank.compress(adapter, score="relative", base=base, avg_rank=3, progress=False)
    cut = np.sort(np.concatenate(list(scores.values())))[::-1][3 * len(scores) - 1]
    assert small.ranks == {name: int((x >= cut).sum()) for name, x in scores.items()}
    assert small.ranks != lorank.compress(adapter, avg_rank=3, progress=False).ranks
    assert small.certificate is not None
    assert "Frobenius" in small.certificate.action


def test_relative_score_on_the_command_line(
    base: Any, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ok("compress", folder, "-o", out, "--avg-rank", 3, "--score", "relative", "--base", base_folder)
    expected = lorank.compress(folder, score="relative", base=base, avg_rank=3, progress=False)
    assert {k: r for k, r in lorank.LoraAdapter.load(out).ranks.items() if r} == {
        k: r for k, r in expected.ranks.items() if r
    }
    for wrong in (["--score", "relative"], ["--base", base_folder], ["--score", "norm"]):
        assert outcome("compress", folder, "-o", tmp_path / "no", "--avg-rank", 3, *wrong)[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "relative", "avg_rank": 2}, "needs base"),
        ({"score": "other", "avg_rank": 2}, "score must be"),
        (
            {"score": "relative", "base": ANOTHER, "energy": 0.5},
            "rank_ratio or avg_rank",
        ),
        ({"score": "relative", "base": ANOTHER, "avg_rank": 2}, "no weight of module"),
    ],
)
def test_wrong_scores_raise(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lorank.compress(folder, progress=False, **options)


def test_base_weight_of_zero_raises(base: Any, folder: Path) -> None:
    weights = {name: np.zeros_like(x.detach().numpy()) for name, x in base.named_parameters()}
    with pytest.raises(ValueError, match="norm of the weight is 0"):
        lorank.compress(folder, score="relative", base=weights, avg_rank=2, progress=False)


def test_members_of_a_family_equal_single_compressions(folder: Path) -> None:
    members = lorank.family(
        folder, [2], rank_ratios=[0.25], energies=[0.9], budgets=["1k", "6 KiB", 900], progress=False
    )
    knobs: dict[float | str, dict[str, Any]] = {
        2: {"avg_rank": 2},
        "ratio-0.25": {"rank_ratio": 0.25},
        "energy-0.9": {"energy": 0.9},
        "budget-1k": {"budget": "1k"},
        "budget-6KiB": {"budget": "6KiB"},
        "budget-900": {"budget": 900},
    }
    assert members.keys() == knobs.keys()
    for key, chosen in knobs.items():
        assert members[key].ranks == lorank.compress(folder, progress=False, **chosen).ranks


def test_family_command_names_folders_by_the_knob(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "family"
    arguments = ["--rank-ratios", "0.25", "--energies", "0.9,0.99", "--budgets", "1k,6KiB"]
    ok("family", folder, "-o", out, *arguments, "--dtype", "bfloat16")
    names = {"elastic", "ratio-0.25", "energy-0.9", "energy-0.99", "budget-1k", "budget-6KiB"}
    assert {path.name for path in out.iterdir()} == names
    assert 4 * 1024 < factor_bytes(out / "budget-6KiB") <= 6 * 1024
    same = tmp_path / "same"
    ok("family", folder, "-o", same, "--budgets", "2KiB,1024", "--dtype", "bfloat16")
    assert {path.name for path in same.iterdir()} == {"elastic", "budget-2KiB", "budget-1024"}
    ok("family", folder, "-o", out, "--energies", "0.8", "--overwrite")
    assert {path.name for path in out.iterdir() if any(path.iterdir())} == {"elastic", "energy-0.8"}


@pytest.mark.parametrize(
    "arguments",
    [[], ["--energies", "1.5"], ["--rank-ratios", "x"], ["--budgets", "0"], ["--budgets", "../a"]],
)
def test_wrong_family_is_a_usage_error(folder: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert outcome("family", folder, "-o", tmp_path / "out", *arguments)[0] == 2
