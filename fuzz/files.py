"""Damaged files of every format that Python reads: ``python -m fuzz.files SECONDS``.

Copies of a good file are damaged. Each must be read as a valid result, or be refused by one error that names
the file. A copy that fails is kept in ``fuzz/artifacts/files``, and ends the run.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lorank
from tests.support.mutations import byte_mutations, json_mutations, text_mutations
from tests.support.saved_results import FORMATS, Saved

ARTIFACTS = Path(__file__).parent / "artifacts" / "files"
# Copies with other bytes before those with other values.
TURN = 500


def damaged(saved: Saved, content: bytes, seed: int) -> Iterator[bytes]:
    """Yield damaged copies without end."""
    chance = random.Random(seed)
    while True:
        yield from byte_mutations(content, chance.randrange(1 << 30), TURN)
        if saved.name.endswith(".csv"):
            for text in text_mutations(content.decode(), chance.randrange(1 << 30), TURN):
                yield text.encode("utf-8", "surrogatepass")
        elif saved.name.endswith(".json"):
            texts = list(json_mutations(content.decode()))
            chance.shuffle(texts)
            for text in texts[:TURN]:
                # A second fault, in the bytes of a file with a fault in its values.
                encoded = text.encode()
                yield encoded
                yield from byte_mutations(encoded, chance.randrange(1 << 30), 1)


def is_handled(saved: Saved, path: Path, copy: bytes) -> bool:
    """Return True if reading gives a valid result, or an error that names the file."""
    path.write_bytes(copy)
    try:
        value = saved.read(path)
    except (lorank.FormatError, ValueError, OSError) as error:
        return path.name in str(error) or str(path.parent) in str(error)
    saved.use(value, path.parent)
    return True


def main(seconds: float) -> int:
    """Damage every format for an equal share of the time; print the numbers of copies."""
    for saved in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, saved.name)
            saved.write(path)
            content, tried = path.read_bytes(), 0
            end = time.monotonic() + seconds / len(FORMATS)
            for copy in damaged(saved, content, seed=time.time_ns()):
                try:
                    if not is_handled(saved, path, copy):
                        raise AssertionError("the error does not name the file")
                except Exception:
                    ARTIFACTS.mkdir(parents=True, exist_ok=True)
                    (ARTIFACTS / saved.name).write_bytes(copy)
                    print(f"{saved.name}: failed, see {ARTIFACTS / saved.name}")
                    raise
                tried += 1
                if time.monotonic() > end:
                    break
        print(f"{saved.name}: {tried:,} copies", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
