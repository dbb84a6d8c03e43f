"""Every public operation returns a `LoraAdapter`, from adapters, their contents and paths."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorank
from lorank.adapters.content import AdapterContent
from lorank.adapters.reading import read_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    config = LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "read", [lorank.LoraAdapter.load, read_adapter, str], ids=["adapter", "content", "path"]
)
def test_operations_return_adapters(folder: Path, read: object) -> None:
    assert callable(read)
    given = read(folder)
    results = [
        lorank.compress(given, rank_ratio=0.5, progress=False),
        lorank.elastic(given, progress=False),
        lorank.merge([given, given], rank_ratio=0.5, progress=False),
        *lorank.family(given, [1, 2], progress=False).values(),
    ]
    assert {type(result) for result in results} == {lorank.LoraAdapter}


def test_extraction_returns_an_adapter() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(1)
    assert type(lorank.extract(base, tuned, avg_rank=1, progress=False)) is lorank.LoraAdapter


def test_loading_returns_adapters(folder: Path) -> None:
    assert type(lorank.LoraAdapter.load(folder)) is lorank.LoraAdapter
    assert type(lorank.LoraAdapter.load(folder, avg_rank=2)) is lorank.LoraAdapter


def test_replace_keeps_the_type(folder: Path) -> None:
    content = read_adapter(folder)
    adapter = lorank.LoraAdapter.from_content(content)
    assert type(content) is AdapterContent
    assert type(replace(content, label="x")) is AdapterContent
    assert type(replace(adapter, label="x")) is lorank.LoraAdapter
    certificate = lorank.compress(adapter, avg_rank=1, progress=False).certificate
    assert certificate is not None
    assert type(adapter.with_certificate(certificate)) is lorank.LoraAdapter


def test_subclass_is_kept(folder: Path) -> None:
    class Named(lorank.LoraAdapter):
        pass

    small = lorank.compress(Named.from_content(read_adapter(folder)), avg_rank=1, progress=False)
    assert type(small) is Named
