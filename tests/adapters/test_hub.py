"""Adapters of the Hugging Face hub: hub ids from the cache, and the calls of an upload."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import lorank
from tests.support.layouts import llama_adapter


def cached(folder: Path, cache: Path) -> None:
    """Put a folder into a hub cache as `acme/adapter`."""
    repo = cache / "models--acme--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / "abc123")


def test_hub_id_of_an_adapter_is_found_in_the_cache(tmp_path: Path) -> None:
    cached(llama_adapter(tmp_path / "a"), tmp_path / "cache")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    code = "import lorank; a = lorank.LoraAdapter.load({!r}); print(len(a.modules), a.num_parameters)"

    def load(name: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", code.format(name)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    for name in ("acme/adapter", "acme/adapter@main"):
        result = load(name)
        assert result.stdout.split()[0] == "14", result.stderr
    message = "acme/none: no such file or folder; as a hub id, it is not in the local cache"
    assert message in load("acme/none").stderr


REAL_API = huggingface_hub.HfApi


class Api:
    """A stand-in for `HfApi` that accepts exactly its arguments, and records them."""

    calls: list[tuple[str, dict[str, Any]]]
    card: str | None

    def __init__(self, **options: Any) -> None:
        inspect.signature(REAL_API.__init__).bind(None, **options)
        Api.calls.append(("HfApi", options))

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(REAL_API, name))

        def call(*arguments: Any, **options: Any) -> Any:
            bound = dict(signature.bind(None, *arguments, **options).arguments)
            if name == "upload_folder":
                bound["files"] = sorted(file.name for file in Path(bound["folder_path"]).iterdir())
            Api.calls.append((name, bound))
            if name == "file_exists":
                return Api.card is not None
            return Api.card if name == "hf_hub_download" else SimpleNamespace(commit_url="https://hub/commit")

        return call


@pytest.mark.parametrize("text", [None, "Written by lorank 1", "Another card"])
def test_upload_makes_one_commit_and_keeps_cards_of_others(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Api.calls, Api.card = [], None
    if text is not None:
        (tmp_path / "README.md").write_text(text)
        Api.card = str(tmp_path / "README.md")
    small = lorank.compress(llama_adapter(tmp_path / "a"), avg_rank=2, progress=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert small.push_to_hub("acme/small", token="t", private=True, revision="dev") == "https://hub/commit"
    names = [name for name, _ in Api.calls]
    assert names.count("upload_folder") == 1
    calls = dict(Api.calls)
    assert calls["HfApi"] == {"token": "t"}
    created, uploaded = calls["create_repo"], calls["upload_folder"]
    assert (created["repo_id"], created["private"], created["exist_ok"]) == ("acme/small", True, True)
    assert (uploaded["repo_id"], uploaded["revision"]) == ("acme/small", "dev")
    assert uploaded["files"] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorank.json",
    ]
    assert uploaded["ignore_patterns"] == (["README.md"] if text == "Another card" else [])
    assert uploaded["delete_patterns"] == ["adapter_model.bin", "lorank.json"]
