"""Damaged files of every format: reading returns a valid result, or raises one error that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import lorank
from tests.support.mutations import byte_mutations, json_mutations, text_mutations
from tests.support.saved_results import FORMATS, Saved


def mutations(name: str, content: bytes, count: int) -> Iterator[bytes]:
    """Yield damaged copies of a file: `count` with other bytes, and all those with other values."""
    yield from byte_mutations(content, seed=1, count=count)
    if name.endswith(".json"):
        yield from (text.encode() for text in json_mutations(content.decode()))
    elif name.endswith(".csv"):
        texts = text_mutations(content.decode(), seed=2, count=count)
        yield from (text.encode("utf-8", "surrogatepass") for text in texts)
    elif name.endswith(".jsonl"):
        lines = content.decode().splitlines()
        for index in (0, 1):
            for text in json_mutations(lines[index]):
                yield "\n".join([*lines[:index], text, *lines[index + 1 :], ""]).encode()


def try_damaged(saved: Saved, folder: Path, count: int, step: int) -> int:
    """Read damaged copies of a file, use those that can be read, and return the number of copies."""
    path = folder / saved.name
    saved.write(path)
    content = path.read_bytes()
    saved.use(saved.read(path), folder)
    tried = 0
    for damaged in islice(mutations(saved.name, content, count), 0, None, step):
        path.write_bytes(damaged)
        tried += 1
        try:
            value = saved.read(path)
        except (lorank.FormatError, ValueError, OSError) as error:
            message = str(error)
        else:
            message = str(path)
            saved.use(value, folder)
        assert path.name in message or str(path.parent) in message, damaged[:200]
    return tried


@pytest.mark.parametrize("saved", FORMATS, ids=lambda saved: saved.name)
def test_some_damaged_files(saved: Saved, tmp_path: Path) -> None:
    assert try_damaged(saved, tmp_path, count=200, step=101) > 1


@pytest.mark.slow
@pytest.mark.parametrize("saved", FORMATS, ids=lambda saved: saved.name)
def test_many_damaged_files(saved: Saved, tmp_path: Path) -> None:
    assert try_damaged(saved, tmp_path, count=5000, step=1) > 5000
