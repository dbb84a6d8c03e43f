"""Damaged models, indices, settings and adapters end with one line, and nothing is written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.baking.merged_models import saved_pair
from tests.support import tiny_models
from tests.support.command_line import assert_one_line
from tests.support.mutations import byte_mutations, json_mutations

COUNT = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sharded model and an adapter."""
    folder = tmp_path_factory.mktemp("hostile")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    saved_pair(tiny_models.llama(), config, folder, max_shard_size="60KB")
    return folder


def damaged(file: Path) -> Iterator[bytes]:
    """Yield damaged contents of a file, the same in each run."""
    if file.suffix == ".json":
        every = [text.encode("utf-8", "surrogatepass") for text in json_mutations(file.read_text())]
        yield from random.Random(0).sample(every, min(COUNT, len(every)))
    else:
        yield from byte_mutations(file.read_bytes(), 0, COUNT)


@pytest.mark.parametrize(
    "name",
    [
        "base/model.safetensors.index.json",
        "base/config.json",
        "base/model-00001-of-00003.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ],
)
def test_damaged_file_ends_with_one_line(name: str, pair: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(pair, tmp_path / "work"))
    file = next(iter(work.glob(name.replace("00003", "*"))))
    refused = 0
    for content in damaged(file):
        file.write_bytes(content)
        target = tmp_path / "baked"
        status = assert_one_line(["bake", work / "base", work / "adapter", "-o", target, "--quiet"])
        assert target.exists() == (status == 0)
        refused += status == 1
        shutil.rmtree(target, ignore_errors=True)
        assert_one_line(["verify", work / "base", work / "adapter", pair / "base", "--quiet"])
    assert refused or file.name == "config.json"
