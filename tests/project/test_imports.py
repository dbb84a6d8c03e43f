"""The imports of the package have no circles, and its files stay small.

Imports inside functions and under TYPE_CHECKING count, as do relative ones. `from lorank import _core` is an
import of `lorank._core`; `from lorank import analyze` is one of `lorank` itself.
"""

from __future__ import annotations

import ast
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import lorank

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "lorank"

# Harmless imports, which are ignored: (importer, imported) -> reason. The names are those of modules, such as
# "lorank.report.html", or of folders and files of the top level, such as "lorank.report".
ALLOWED: dict[tuple[str, str], str] = {}

# The public ideas: files and folders of the top level.
TOP_LEVEL = {
    "__init__",
    "_core",
    "_internal",
    "adapter",
    "adapters",
    "allocation",
    "analysis",
    "baking",
    "cli",
    "compression",
    "modules",
    "operations",
    "peft_format",
    "profiling",
    "report",
    "runtimes",
    "sources",
    "statistics",
    "task_spectra",
    "training",
}

Graph = dict[str, set[str]]


def modules_of(package: Path) -> dict[str, Path]:
    """Return the files of a package by module name, compiled modules by their stubs."""
    files = {}
    for suffix in (".pyi", ".py"):
        for path in sorted(package.rglob(f"*{suffix}")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(module: str, files: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a module imports anywhere in its file."""
    path = files[module]
    folder = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = folder.split(".")[: len(folder.split(".")) - node.level + 1]
                origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin in files:
                names = (f"{origin}.{alias.name}" for alias in node.names)
                yield from (name if name in files else origin for name in names)


def graph_of(package: Path) -> Graph:
    """Return the imported modules of every module, without allowed imports."""
    files = modules_of(package)
    return {
        module: {
            name for name in imports_of(module, files) if name != module and (module, name) not in ALLOWED
        }
        for module in files
    }


def top_level(module: str) -> str:
    """Return the folder or file of the top level that contains a module."""
    return ".".join(module.split(".")[:2])


def folders_of(graph: Graph) -> tuple[Graph, dict[tuple[str, str], tuple[str, str]]]:
    """Return the imported folders of every top-level folder, and an example of each import."""
    folders: Graph = {top_level(module): set() for module in graph}
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for module, imported in graph.items():
        for name in sorted(imported):
            pair = top_level(module), top_level(name)
            if pair[0] != pair[1] and pair not in ALLOWED:
                folders[pair[0]].add(pair[1])
                examples.setdefault(pair, (module, name))
    return folders, examples


def shortest_circle(graph: Graph, start: str) -> list[str]:
    """Return the shortest path from a node to itself, or nothing if there is none."""
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for name in sorted(graph[node]):
            if name == start:
                path = [node]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return [*path[::-1], start]
            if name not in came_from:
                came_from[name] = node
                queue.append(name)
    return []


def circles_of(graph: Graph) -> list[list[str]]:
    """Return circles such that every node of any circle lies on one of them, the shortest ones first."""
    found = sorted(filter(None, (shortest_circle(graph, node) for node in sorted(graph))), key=len)
    kept: list[list[str]] = []
    for circle in found:
        if not any(set(circle) == set(other) for other in kept):
            kept.append(circle)
    return kept


def listed(lines: Iterable[str]) -> str:
    return "\n" + "\n".join(lines)


def path_of(module: str) -> str:
    """Return the path of a module or folder within the package."""
    files = modules_of(PACKAGE)
    return str(files[module].relative_to(PACKAGE)) if module in files else module


def test_modules_import_without_circles() -> None:
    circles = circles_of(graph_of(PACKAGE))
    assert not circles, listed(" -> ".join(path_of(module) for module in circle) for circle in circles)


def test_folders_import_without_circles() -> None:
    folders, examples = folders_of(graph_of(PACKAGE))
    circles = circles_of(folders)
    assert not circles, listed(
        " -> ".join(circle)
        + "".join(
            f"\n    {path_of(a)} imports {path_of(b)}"
            for a, b in (examples[pair] for pair in itertools.pairwise(circle))
        )
        for circle in circles
    )


def test_allowed_imports_exist() -> None:
    files = modules_of(PACKAGE)
    pairs = {(module, name) for module in files for name in imports_of(module, files)}
    pairs |= {(top_level(module), top_level(name)) for module, name in pairs}
    assert ALLOWED.keys() <= pairs
    assert all(ALLOWED.values()), "every allowed import needs a reason"


def test_circles_are_found(tmp_path: Path) -> None:
    """Circles through functions, TYPE_CHECKING, relative imports and folders are all named."""
    files = {
        "__init__": "",
        "_core": "",
        "plain": "from pack import _core\nimport json",
        "one/__init__": "",
        "one/first": "def late():\n    from pack.two import second",
        "one/other": "from . import third",
        "one/third": "from .other import x",
        "two/__init__": "",
        "two/second": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.one.first",
        "two/alone": "from pack.plain import x\nfrom ..three.leaf import y",
        "three/__init__": "",
        "three/leaf": "from ..two import z",
    }
    for name, text in files.items():
        path = tmp_path / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = graph_of(tmp_path / "pack")
    assert graph["pack.plain"] == {"pack._core"}
    assert graph["pack.two.alone"] == {"pack.plain", "pack.three.leaf"}
    assert circles_of(graph) == [
        ["pack.one.first", "pack.two.second", "pack.one.first"],
        ["pack.one.other", "pack.one.third", "pack.one.other"],
    ]
    folders, examples = folders_of(graph)
    assert circles_of(folders) == [
        ["pack.one", "pack.two", "pack.one"],
        ["pack.three", "pack.two", "pack.three"],
    ]
    assert examples["pack.three", "pack.two"] == ("pack.three.leaf", "pack.two")


def test_top_level_holds_public_ideas_only() -> None:
    found = {module.split(".")[1] if "." in module else "__init__" for module in modules_of(PACKAGE)}
    assert found == TOP_LEVEL


@pytest.mark.parametrize(
    ("folder", "pattern", "limit"),
    [("python/lorank", "*.py", 400), ("rust", "*/src/**/*.rs", 400), ("tests", "*.py", 600)],
)
def test_files_are_short(folder: str, pattern: str, limit: int) -> None:
    find = (ROOT / folder).glob if "/" in pattern else (ROOT / folder).rglob
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in find(pattern)}
    assert lengths
    long = [f"{path.relative_to(ROOT)}: {lines}" for path, lines in lengths.items() if lines > limit]
    assert not long, listed(sorted(long))


def test_dir_lists_public_names_only() -> None:
    extra = [name for name in dir(lorank) if name not in lorank.__all__ and not name.startswith("__")]
    assert not extra
    assert set(lorank.__all__) <= set(dir(lorank))
