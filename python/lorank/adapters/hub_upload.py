"""Uploads a written adapter to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorank._internal import extras
from lorank.adapters import card
from lorank.adapters.metadata import CERTIFICATE_FILE
from lorank.peft_format.names import PICKLED_WEIGHTS_FILE

_CARD = "README.md"

# Files of an earlier adapter, which must not contradict the new one.
_STALE = [PICKLED_WEIGHTS_FILE, CERTIFICATE_FILE]


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    message: str,
    token: str | bool | None,
) -> str:
    """Upload the files of a folder in one commit; return the address of the commit.

    A card of another program in the repository is kept. Files of an earlier adapter are removed.
    """
    hub = extras.require("huggingface_hub", "hub", "to upload an adapter")
    api = hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    ignored = [] if _may_replace_card(api, repo_id, revision) else [_CARD]
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=message,
        ignore_patterns=ignored,
        delete_patterns=_STALE,
    )
    return str(commit.commit_url)


def _may_replace_card(api: Any, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, _CARD, revision=revision):
        return True
    file = Path(api.hf_hub_download(repo_id, _CARD, revision=revision))
    return card.is_ours(file.read_text("utf-8", errors="replace"))
