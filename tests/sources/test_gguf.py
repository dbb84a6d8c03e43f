"""Tests of GGUF files as sources, against the models that they hold."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorank
from lorank.report.rows import ModuleSpectrum
from lorank.sources import open_source
from lorank.sources.base import Source
from tests.support import material
from tests.support.gguf_files import ARCHITECTURES, tiny_model, write_model

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def assert_same(found: Source, expected: Source) -> None:
    """Compare all matrices, their values, and the number of parameters."""
    by_name = {matrix.info.name: matrix for matrix in found.matrices}
    assert sorted(by_name) == sorted(matrix.info.name for matrix in expected.matrices)
    for matrix in expected.matrices:
        other = by_name[matrix.info.name]
        assert other.info.module == matrix.info.module
        assert (other.info.kind, other.info.shape) == (matrix.info.kind, matrix.info.shape)
        assert other.transposed == matrix.transposed
        np.testing.assert_array_equal(
            other.load().to_array(), matrix.load().to_array(), err_msg=matrix.info.name
        )
    assert found.num_parameters == expected.num_parameters


# transformers before 5 stores experts one by one.
EXPERTS = {"llama-experts", "qwen2moe", "qwen3moe"}
STACKS = not transformers.__version__.startswith("4.")
NAMES = [name for name in ARCHITECTURES if STACKS or name not in EXPERTS]


@pytest.mark.parametrize("name", NAMES)
def test_file_has_the_matrices_of_the_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    path = tmp_path / "tiny.gguf"
    write_model(path, model, name)
    found = open_source(path)
    assert found.skeleton is not None, found.facts
    assert_same(found, open_source(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_file_has_the_matrices_that_transformers_loads(
    name: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, tiny_model(name), name, lambda *_: kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    assert_same(open_source(path), open_source(model))


def test_real_model_has_the_spectra_of_the_model_that_transformers_loads() -> None:
    (file,) = material.fetch("smollm2-gguf").glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32"
    )
    assert_same(open_source(file), open_source(model))
    include = r".*layers\.(0|29)\..*"
    found, expected = (lorank.analyze(source, include=include) for source in (file, model))
    assert rows(found) == rows(expected)
    assert len(found) == 14


@pytest.mark.parametrize("name", sorted({"llama", "gemma2", "gpt2", "qwen3moe"}.intersection(NAMES)))
def test_extraction_from_a_file_is_that_from_the_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    write_model(tmp_path / "base.gguf", model, name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.save_pretrained(tmp_path / "tuned")
    write_model(tmp_path / "tuned.gguf", model, name)
    written = []
    for number, (base, tuned) in enumerate(
        [("base", "tuned"), ("base.gguf", "tuned"), ("base", "tuned.gguf")]
    ):
        adapter = lorank.extract(tmp_path / base, tmp_path / tuned, energy=0.5, progress=False)
        adapter.save(tmp_path / f"adapter-{number}")
        written.append(load_file(tmp_path / f"adapter-{number}" / "adapter_model.safetensors"))
    for other in written[1:]:
        assert other.keys() == written[0].keys()
        for key, values in written[0].items():
            np.testing.assert_array_equal(other[key], values, err_msg=key)


def test_interrupted_analysis_of_a_file_is_resumed(tmp_path: Path) -> None:
    path, journal = tmp_path / "tiny.gguf", tmp_path / "tiny.jsonl"
    write_model(path, tiny_model("llama"), "llama", lambda *_: "Q8_0")
    expected = lorank.analyze(path, resume=journal, progress=False)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert rows(lorank.analyze(path, resume=journal, progress=False)) == rows(expected)
    write_model(path, tiny_model("llama"), "llama", lambda *_: "Q4_0")
    with pytest.raises(ValueError, match=r"tiny\.jsonl"):
        lorank.analyze(path, resume=journal, progress=False)


def rows(report: Any) -> dict[str, dict[str, Any]]:
    """Return the numbers of every row by its name."""
    columns = [
        column.name for column in fields(ModuleSpectrum) if column.name not in ("dtype", "eigenvalues")
    ]
    return {row.name: {column: getattr(row, column) for column in columns} for row in report}
