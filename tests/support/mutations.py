"""Damaged copies of good files: changed bytes, and JSON with other values, keys and lists."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values of every type of JSON, and the extremes of each.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "1",
    "inf",
    "nan",
    "\ud800",
    "\x00\x1b[31m",
    "a\nb",
    "٣",
    "x" * 10_000,
    [],
    [None],
    ["1"],
    [1, 2, 3],
    [[[[1]]]],
    {},
    {"": {}},
    {"name": 1},
]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in JSON content."""
    yield path
    items: Any = content.items() if isinstance(content, dict) else []
    for key, value in enumerate(content) if isinstance(content, list) else items:
        yield from places(value, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return content with another value at a path."""
    if not path:
        return value
    changed = copy.deepcopy(content)
    _parent(changed, path)[path[-1]] = value
    return changed


def json_mutations(text: str) -> Iterator[str]:
    """Yield copies of a JSON text: each value replaced by each of `VALUES`, each key or entry removed or
    doubled, and nested deeply."""
    content = json.loads(text)
    for path in places(content):
        for value in VALUES:
            yield json.dumps(replaced(content, path, value))
        if not path:
            continue
        changed = copy.deepcopy(content)
        del _parent(changed, path)[path[-1]]
        yield json.dumps(changed)
        changed = copy.deepcopy(content)
        parent = _parent(changed, path)
        if isinstance(parent, list):
            parent.insert(0, parent[path[-1]])
        else:
            parent[f"{path[-1]} "] = parent[path[-1]]
        yield json.dumps(changed)
        marked = json.dumps(replaced(content, path, "MARK"))
        for deep in ("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * 100_000, "1e400", "-0"):
            yield marked.replace('"MARK"', deep)
        # The parser keeps the last of two equal keys.
        yield text.replace("{", '{"modules": 1, "name": 2, "format": 3, ', 1)


def byte_mutations(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yield copies of a file that are cut off, or have bytes changed, removed, repeated or added."""
    yield from (b"", b"\x00" * 64, content[:1], content[:-1], b"\xef\xbb\xbf" + content, content + b"\x00")
    yield from (b"\x1f\x8b\x08" + content, content * 2, content.replace(b"\n", b"\r"), b"\xff\xfe" + content)
    chance = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        kind = chance.randrange(5)
        start = chance.randrange(len(content))
        stop = min(len(content), start + chance.choice((1, 2, 8, 64, 1024)))
        if kind == 0:
            changed[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[start:stop] = chance.randbytes(stop - start)
        elif kind == 2:
            del changed[start:stop]
        elif kind == 3:
            changed[start:start] = changed[start:stop]
        else:
            del changed[start:]
        yield bytes(changed)


def text_mutations(text: str, seed: int, count: int) -> Iterator[str]:
    """Yield copies of a CSV text with other cells, lines and separators."""
    chance = random.Random(seed)
    cells = [
        "",
        '"',
        '""',
        '"a',
        ",",
        ",,",
        "\x00",
        "1_000",
        "٣",
        " 1",
        "1e400",
        "nan",
        "-1",
        "0x1",
        "x" * 200_000,
    ]
    cells += ["\r", "\n", "NaN", "inf", "1.5", "9" * 400, "true", "\ud7ff", "=1+1", ";"]
    for _ in range(count):
        lines = text.split("\r\n")
        row = chance.randrange(len(lines))
        parts = lines[row].split(",")
        kind = chance.randrange(5)
        if kind == 0:
            lines.insert(row, lines[row])
        elif kind == 1:
            parts[chance.randrange(len(parts))] = chance.choice(cells)
        elif kind == 2:
            del parts[chance.randrange(len(parts))]
        elif kind == 3:
            parts.insert(chance.randrange(len(parts)), chance.choice(cells))
        else:
            position = chance.randrange(len(text))
            yield text[:position] + chance.choice(cells) + text[position:]
            continue
        if kind:
            lines[row] = ",".join(parts)
        yield "\r\n".join(lines)


def _parent(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        content = content[key]
    return content
