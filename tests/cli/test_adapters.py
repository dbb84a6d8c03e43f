"""The adapter commands: output, files and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, PeftModel
from safetensors.numpy import save_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import saved, trained
from tests.support.command_line import ok, run

MODEL = tiny_models.llama()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj"])
    return saved(trained(MODEL, config), tmp_path_factory.mktemp("adapter"))


def test_compress_reports_its_result_and_peft_loads_it(adapter: Path, tmp_path: Path) -> None:
    text = ok("compress", adapter, "-o", tmp_path / "out", "--rank-ratio", 0.25)
    for word in (
        "parameters before",
        "parameters after",
        "energy retained",
        "error, Frobenius norm",
        "gate_proj",
    ):
        assert word in text
    PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "energy retained" in card
    assert "rank_ratio=0.25" in card


def test_compress_lists_every_module_before_and_after(adapter: Path, tmp_path: Path) -> None:
    text = ok("compress", adapter, "-o", tmp_path / "out", "--rank-ratio", 0.25, "--modules")
    small = lorank.LoraAdapter.load(tmp_path / "out")
    for name in lorank.LoraAdapter.load(adapter).modules:
        after = small.modules[name].rank if name in small.modules else 0
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert f"8 -> {after} " in line
    assert "8 -> " not in ok("compress", adapter, "-o", tmp_path / "quiet", "--rank-ratio", 0.25)


def test_compress_maps_image_adapters_by_block(tmp_path: Path) -> None:
    tensors = {}
    for block in range(3):
        for role in ("img_attn_qkv", "txt_mlp_0"):
            name = f"lora_unet_double_blocks_{block}_{role}"
            tensors[f"{name}.lora_up.weight"] = np.ones((6, 2 + block), np.float32)
            tensors[f"{name}.lora_down.weight"] = np.ones((2 + block, 4), np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    lines = ok("info", tmp_path / "a.safetensors").splitlines()
    rows = [line.split() for line in lines if line.strip().startswith("lora_unet")]
    assert rows == [[f"lora_unet_double_blocks_{k}", str(2 + k), str(2 + k)] for k in range(3)]
    assert "qkv" in "".join(lines)


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
def test_compress_accepts_every_knob(adapter: Path, tmp_path: Path, knob: tuple[object, ...]) -> None:
    content = json.loads(ok("compress", adapter, "-o", tmp_path / "out", *knob, "--max-rank", 6, "--json"))
    assert 0 < content["num_parameters"] < content["certificate"]["parameters_before"]
    assert max(module["rank"] for module in content["modules"]) <= 6
    if knob[0] == "--budget":
        assert content["num_parameters"] <= 1000


def test_family_writes_members_and_an_elastic_parent(adapter: Path, tmp_path: Path) -> None:
    text = ok("family", adapter, "-o", tmp_path / "out", "--avg-ranks", "1,2,4")
    for name in ("elastic", "rank-1", "rank-2", "rank-4"):
        assert name in text
        assert lorank.LoraAdapter.load(tmp_path / "out" / name).num_parameters > 0
    cut = lorank.LoraAdapter.load(tmp_path / "out" / "elastic", avg_rank=2)
    child = lorank.LoraAdapter.load(tmp_path / "out" / "rank-2")
    assert {n: r for n, r in cut.ranks.items() if r} == child.ranks


def test_merge_accepts_weights(adapter: Path, tmp_path: Path) -> None:
    ok("merge", f"{adapter}:0.7", f"{adapter}:0.3", "-o", tmp_path / "a", "--avg-rank", 8)
    ok("merge", adapter, adapter, "-o", tmp_path / "b", "--avg-rank", 8)
    for name in "ab":
        merged = lorank.LoraAdapter.load(tmp_path / name)
        assert merged.ranks == lorank.LoraAdapter.load(adapter).ranks


def test_extract_writes_an_adapter(tmp_path: Path) -> None:
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


def test_check_sets_the_exit_status_and_fixes_adapters(adapter: Path, tmp_path: Path) -> None:
    assert "vLLM" in ok("check", adapter, "--for", "peft,vllm")
    ok("compress", adapter, "-o", tmp_path / "mixed", "--avg-rank", 3)
    failing = run("check", tmp_path / "mixed")
    assert failing.returncode == 1
    assert "does not load correctly in" in failing.stderr
    ok("check", tmp_path / "mixed", "--for", "llama.cpp", "--fix", tmp_path / "fixed")
    ok("check", tmp_path / "mixed", "--fix", tmp_path / "everywhere")
    ok("check", tmp_path / "everywhere")
    verdicts = json.loads(run("check", tmp_path / "mixed", "--json").stdout)
    assert {verdict["status"] for verdict in verdicts} == {"right", "wrong", "refuses"}


def test_info_shows_ranks(adapter: Path) -> None:
    text = ok("info", adapter, "--modules")
    assert ", rank 8, " in text
    assert "model.layers.1.self_attn.q_proj" in text
    content = json.loads(ok("info", adapter, "--json"))
    assert {module["rank"] for module in content["modules"]} == {8}


USAGE = {
    "no knob": ("exactly one of --rank-ratio", "compress A -o O"),
    "two knobs": ("exactly one", "compress A -o O --avg-rank 2 --energy 0.5"),
    "ratio above 1": ("--rank-ratio 2.0 is not between 0 and 1", "compress A -o O --rank-ratio 2"),
    "ratio nan": ("--rank-ratio nan is not", "compress A -o O --rank-ratio nan"),
    "ratio 0": ("--rank-ratio 0.0 keeps nothing: give a larger", "compress A -o O --rank-ratio 0"),
    "rank 0": ("give a larger --avg-rank", "compress A -o O --avg-rank 0"),
    "budget 0": ("give a larger --budget", "compress A -o O --budget 0k"),
    "budget word": ("--budget abc is not a number of parameters", "compress A -o O --budget abc"),
    "budget negative": ("--budget -5 is not a number of parameters", "compress A -o O --budget -5"),
    "budget share": ("--budget 50%: an adapter does not store", "compress A -o O --budget 50%"),
    "budget of modules": ("--scope 'module' contradicts", "compress A -o O --budget 9 --scope module"),
    "scope": ("scope must be 'global' or 'module'", "compress A -o O --avg-rank 2 --scope layer"),
    "smallest": ("need --rank-ratio or --avg-rank", "compress A -o O --energy 0.5 --keep smallest"),
    "profile": ("--profile must be one of compact, portable", "compress A -o O --avg-rank 2 --profile x"),
    "dtype": ("float32, float16, bfloat16, float64, not 'bf16'", "compress A -o O --avg-rank 2 --dtype bf16"),
    "full folder": ("is not empty", "compress A -o A --avg-rank 2"),
    "family word": ("takes numbers", "family A -o O --avg-ranks one"),
    "family nan": ("finite numbers above 0, not nan", "family A -o O --avg-ranks 1,nan"),
    "family inf": ("finite numbers above 0, not inf", "family A -o O --avg-ranks inf"),
    "family negative": ("finite numbers above 0, not -1", "family A -o O --avg-ranks -1"),
    "family profile": ("--profile must be one of", "family A -o O --avg-ranks 1 --profile x"),
    "weight nan": ("'nan' is not a finite weight of A", "merge A:nan A:1 -o O --avg-rank 1"),
    "weight word": ("'0.7x' is not a finite weight of A", "merge A:0.7x A:0.3 -o O --avg-rank 1"),
    "some weights": ("a weight to every adapter or to none", "merge A:0.7 A -o O --avg-rank 8"),
    "runtime": ("--for must be one of peft, ", "check A --for pefft"),
    "fix into a full folder": ("is not empty", "check A --fix A"),
    "extract no knob": ("exactly one of --avg-rank, --energy, --budget and --auto", "extract A A -o O"),
    "extract budget": ("not a percentage: 'x%'", "extract A A -o O --budget x%"),
    "extract no budget": ("--budget 0% keeps nothing", "extract A A -o O --budget 0%"),
    "regex": ("'(' is not a regular expression", "extract A A -o O --avg-rank 1 --include re:("),
}


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage_is_reported_before_files_are_read(name: str, tmp_path: Path) -> None:
    message, arguments = USAGE[name]
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "adapter_config.json").write_text("no JSON: whoever reads it fails in another way")
    result = run(*arguments.split(), folder=tmp_path)
    assert (result.returncode, "usage: " in result.stderr) == (2, True), result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "O").exists()


def test_errors_exit_with_status_one(adapter: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "o")
    cases = [
        ("no module has any rank left: give", ("compress", adapter, *output, "--avg-rank", 0.01)),
        ("no module has any rank left: give", ("family", adapter, *output, "--avg-ranks", "0.01")),
        (f"{tmp_path / 'none'}: no such file", ("info", tmp_path / "none")),
        ("an empty path names no model or adapter", ("info", "")),
        ("no such file", ("merge", tmp_path / "none", adapter, *output, "--avg-rank", 2)),
    ]
    for message, arguments in cases:
        result = run(*arguments)
        assert result.returncode == 1, (arguments, result.stderr)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


def test_system_errors_begin_with_the_file(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").mkdir()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    result = run("info", tmp_path / "a")
    assert result.stderr == f"lorank: {tmp_path / 'a' / 'adapter_config.json'}: is a directory\n"


def test_extract_reports_filters_without_matches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("base", "tuned"):
        weights = {f"{m}.weight": rng.standard_normal((8, 8)) for m in ("q", "k")}
        save_file(weights, tmp_path / f"{name}.safetensors")
    arguments = (
        "extract",
        tmp_path / "base.safetensors",
        tmp_path / "tuned.safetensors",
        "-o",
        tmp_path / "o",
    )
    failing = run(*arguments, "--avg-rank", 2, "--include", "typo")
    assert (failing.returncode, "no module is named 'typo'" in failing.stderr) == (1, True)
    unreachable = run(*arguments, "--energy", 1, "--max-rank", 1)
    assert unreachable.returncode == 1
    assert "--energy 1.0 is out of reach" in unreachable.stderr
    assert "a larger --max-rank allows more" in unreachable.stderr
    share = json.loads(ok(*arguments, "--budget", "30%", "--json", "--overwrite"))
    assert 0 < share["num_parameters"] <= 0.3 * 128
    text = ok(*arguments, "--avg-rank", 2, "--exclude", "typo", "--prefix", "bert", "--overwrite")
    assert "--exclude 'typo' matches no module" in text
    assert "(default: 128)" in ok("extract", "--help")
    assert set(lorank.LoraAdapter.load(tmp_path / "o").modules) == {"bert.q", "bert.k"}


def test_fix_keeps_the_certificate_and_the_card(adapter: Path, tmp_path: Path) -> None:
    ok("compress", adapter, "-o", tmp_path / "small", "--avg-rank", 3, "--dtype", "bfloat16")
    ok("check", tmp_path / "small", "--fix", tmp_path / "fixed")
    for name in ("small", "fixed"):
        assert "avg_rank=3" in (tmp_path / name / "README.md").read_text()
    before, after = (lorank.LoraAdapter.load(tmp_path / name) for name in ("small", "fixed"))
    assert before.certificate is not None
    assert before.certificate == after.certificate
    assert {n: r for n, r in after.ranks.items() if r} == before.ranks
    content = json.loads(ok("info", tmp_path / "fixed", "--json"))
    assert f"{content['num_parameters']:,} parameters" in (tmp_path / "fixed" / "README.md").read_text()


def test_foreign_cards_are_kept(adapter: Path, tmp_path: Path) -> None:
    arguments = ("compress", adapter, "-o", tmp_path, "--avg-rank", 3, "--overwrite")
    (tmp_path / "README.md").write_text("My notes")
    assert "README.md was kept" in run(*arguments).stderr
    assert (tmp_path / "README.md").read_text() == "My notes"


def test_overwritten_family_has_no_members_of_another(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "family"
    ok("family", adapter, "-o", out, "--avg-ranks", "1,2,3")
    (out / "rank-3" / "notes.txt").write_text("mine")
    (out / "other").mkdir()
    done = run(
        "family", adapter, "-o", out, "--avg-ranks", "2", "--overwrite", "--dtype", "bfloat16", "--json"
    )
    assert done.returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["elastic", "other", "rank-2", "rank-3"]
    assert "rank-3 was kept" in done.stderr
    assert {row["dtype"] for row in json.loads(done.stdout)["rank-2"]["modules"]} == {"bfloat16"}
