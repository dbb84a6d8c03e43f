"""Comparisons of real architectures: saved and live, renamed, grown, tied."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import lorank  # noqa: E402
from tests.support import material, tiny_models  # noqa: E402


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def disturbed(model: Any, scale: float = 0.01) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize(
    "make", [tiny_models.llama, tiny_models.mixtral, tiny_models.gpt2, tiny_models.gpt_oss]
)
def test_file_equals_the_live_model(make: Any, tmp_path: Path) -> None:
    model = make()
    report = lorank.compare(saved(model, tmp_path / "m"), model, progress=False)
    assert report.modules
    assert all(row.relative_change == 0 for row in report)
    assert not any("only in" in entry.reason for entry in report.skipped)
    assert {row.name for row in report} == {row.name for row in lorank.analyze(model, progress=False)}


@pytest.mark.parametrize("make", [tiny_models.mixtral, tiny_models.gpt2, tiny_models.gpt_oss])
def test_numbers_do_not_depend_on_the_storage(make: Any, tmp_path: Path) -> None:
    a, b = make(), disturbed(make())
    live = {row.name: row for row in lorank.compare(a, b, progress=False)}
    stored = lorank.compare(saved(a, tmp_path / "a"), saved(b, tmp_path / "b"), progress=False)
    assert {row.name for row in stored} == live.keys()
    for row in stored:
        for column in stored.columns:
            expected = pytest.approx(live[row.name].number(column), rel=1e-6, abs=1e-6)
            assert row.number(column) == expected, (row.name, column)


def test_change_of_dtype_is_a_small_change(tmp_path: Path) -> None:
    model = tiny_models.llama()
    half = copy.deepcopy(model).to(torch.bfloat16)
    report = lorank.compare(saved(model, tmp_path / "a"), saved(half, tmp_path / "b"), progress=False)
    for row in report:
        assert (row.dtype_a, row.dtype_b) == ("float32", "bfloat16")
        assert 0 < row.relative_change < 2**-8


def test_resized_embeddings_are_compared_on_the_common_rows(tmp_path: Path) -> None:
    model = tiny_models.llama()
    grown = copy.deepcopy(model)
    size = model.get_input_embeddings().weight.shape[0]
    grown.resize_token_embeddings(size + 5)
    report = lorank.compare(saved(model, tmp_path / "a"), saved(grown, tmp_path / "b"), progress=False)
    flagged = {row.name for row in report if row.flags}
    assert flagged == {"model.embed_tokens", "lm_head"}
    assert all(f"5 more rows: the first {size} are compared" in row.flags[0] for row in report if row.flags)
    assert all(row.relative_change == 0 for row in report)


@pytest.mark.parametrize("swap", [False, True])
def test_base_model_inside_a_classifier(swap: bool, tmp_path: Path) -> None:
    classifier = tiny_models.bert_classifier()
    folders = [saved(classifier.bert, tmp_path / "base"), saved(classifier, tmp_path / "classifier")]
    report = lorank.compare(*(folders[::-1] if swap else folders), progress=False)
    assert (report.prefix_a, report.prefix_b) == (("bert", "") if swap else ("", "bert"))
    assert all(row.relative_change == 0 for row in report)
    alone = {entry.name for entry in report.skipped if "only in" in entry.reason}
    assert alone == {"classifier", "classifier.bias"}
    assert {entry.reason for entry in report.skipped if entry.name not in alone} == {"1-D tensor, equal"}


def test_names_that_are_guessed_pair_with_those_of_the_code(tmp_path: Path) -> None:
    model = saved(tiny_models.gpt2(), tmp_path / "a")
    shutil.copytree(model, tmp_path / "b")
    (tmp_path / "b/config.json").unlink()
    report = lorank.compare(model, tmp_path / "b", progress=False)
    assert len(report) == len(lorank.analyze(model, progress=False))
    assert all(row.relative_change == 0 for row in report)


def test_head_that_one_model_ties_is_compared_with_the_embedding(tmp_path: Path) -> None:
    tied = tiny_models.llama_tied()
    untied = copy.deepcopy(tied)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(2 * tied.lm_head.weight.detach())
    folders = saved(tied, tmp_path / "tied"), saved(untied, tmp_path / "untied")
    report = lorank.compare(*folders, progress=False)
    assert report["model.embed_tokens"].relative_change == 0
    assert report["lm_head"].relative_change == pytest.approx(1)
    assert report["lm_head"].left_angle_max == pytest.approx(0, abs=1e-6)
    assert len(lorank.compare(folders[0], folders[0], progress=False)) == len(report) - 1


@pytest.mark.slow
def test_real_fine_tune_changes_every_matrix_but_one() -> None:
    report = lorank.compare(material.fetch("minilm"), material.fetch("minilm-tuned"), progress=False)
    changed = [row for row in report if row.relative_change > 0]
    assert [row.name for row in report if row.relative_change == 0] == ["pooler.dense"]
    assert all(0.003 < row.relative_change < 0.03 for row in changed)
    assert all(row.left_angle_max < 15 for row in changed)
