"""Reads kinds, blocks and suffixes of modules from their dotted names, and selects modules by targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from lorank._core import FormatError
from lorank._internal.patterns import Expression, TimeLimit

Targets: TypeAlias = "str | Sequence[str] | None"
"""A selection of modules: names and suffixes, or one regular expression, as in PEFT's `target_modules`."""

ALL_LINEAR = "all-linear"

_EMBEDDING = re.compile(
    r"embeddings?|embed|embed_(tokens|positions|in|position|token)|(word|tok|token|position)_?embeddings?"
    r"|token_type_embeddings|wte|wpe|shared|relative_attention_bias|(token|position)_embd|token_types"
)
_OUTPUT_HEADS = {
    "lm_head",
    "embed_out",
    "output_projection",
    "score",
    "classifier",
    "qa_outputs",
    "classification_head",
    "seq_relationship",
    "vocab_projector",
    "lm_prediction_head",
}
# The longest names of known models have some 150 characters in 15 parts.
_LONGEST = 1000
_MOST_PARTS = 100
_TOO_LONG = f"a name has at most {_LONGEST:,} characters and {_MOST_PARTS} parts: rename it"
_MOST_DIGITS = 18
_NUMBERS = re.compile(r"(\d+)")
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}


def is_embedding(name: str) -> bool:
    """Return True if a module looks up rows by index, judged by the last part of its name."""
    return _EMBEDDING.fullmatch(name.rpartition(".")[2]) is not None


def is_output_head(name: str) -> bool:
    """Return True if a module maps hidden states to logits; PEFT's "all-linear" leaves it out."""
    parts = name.split(".")
    # llama.cpp names the head `output`, as other models name inner layers.
    is_first = parts in (["output"], ["output", "weight"]) or parts[:2] == ["cls", "predictions"]
    return is_first or not _OUTPUT_HEADS.isdisjoint(parts)


def is_router(name: str) -> bool:
    """Return True if a module distributes tokens over experts; it is rarely adapted."""
    return without_parameter(name).rpartition(".")[2] in _ROUTERS


def is_parameter(name: str) -> bool:
    """Return True for the name of a weight, which PEFT adapts as a parameter by that name."""
    return name.endswith(".weight")


def without_parameter(name: str) -> str:
    """Return the name of a module, given that name or the name of its weight."""
    return name.removesuffix(".weight")


def spellings(name: str) -> list[str]:
    """Return the names that select a module: its name with and without the name of its weight."""
    return list(dict.fromkeys([name, without_parameter(name)]))


def is_in_experts(name: str) -> bool:
    """Return True if a parameter belongs to a container of experts."""
    parts = name.split(".")
    return any(part == "experts" or part.endswith("_exps") or "moe" in part for part in parts)


def block_of(name: str) -> str:
    """Return the block of a module: its name up to the first number, or its name if it has none.

    Examples
    --------
    >>> block_of("model.layers.3.self_attn.q_proj")
    'model.layers.3'
    >>> block_of("encoder.block.0.layer.1.DenseReluDense.wi")
    'encoder.block.0'
    >>> block_of("pooler.dense")
    'pooler.dense'
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return name


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by value.

    Examples
    --------
    >>> sorted(["block.10", "block.2"], key=natural_key)
    ['block.2', 'block.10']
    """
    return [number_first(part) for part in _NUMBERS.split(name)]


def number_first(part: str) -> tuple[int, str]:
    """Return a key that sorts a part of a name: numbers by value, before text."""
    return (int(part), "") if is_number(part) else (-1, part)


def is_number(part: str) -> bool:
    """Return True for a decimal number of a size that counts anything; Python refuses thousands of digits."""
    return part.isdecimal() and len(part) <= _MOST_DIGITS


def check_sizes(label: str, names: Iterable[str]) -> None:
    """Raise FormatError for a name so long or deep that work on its parts would not end in time.

    Parameters
    ----------
    label
        The file that holds the names.
    names
        Names of tensors.
    """
    for name in names:
        if len(name) > _LONGEST or name.count(".") >= _MOST_PARTS:
            raise FormatError(f"{label}: tensor {name[:60]!r}...: {_TOO_LONG}")


def suffixes(name: str) -> Iterator[str]:
    """Yield the dotted suffixes of a name, longest first.

    Examples
    --------
    >>> list(suffixes("layers.0.q_proj"))
    ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    # The suffixes of a name of dots have a length that is quadratic in its own.
    if name.count(".") >= _MOST_PARTS:
        raise ValueError(f"{name[:60]!r}...: {_TOO_LONG}")
    yield name
    dot = name.find(".")
    while dot >= 0:
        yield name[dot + 1 :]
        dot = name.find(".", dot + 1)


def is_suffix(short: str, name: str) -> bool:
    """Return True if `short` is `name` or one of its dotted suffixes."""
    return name == short or name.endswith(f".{short}")


def option_expression(option: str, text: str, limit: TimeLimit | None = None) -> Expression:
    """Compile a regular expression that is the value of an option.

    Parameters
    ----------
    option
        The name of the option.
    text
        The value.
    limit
        The time limit that the expressions of an option share; by default each has its own.

    Raises
    ------
    ValueError
        If the value is not a regular expression; the message names the option.
    """
    if not isinstance(text, str):
        raise ValueError(f"{option} must be a regular expression, not {text!r}")
    try:
        return Expression(text, limit or TimeLimit(option))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def matcher(targets: str | Sequence[str], origin: str = "") -> Callable[[str], bool]:
    """Return a function that returns True for names that targets select.

    The function raises FormatError if an expression exceeds its time limit.

    Parameters
    ----------
    targets
        A regular expression for whole names, or a list of names and suffixes.
    origin
        The option, or the file and its setting, that holds the targets, for messages.

    Raises
    ------
    ValueError
        If the string is not a regular expression.

    Examples
    --------
    >>> is_target = matcher(["q_proj"])
    >>> is_target("layers.0.q_proj"), is_target("layers.0.k_proj")
    (True, False)
    """
    if isinstance(targets, str):
        try:
            return Expression(targets, TimeLimit(origin or "targets")).matches
        except ValueError as error:
            raise ValueError(f"{origin}: {error}" if origin else str(error)) from None
    selected = frozenset(targets)
    if not selected:
        return lambda _: False
    return lambda name: not selected.isdisjoint(suffixes(name))


def check_known(targets: Targets, names: Iterable[str]) -> None:
    """Check that every entry of a list selects a name, so that a misspelt entry is an error.

    Raises
    ------
    ValueError
        If an entry selects no name. A regular expression may select none.
    """
    if targets is None or isinstance(targets, str):
        return
    if absent := unknown(targets, names):
        raise ValueError(f"no module is named {absent[0]!r}, and no module's name ends with it")


def unknown(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the targets that are neither names nor suffixes of names."""
    entries = frozenset(targets)
    known = {suffix for name in names for suffix in suffixes(name) if suffix in entries}
    return [target for target in targets if target not in known]


def filtered(names: Iterable[str], include: Targets, exclude: Targets) -> list[str]:
    """Return the names that `include` selects (all for None) and `exclude` does not.

    Raises
    ------
    ValueError
        If an entry of the list `include` selects no name.
    """
    names = list(names)
    check_known(include, names)
    included = (lambda _: True) if include is None else matcher(include, "include")
    excluded = (lambda _: False) if exclude is None else matcher(exclude, "exclude")
    return [name for name in names if included(name) and not excluded(name)]
