"""Foreign text in a printable form: nothing invisible stays, ordinary text does, and names stay different."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorank
from lorank._internal.printable import printable, printable_name, shortened
from tests.support.foreign_text import foreign_texts, wide_texts


@given(st.one_of(wide_texts, foreign_texts))
def test_no_invisible_character_stays(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert not {unicodedata.category(char)[0] for char in shown} & {"C"}
    assert printable(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    "text", ["modèle", "漢字", "😀 ❤️ ☀️ 🚀", "עברית", "ไทย", "a b.c/d-e_f", r"re:layers\.\d+"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == printable_name(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x7f\x9b\xa0\xad", r"\x7f\x9b\xa0\xad"),
        ("\u202e\u2066\u200b\u2028\ufeff", r"\u202e\u2066\u200b\u2028\ufeff"),
        ("\udcff\U000e0041", r"\udcff\U000e0041"),
        ("q\ufe0f\ufe00\u3164\u034f", r"q\ufe0f\ufe00\u3164\u034f"),
    ],
)
def test_escapes_are_those_of_python(text: str, shown: str) -> None:
    assert printable(text) == printable_name(text) == shown


@given(st.lists(st.text(st.sampled_from("\\\x1b\nnx1bu0\u202e2e"), max_size=8), min_size=2, unique=True))
def test_different_names_differ(names: list[str]) -> None:
    assert len({printable_name(name) for name in names}) == len(names)


@given(st.text(), st.integers(1, 20))
def test_long_texts_keep_their_ends(text: str, ends: int) -> None:
    shown = shortened(text, ends)
    assert shown == text or (shown.startswith(text[:ends]) and shown.endswith(text[-ends:]))
    assert len(shown) <= 3 * ends or "characters left out" in shown


@pytest.mark.parametrize("kind", [lorank.LorankError, lorank.FormatError, lorank.NumericalError])
def test_messages_of_errors_are_printable(kind: type[Exception]) -> None:
    error = kind("tensor `q\x1b[2J\n` of m\udcff")
    assert str(error) == r"tensor `q\x1b[2J\n` of m\udcff"
    assert error.args == ("tensor `q\x1b[2J\n` of m\udcff",)
