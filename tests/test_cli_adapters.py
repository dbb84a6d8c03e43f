"""The adapter commands as their users see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel

import lorank
import tiny_models
from adapter_files import saved, trained
from test_cli import ok, run

MODEL = tiny_models.llama()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"])
    return saved(trained(MODEL, config), tmp_path_factory.mktemp("adapter"))


def test_compress_says_what_it_did_and_peft_loads_it(adapter: Path, tmp_path: Path) -> None:
    text = ok("compress", adapter, "-o", tmp_path / "out", "--rank-ratio", 0.25)
    for word in (
        "parameters before",
        "parameters after",
        "energy retained",
        "error, Frobenius norm",
        "up_proj",
    ):
        assert word in text
    PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "energy retained" in card
    assert "rank_ratio=0.25" in card


@pytest.mark.parametrize(
    "knob",
    [
        ("--avg-rank", 2),
        ("--energy", 0.9),
        ("--budget", "1k"),
        ("--auto",),
        ("--avg-rank", 3, "--scope", "module"),
    ],
)
def test_every_knob_of_compress(adapter: Path, tmp_path: Path, knob: tuple[object, ...]) -> None:
    content = json.loads(ok("compress", adapter, "-o", tmp_path / "out", *knob, "--max-rank", 6, "--json"))
    assert 0 < content["num_parameters"] < content["certificate"]["parameters_before"]
    assert max(module["rank"] for module in content["modules"]) <= 6
    if knob[0] == "--budget":
        assert content["num_parameters"] <= 1000


def test_a_family_and_its_elastic_parent(adapter: Path, tmp_path: Path) -> None:
    text = ok("family", adapter, "-o", tmp_path / "out", "--avg-ranks", "1,2,4")
    for name in ("elastic", "rank-1", "rank-2", "rank-4"):
        assert name in text
        assert lorank.LoraAdapter.load(tmp_path / "out" / name).num_parameters > 0
    cut = lorank.LoraAdapter.load(tmp_path / "out" / "elastic", avg_rank=2)
    child = lorank.LoraAdapter.load(tmp_path / "out" / "rank-2")
    assert {n: r for n, r in cut.ranks.items() if r} == child.ranks


def test_merge_with_and_without_weights(adapter: Path, tmp_path: Path) -> None:
    ok("merge", f"{adapter}:0.7", f"{adapter}:0.3", "-o", tmp_path / "a", "--avg-rank", 8)
    ok("merge", adapter, adapter, "-o", tmp_path / "b", "--avg-rank", 8)
    for name in "ab":
        merged = lorank.LoraAdapter.load(tmp_path / name)
        assert merged.ranks == lorank.LoraAdapter.load(adapter).ranks
    assert run("merge", f"{adapter}:0.7", adapter, "-o", tmp_path / "c", "--avg-rank", 8).returncode == 2


def test_extract(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "base")
    tuned = trained(MODEL, LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    text = ok(
        "extract",
        tmp_path / "base",
        tmp_path / "tuned",
        "-o",
        tmp_path / "out",
        "--avg-rank",
        1,
        "-x",
        "lm_head",
    )
    assert "energy retained" in text
    assert set(lorank.LoraAdapter.load(tmp_path / "out").modules) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }


def test_check_has_an_exit_status_and_mends(adapter: Path, tmp_path: Path) -> None:
    assert "vLLM" in ok("check", adapter, "--for", "peft,vllm")
    ok("compress", adapter, "-o", tmp_path / "mixed", "--avg-rank", 3)
    failing = run("check", tmp_path / "mixed")
    assert failing.returncode == 1
    assert "does not load right in" in failing.stderr
    ok("check", tmp_path / "mixed", "--for", "llama.cpp", "--fix", tmp_path / "fixed")
    ok("check", tmp_path / "mixed", "--fix", tmp_path / "everywhere")
    ok("check", tmp_path / "everywhere")
    verdicts = json.loads(run("check", tmp_path / "mixed", "--json").stdout)
    assert {verdict["status"] for verdict in verdicts} == {"right", "wrong", "refuses"}


def test_info(adapter: Path) -> None:
    text = ok("info", adapter, "--modules")
    assert "ranks 8 to 8" in text
    assert "model.layers.1.self_attn.q_proj" in text
    content = json.loads(ok("info", adapter, "--json"))
    assert {module["rank"] for module in content["modules"]} == {8}


def test_errors(adapter: Path, tmp_path: Path) -> None:
    cases = [
        (2, "exactly one of --rank-ratio", ("compress", adapter, "-o", tmp_path / "o")),
        (2, "exactly one", ("compress", adapter, "-o", tmp_path / "o", "--avg-rank", 2, "--energy", 0.5)),
        (2, "between 0 and 1", ("compress", adapter, "-o", tmp_path / "o", "--rank-ratio", 2)),
        (2, "between 0 and 1", ("compress", adapter, "-o", tmp_path / "o", "--rank-ratio", "nan")),
        (1, "no module has any rank left", ("compress", adapter, "-o", tmp_path / "o", "--rank-ratio", 0)),
        (2, "is not empty", ("compress", adapter, "-o", adapter, "--avg-rank", 2)),
        (1, "no such file", ("info", tmp_path / "none")),
        (1, "no runtime 'x'", ("check", adapter, "--for", "x")),
        (2, "takes numbers", ("family", adapter, "-o", tmp_path / "o", "--avg-ranks", "one")),
        (
            1,
            "profile must be",
            ("compress", adapter, "-o", tmp_path / "o", "--avg-rank", 2, "--profile", "x"),
        ),
    ]
    for status, message, arguments in cases:
        result = run(*arguments)
        assert result.returncode == status, (arguments, result.stderr)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()
