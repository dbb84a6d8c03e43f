"""Kills of every command that writes, at random moments: ``python -m tests.soak.kills COMMAND TIMES``.

A child is forked for each run, so that the moments lie in the command's own work and not in its imports.
After each kill the outputs are those of before or those of a complete run, and the next complete run leaves
no hidden file behind.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save_file

from tests.soak.calls import adapter_folder, weights
from tests.support.kills import contents, leftovers

Arguments = Sequence[object]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that writes, and the command line that wrote the old output.

    Attributes
    ----------
    arguments
        Function from the folder of the inputs to the arguments.
    earlier
        Function to the arguments of the run before; None for no output before.
    """

    arguments: Callable[[Path], Arguments]
    earlier: Callable[[Path], Arguments] | None = None


def _adapter(verb: str, *options: object, replaced: bool = True) -> Command:
    """Return a command that writes an adapter over the result of a larger rank."""

    def arguments(folder: Path, rank: int) -> Arguments:
        inputs = [folder / "adapter0", folder / "adapter1"] if verb == "merge" else [folder / "adapter0"]
        return [verb, *inputs, "-o", folder / "out", "--avg-rank", rank, *options, "--overwrite", "-q"]

    earlier = (lambda folder: arguments(folder, 3)) if replaced else None
    return Command(lambda folder: arguments(folder, 2), earlier)


def _family(folder: Path, ranks: str) -> Arguments:
    return ["family", folder / "adapter0", "-o", folder / "out", "--avg-ranks", ranks, "--overwrite", "-q"]


def _extract(folder: Path, rank: int) -> Arguments:
    models = [folder / "base.safetensors", folder / "tuned.safetensors"]
    return ["extract", *models, "-o", folder / "out", "--avg-rank", rank, "--guess", "--overwrite", "-q"]


def _allocate(folder: Path, budget: int) -> Arguments:
    model = folder / "base.safetensors"
    return ["allocate", model, "-o", folder / "out", "--budget", budget, "--guess", "--overwrite", "-q"]


def _analyze(folder: Path, accuracy: str, *options: object) -> Arguments:
    model = folder / "base.safetensors"
    return [
        "analyze",
        model,
        "-o",
        folder / "out.json",
        "--accuracy",
        accuracy,
        *options,
        "--overwrite",
        "-q",
    ]


COMMANDS = {
    "compress": _adapter("compress", replaced=False),
    "compress --overwrite": _adapter("compress"),
    "merge --overwrite": _adapter("merge"),
    "family --overwrite": Command(lambda f: _family(f, "1,2"), lambda f: _family(f, "1,3")),
    "extract --overwrite": Command(lambda f: _extract(f, 2), lambda f: _extract(f, 3)),
    "allocate --overwrite": Command(lambda f: _allocate(f, 1000), lambda f: _allocate(f, 1400)),
    "analyze -o": Command(lambda f: _analyze(f, "exact"), lambda f: _analyze(f, "fast")),
    "analyze --resume": Command(lambda f: _analyze(f, "exact", "--resume", f / "journal.jsonl")),
    "check --fix": Command(
        lambda f: ["check", f / "adapter0", "--for", "vllm", "--fix", f / "out", "--overwrite"],
        lambda f: ["compress", f / "adapter0", "-o", f / "out", "--avg-rank", 2, "--overwrite", "-q"],
    ),
}


def run(arguments: Arguments, seconds: float | None = None) -> int:
    """Run the command line in a forked child, kill it after some seconds, and return its exit status."""
    import lorank.cli

    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.argv = ["lorank", *map(str, arguments)]
        status = 0
        try:
            lorank.cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outputs(folder: Path) -> dict[str, bytes]:
    """Return the contents of the outputs, without the journal."""
    return {name: data for name, data in contents(folder).items() if name.startswith("out")}


def killed(name: str, times: int) -> dict[str, int]:
    """Kill a command at random moments; return the numbers of kills before and after its result appeared."""
    command = COMMANDS[name]
    counts = {"killed": 0, "finished": 0, "old": 0, "new": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed in range(2):
            adapter_folder(folder, seed)
        save_file(weights(0), folder / "base.safetensors")
        save_file(weights(1), folder / "tuned.safetensors")
        arguments = command.arguments(folder)

        def prepare() -> dict[str, bytes]:
            if command.earlier is not None:
                assert run(command.earlier(folder)) == 0
            else:
                for path in [*folder.glob("out*"), *folder.glob("journal*")]:
                    _remove(path)
            return outputs(folder)

        old = prepare()
        begin = time.monotonic()
        assert run(arguments) == 0
        whole = time.monotonic() - begin
        new = outputs(folder)
        assert new != old
        moments = random.Random(name)
        for _ in range(times):
            prepare()
            status = run(arguments, whole * moments.random() * 1.1)
            counts["killed" if status == -signal.SIGKILL else "finished"] += 1
            found = outputs(folder)
            assert found in (old, new), f"{name}: a mixture {sorted(found)}"
            counts["new" if found == new else "old"] += 1
            assert run(arguments) == 0
            assert outputs(folder) == new
            assert not leftovers(folder), leftovers(folder)
    return counts


def _remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink()


if __name__ == "__main__":
    print(json.dumps(killed(sys.argv[1], int(sys.argv[2]))))
