"""Look-up in `rank_pattern`: the first key that matches by PEFT's rule."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorank
from lorank.peft_format.pattern_table import PatternTable
from lorank.peft_format.rank_patterns import rank_keys
from tests.internal.test_patterns import PIECES

NAMES = st.text("ab.0_", min_size=1, max_size=8)
KEYS = st.one_of(
    NAMES,
    NAMES.map(re.escape),
    NAMES.map(lambda name: f"^{name}"),
    NAMES.map(lambda name: f"{name}$"),
    st.lists(NAMES, min_size=1, max_size=3).map("|".join),
    st.lists(NAMES.map(re.escape), min_size=1, max_size=3).map(lambda names: f"(?:{'|^'.join(names)})"),
    st.lists(NAMES, min_size=1, max_size=3).map(lambda names: f"^({'|'.join(names)})$"),
    PIECES,
)
MODULES = st.text("ab.0_\n", max_size=9)


def by_peft(keys: list[str], name: str) -> int:
    """Return the position of the first key that matches, as in PEFT's `get_pattern_key`."""
    return next((i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)), -1)


@settings(max_examples=300, deadline=None)
@given(st.lists(KEYS, max_size=4, unique=True), st.lists(MODULES, min_size=1, max_size=4))
def test_first_key_is_that_of_peft(keys: list[str], modules: list[str]) -> None:
    try:
        table = PatternTable({key: i for i, key in enumerate(keys)}, "a test")
        found = [table.get(name, -1) for name in modules]
    except ValueError:
        with pytest.raises(re.error):
            [re.compile(rf"(.*\.)?({key})$") for key in keys]
    except lorank.FormatError:
        return  # `re` would take as long.
    else:
        assert found == [by_peft(keys, name) for name in modules]


@pytest.mark.parametrize(
    "key", ["", "a|", "()", "(?:)", "(?i)A", "(?i:A)", "a{2}", "a)(b", "(a))((b)", r"\(a", r"a\|b"]
)
def test_unusual_keys(key: str) -> None:
    for name in ("", "a", "A", "aa", "x.a", "x.", "ab", "a|b", "(a", "a\n", "x.a\n"):
        try:
            expected = by_peft([key], name)
        except re.error:
            continue
        assert PatternTable({key: 0}, "a test").get(name, -1) == expected


def test_many_keys_and_many_modules() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(100) for j in range(100)]
    plain = PatternTable({name: i for i, name in enumerate(names)}, "a test")
    assert [plain.get(f"base.{name}", -1) for name in names] == list(range(10_000))
    ranks = {name: i % 30 + 1 for i, name in enumerate(names)}
    compact = PatternTable({key: rank for rank, key in rank_keys(ranks).items()}, "a test")
    assert [compact.get(name, -1) for name in names] == list(ranks.values())


def test_dots_in_many_positions() -> None:
    """Dots of keys of one length may stand in more places than are looked up."""
    keys = ["".join(rows) for rows in ([*"aaaaaaaaaaaa"],)]
    keys += ["a" * i + "." + "a" * (j - i - 1) + "." + "a" * (11 - j) for j in range(12) for i in range(j)]
    table = PatternTable({key: i for i, key in enumerate(keys)}, "a test")
    for i in range(12):
        for j in range(12):
            name = "".join("b" if k in (i, j) else "a" for k in range(12))
            assert table.get(name, -1) == by_peft(keys, name)
