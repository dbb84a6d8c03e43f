"""Tests of GGUF files as sources, against the models that they hold."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorank
from lorank.report.rows import ModuleSpectrum
from lorank.sources import open_source
from lorank.sources.base import Source
from tests.support import material
from tests.support.gguf_files import ARCHITECTURES, tiny_model, write_model

gguf = pytest.importorskip("gguf")
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


@pytest.mark.parametrize("name", ARCHITECTURES)
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


def rows(report: Any) -> dict[str, dict[str, Any]]:
    """Return the numbers of every row by its name."""
    columns = [
        column.name for column in fields(ModuleSpectrum) if column.name not in ("dtype", "eigenvalues")
    ]
    return {row.name: {column: getattr(row, column) for column in columns} for row in report}
