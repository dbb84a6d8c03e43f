"""Texts that act as markup, commands or code where they are not escaped, and checks that they did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

TEXTS = [
    "q\x1b]0;title\x07\x1b[2J",
    "q\x9b31m\x7f",
    "[red]q[/red]",
    "[/x]q[bold]",
    "[link=file:///etc]q[/link]",
    ":smile: q",
    "a\nb\r\tc\x0b\x0c\x85\u2028\u2029d",
    "\u202eabc\u2066def\u2069\u200f",
    "a\u200bb\u200d\ufeffc\u00add",
    "q\\x1b",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    '"><b id="x">&lt;&amp;',
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@SUM(1)",
    "'=1",
    "org/m\nlicense: mit\n---\n\n# Verified\n<img src=x>\n---",
    "# heading [link](http://x) `code` *b* _i_ ~~s~~ | & &lt; http://x www.x.org a@b.c $x$",
    "- [ ] 1. > + = ---",
    "12) item",
    "``` ` `` \\` \\",
    "schicht.ä.漢字.😀",
    "%{x} {task.description} {0} %s",
    "2020-01-01",
    "x" * 3000,
    "漢" * 500,
]

_CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("\x1b\x07\x9b\n\r\t[]<>&\"'`*_#-:=\\|$@\u202e\u200b\u2028./"),
)
foreign_texts = st.one_of(st.sampled_from(TEXTS), st.text(_CHARACTERS, min_size=1, max_size=30))

# Files with longer names of tensors are refused.
foreign_names = foreign_texts.filter(lambda text: len(text) < 900)

# Also halves of surrogate pairs, which names in pickles and paths of other encodings hold.
wide_texts = st.text(
    st.one_of(st.characters(), st.characters(categories=["Cs"]), st.characters(categories=[*"CMZ"])),
    min_size=1,
    max_size=20,
)


def unprintable(text: str) -> list[str]:
    """Return the characters of an output, except its line ends, that a terminal does not show."""
    return sorted({char for char in text if char != "\n" and not char.isprintable()})


def write_model(path: Path, names: list[str], shape: tuple[int, int] = (6, 8)) -> Path:
    """Write a checkpoint with a matrix for each name, and a vector for each name that is skipped."""
    rng = np.random.default_rng(0)
    matrices = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name in names}
    save_file(matrices | {f"{name}.bias": np.ones(3, np.float32) for name in names}, path)
    return path


def write_adapter(folder: Path, names: list[str], **settings: Any) -> Path:
    """Write a PEFT adapter with a module for each name."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in names:
        for factor, shape in (("lora_A", (2, 8)), ("lora_B", (6, 2))):
            key = f"base_model.model.{name}.{factor}.weight"
            tensors[key] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder
