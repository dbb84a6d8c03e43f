"""Cards of adapters whose settings and names come from others, read by parsers of YAML and Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

import lorank
from lorank._internal.printable import printable, shortened
from lorank.adapters.markdown import markdown_text, yaml_string
from tests.support.foreign_text import TEXTS, foreign_texts, wide_texts, write_adapter

_PARSER = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
_PLAIN = {"text", "softbreak", "text_special"}


def inline(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or []]


@given(st.one_of(wide_texts, foreign_texts))
def test_yaml_reads_the_same_text(text: str) -> None:
    scalar = yaml_string(text)
    assert yaml.safe_load(f"key: {scalar}\nother: 1\n") == {"key": text, "other": 1}
    assert "---" not in scalar
    assert scalar.isprintable()


@given(foreign_texts, st.sampled_from(["", "# ", "- "]))
def test_markdown_shows_text_only(text: str, before: str) -> None:
    tokens = _PARSER.parse(f"{before}{markdown_text(text)}")
    blocks = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
    assert blocks <= {"inline", "paragraph", "heading", "bullet_list", "list_item"}
    assert ("heading" in blocks) == (before == "# ")
    assert [token.type for token in tokens].count("bullet_list_open") == (before == "- ")
    assert {token.type for token in inline(tokens)} <= _PLAIN


@given(foreign_texts)
def test_markdown_shows_the_printable_text(text: str) -> None:
    shown = "".join(token.content for token in inline(_PARSER.parse(markdown_text(text))))
    assert shown == printable(shortened(text, 2000)).strip()


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=foreign_texts)
def test_cards_hold_no_markup_of_others(base: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("card")
    write_adapter(folder / "a", ["layers.0.q_proj"], base_model_name_or_path=base)
    lorank.compress(folder / "a", avg_rank=1, progress=False).save(folder / "b")
    check_card(folder / "b" / "README.md", base)


@pytest.mark.parametrize("text", TEXTS[:20:4])
def test_notes_and_actions_of_others_are_text(text: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", ["layers.0.q_proj"], base_model_name_or_path="org/model")
    adapter = lorank.compress(tmp_path / "a", avg_rank=1, progress=False)
    assert adapter.certificate is not None
    object.__setattr__(adapter.certificate, "action", text)
    object.__setattr__(adapter, "notes", (text, "The scale was kept"))
    adapter.save(tmp_path / "b")
    check_card(tmp_path / "b" / "README.md", "org/model")


def check_card(path: Path, base: str) -> None:
    card = path.read_text("utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "base_model": base, "tags": ["lora", "lorank"]}
    tokens = _PARSER.parse(body)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2"]
    kinds = {token.type for token in inline(tokens)}
    assert kinds <= {*_PLAIN, "code_inline"}
    assert not any(token.type.startswith(("html", "fence", "code_block", "blockquote")) for token in tokens)
