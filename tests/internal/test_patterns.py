"""Regular expressions of unknown origin: the results of Python's `re`, within a time limit."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import lorank
from lorank._internal import patterns
from lorank._internal.pattern_cost import most_steps, syntax_tree
from lorank._internal.pattern_process import Answer, PatternProcess, StoppedError
from lorank._internal.patterns import Expression, TimeLimit

BOMBS = ["(a|a)*#", "(a+)+#", "(?:a*)*#", "(.*)*#", "(a|aa)+#", "(?=(a+)+#)a", r"(a*)*\1#", "(?i)(A|aa?)*#"]

PIECES = st.recursive(
    st.sampled_from(
        [*"ab.", r"\.", r"\d", "[ab]", "[^a]", ".*", "a*", "b+?", "", "^", "$", r"\b", r"\1", "(?!a)", "0"]
    ),
    lambda parts: st.one_of(
        st.lists(parts, max_size=4).map("".join),
        st.lists(parts, min_size=1, max_size=3).map(lambda p: f"({'|'.join(p)})"),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "{0,2}", "*?", "{2}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        parts.map(lambda p: f"(?<!{p})"),
        parts.map(lambda p: f"(?=.*{p})"),
    ),
    max_leaves=8,
)
NAMES = st.text("ab.0\nA", max_size=9)


def oracle(method: str, text: str, name: str) -> list[tuple[int, int]] | None:
    pattern = re.compile(text)
    found = getattr(pattern, method)(name)
    return None if found is None else [found.span(i) for i in range(pattern.groups + 1)]


@settings(max_examples=100, deadline=None)
@given(PIECES, NAMES, st.sampled_from(["match", "fullmatch", "search"]))
def test_equals_re_on_random_patterns(text: str, name: str, method: str) -> None:
    try:
        found = Expression(text, TimeLimit("a test")).spans(method, name)
    except ValueError:
        with pytest.raises(re.error):
            re.compile(text)
    except lorank.FormatError:
        return  # `re` would take as long.
    else:
        assert found == oracle(method, text, name)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(PIECES, NAMES), min_size=1, max_size=5))
def test_child_process_equals_re(questions: list[tuple[str, str]]) -> None:
    for text, name in questions:
        assert answer_of(CHILD.ask, 5.0, "match", text, name) == answer_of(oracle, "match", text, name)


def answer_of(ask: Callable[..., Any], *question: Any) -> Any:
    """Return the spans of a match, or the message about a malformed pattern."""
    try:
        answer = ask(*question)
    except (ValueError, re.error) as error:
        return str(error)
    except StoppedError:
        reject()
    return answer.spans if isinstance(answer, Answer) else answer


CHILD = PatternProcess()


@pytest.mark.parametrize("text", BOMBS)
def test_exponential_matches_end(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)
    expression = Expression(text, TimeLimit("a.json: the settings' rank_pattern"))
    start = time.monotonic()
    with pytest.raises(lorank.FormatError, match=r"a\.json: the settings' rank_pattern: .* takes more than"):
        expression.matches("a" * 60)
    with pytest.raises(lorank.FormatError, match="takes more than"):
        expression.matches("a")
    assert time.monotonic() - start < 30


def test_polynomial_matches_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)
    expression = Expression(".*a.*a.*a.*a.*#", TimeLimit("x"))
    assert not expression.matches("a" * 10)
    with pytest.raises(lorank.FormatError):
        expression.matches("a" * 100_000)


def test_many_fast_matches_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS_IN_ALL", 0.05)
    limit = TimeLimit("x")
    expressions = [Expression(f".*a{{{n}}}.*#", limit) for n in range(3)]
    with pytest.raises(lorank.FormatError):
        [expression.matches("a" * 60) for expression in expressions * 10_000]


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "a{4294967296}",
        "(" * 5000 + ")" * 5000,
        "*",
        "[z-a]",
        "(?P<a>b)(?P<a>c)",
        r"\8",
        "a" * 4_000_001,
        f"[a]{'(' * 2000}",
        "(?<=a*)b",
    ],
    ids=range(10),
)
def test_malformed_patterns_raise_with_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="is not a regular expression") as caught:
        Expression(text, TimeLimit("x"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_slow_compilation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)
    with pytest.raises(lorank.FormatError, match="takes more than"):
        Expression("(?i)" + "[\\0-\uffff]" * 20_000, TimeLimit("x"))


@pytest.mark.parametrize(
    "text",
    [
        r"(.*\.)?(q_proj)$",
        r".*\.(q_proj|k_proj|v_proj|o_proj)",
        r"model\.layers\.(?:[0-9]|1[0-5])\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"(?!(?:.*\.)?(?:lm_head|embed)$).+\.(?:proj|dense)",
        "|".join(re.escape(f"model.layers.{i}.mlp.up_proj") for i in range(1000)),
    ],
)
def test_usual_patterns_run_in_this_process(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatternProcess, "ask", None)
    expression = Expression(text, TimeLimit("x"))
    for name in ("model.layers.10.self_attn.q_proj", "model.layers.1.mlp.up_proj", "q_proj"):
        for method in ("match", "fullmatch"):
            assert expression.spans(method, name) == oracle(method, text, name)


def test_results_hold_without_a_syntax_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of Python may hide its parser, or change its trees."""
    monkeypatch.setattr(patterns, "syntax_tree", lambda _: None)
    assert Expression("a+", TimeLimit("x")).matches("aaa")
    monkeypatch.setattr(patterns, "syntax_tree", lambda _: [("NEW", 1), 5])
    assert Expression("a+", TimeLimit("x")).matches("aaa")


@pytest.mark.parametrize("text", ["a.*b.*c", "(a|b)?c*", "(?:ab|a.)*", "(a?b?){0,9}c", "((a|b)(c|d)){3}"])
@pytest.mark.parametrize("length", [0, 5, 50])
def test_bound_exceeds_the_steps_of_a_counting_matcher(text: str, length: int) -> None:
    """The bound of a longer text is larger, and a bound on a part of a pattern is smaller."""
    bound = most_steps(syntax_tree(text), length)
    assert bound >= len(syntax_tree(text))
    assert most_steps(syntax_tree(text), length + 1) >= bound
    assert most_steps(syntax_tree(text + "x"), length) >= bound


def test_threads_and_forked_processes_share_a_pattern(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from lorank._internal.patterns import Expression, TimeLimit\n"
        "expression = Expression('(a|b)*c', TimeLimit('x'))\n"
        "assert expression.matches('abc')\n"
        "child = os.fork()\n"
        "assert [expression.matches(x) for x in ('abc', 'ab', 'c') * 50] == [True, False, True] * 50\n"
        "if child == 0: sys.exit()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print('done')\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (run.stdout, run.stderr) == ("done\n", "")
    expression, found = Expression("(a|b)*c", TimeLimit("x")), []
    threads = [
        threading.Thread(target=lambda: found.extend(expression.matches(x) for x in ("abc", "ab") * 50))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 200
    assert len(found) == 400


def test_child_that_died_is_an_error_and_not_a_hang() -> None:
    process = PatternProcess()
    assert process.ask(5, "match", "a", "a").spans == [(0, 1)]
    assert process._child is not None
    process._child.kill()
    process._child.wait()
    with pytest.raises(StoppedError):
        process.ask(5, "match", "a", "a")
    assert process.ask(5, "match", "a", "b").spans is None


def test_names_of_any_characters_reach_the_child() -> None:
    for name in ("\ud800", "\n", "\0", "é" * 1000, '"\\', "a\u2028b"):
        assert CHILD.ask(5, "fullmatch", "(?s).*", name).spans == [(0, len(name))]
