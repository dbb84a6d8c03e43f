"""README, docs and docstrings: every example runs and prints what is shown; links and citations resolve."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import lorank
from lorank.cli import main
from tests.support import material

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "python" / "lorank"
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "rust").rglob("*.rs")]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


def pages_with_examples() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(page.read_text("utf-8"))]


def modules_with_examples() -> list[str]:
    files = [file for file in PACKAGE.rglob("*.py") if ">>> " in file.read_text("utf-8")]
    return [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in sorted(files)]


@pytest.fixture(scope="session")
def adapter(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real adapter of average rank 8, extracted from a full fine-tune."""
    folder = tmp_path_factory.mktemp("documentation") / "my-adapter"
    tuned = material.minilm_tuned()
    found = lorank.extract(minilm, tuned, avg_rank=8, exclude="embeddings.*", progress=False)
    found.save(folder)
    return folder


@pytest.fixture
def _folder(minilm: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder that holds the model and the adapter under the names that the pages use."""
    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).symlink_to(minilm)
    shutil.copytree(adapter, tmp_path / "my-adapter")
    monkeypatch.chdir(tmp_path)


def names_of_the_pages(minilm: Path) -> dict[str, Any]:
    """Return the objects that docs/index.md promises to the examples."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    ids = torch.randint(1000, 2000, (6, 4, 12))
    batches = [{"input_ids": x, "labels": torch.tensor([0, 1, 0, 1])} for x in ids]
    X, W = rng.standard_normal((200, 8)), rng.standard_normal((8, 4))
    settings = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["classifier"])
    return {
        "classifier": AutoModelForSequenceClassification.from_pretrained(minilm),
        "peft_classifier": get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(minilm), settings
        ),
        "batches": batches,
        "data": [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(4)],
        "X": X,
        "Y": X @ W + 0.1 * rng.standard_normal((200, 4)),
    }


def shown(text: str) -> str:
    """Return lines without indentation, blank lines and differences of spacing."""
    return "".join(f"{' '.join(line.split())}\n" for line in text.splitlines() if line.strip())


def printed(*arguments: str) -> str:
    """Return what the command line tool prints, run in this process, where transformers is imported once."""
    text, status = io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["lorank", *arguments]), redirect_stdout(text), redirect_stderr(text):
        try:
            main()
        except SystemExit as ending:
            status = ending.code
    # `check` ends with 1 where a runtime does not load the adapter correctly.
    assert status in ((None, 0, 1) if arguments[0] == "check" else (None, 0)), text.getvalue()
    return text.getvalue()


def run_session(session: str) -> None:
    """Run the commands of a console block; their output must be what the block shows, `...` any lines."""
    for command, expected in COMMAND.findall(session):
        program, *arguments = shlex.split(command)
        assert program == "lorank"
        lines = shown(expected).splitlines()
        pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(f"{line}\n") for line in lines)
        output = printed(*arguments)
        assert re.fullmatch(pattern, shown(output)), f"{command} printed\n{output}"


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("page", pages_with_examples(), ids=lambda page: page.name)
def test_examples_of_a_page_run(page: Path, minilm: Path) -> None:
    text = page.read_text("utf-8")
    names = names_of_the_pages(minilm) if "```python" in text else {}
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            # Blank lines in front, so that tracebacks point to the line of the page.
            exec(compile("\n" * text.count("\n", 0, block.start(2)) + block[2], str(page), "exec"), names)
        else:
            run_session(block[2])


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_of_docstrings_run(module: str) -> None:
    imported = importlib.import_module(module)
    result = doctest.testmod(imported)
    assert result.failed == 0
    assert result.attempted == inspect.getsource(imported).count(">>> "), "an example is skipped"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


def test_cited_keys_are_in_the_references() -> None:
    known = set(re.findall(r"^\| \[([^\]]+)\] \|", (ROOT / "docs/references.md").read_text(), re.MULTILINE))
    cited = {
        (key, file.name)
        for file in [*PAGES, *SOURCES]
        for source in re.findall(
            r"(.*)" if file.suffix == ".md" else r"Source: (.*)", file.read_text("utf-8")
        )
        for key in re.findall(r"\[([A-Z][A-Z0-9+-]+)\\?\](?!\()", source)
    }
    assert {(key, name) for key, name in cited if key not in known} == set()
    assert {"PARA", "GARD", "KSTAR", "SCHEDULES", "HTSR-LORA"} <= {key for key, _ in cited}


def test_picture_shows_every_module_of_a_block(minilm: Path) -> None:
    draw = runpy.run_path(str(ROOT / "docs/pictures/ranks.py"))["picture"]
    allocation = lorank.allocate(minilm, method="linear-decay", progress=False)
    drawn = ElementTree.fromstring(draw(allocation, "MiniLM"))
    cells = [
        box
        for box in drawn.iter("{http://www.w3.org/2000/svg}rect")
        if re.fullmatch(r"r\d+", box.get("class", ""))
    ]
    ranks = [rank for name, rank in allocation.ranks.items() if ".layer." in name]
    assert len(cells) == len(ranks) + len(set(ranks))  # a cell a module, and the legend
