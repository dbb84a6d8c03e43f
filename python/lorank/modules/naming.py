"""What a module's dotted name tells: its block, its role, whether a target selects it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

Targets: TypeAlias = "str | Sequence[str] | None"
"""Which modules: suffixes, or one regular expression, exactly as PEFT reads `target_modules`."""

ALL_LINEAR = "all-linear"

_EMBEDDING = re.compile(
    r"embeddings?|embed|embed_(tokens|positions|in|position|token)|(word|tok|token|position)_?embeddings?"
    r"|token_type_embeddings|wte|wpe|shared|relative_attention_bias"
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
_NUMBERS = re.compile(r"(\d+)")
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}


def is_embedding(name: str) -> bool:
    """Whether a module looks up rows by index, judged by the last part of its name."""
    return _EMBEDDING.fullmatch(name.rpartition(".")[2]) is not None


def is_output_head(name: str) -> bool:
    """Whether a module maps hidden states to logits; PEFT's "all-linear" leaves it out."""
    parts = name.split(".")
    return not _OUTPUT_HEADS.isdisjoint(parts) or parts[:2] == ["cls", "predictions"]


def is_router(name: str) -> bool:
    """Whether a module distributes tokens over experts; adapting it is rarely wanted."""
    return without_parameter(name).rpartition(".")[2] in _ROUTERS


def is_parameter(name: str) -> bool:
    """Return True for the name of a weight, which PEFT adapts by the parameter's own name."""
    return name.endswith(".weight")


def without_parameter(name: str) -> str:
    """Return the name of the module, given its own name or that of its weight."""
    return name.removesuffix(".weight")


def spellings(name: str) -> list[str]:
    """Return the names by which a module is selected: its own, and that without its parameter."""
    return list(dict.fromkeys([name, without_parameter(name)]))


def is_in_experts(name: str) -> bool:
    """Whether a parameter belongs to a container of experts."""
    parts = name.split(".")
    return any(part == "experts" or "moe" in part for part in parts)


def block_of(name: str) -> str:
    """The block that a module belongs to: its name up to the first number, or its own name.

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
    """A key that sorts names with their numbers as numbers: block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(name)]


def suffixes(name: str) -> Iterator[str]:
    """The dotted suffixes of a name, longest first: the name itself, then without its first part, ..."""
    yield name
    dot = name.find(".")
    while dot >= 0:
        yield name[dot + 1 :]
        dot = name.find(".", dot + 1)


def is_suffix(short: str, name: str) -> bool:
    """Whether `short` is `name` or a dotted suffix of it."""
    return name == short or name.endswith(f".{short}")


def expression(text: str) -> re.Pattern[str]:
    """A regular expression of unknown origin, compiled.

    Raises
    ------
    ValueError
        If it is none, or one that Python gives up on.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        short = repr(text if len(text) <= 80 else f"{text[:77]}...")
        raise ValueError(f"{short} is no regular expression: {error}") from None


def matcher(targets: str | Sequence[str]) -> Callable[[str], bool]:
    """A test for names: a string is matched in full, a list holds names or suffixes.

    Raises
    ------
    ValueError
        If the string is no regular expression.
    """
    if isinstance(targets, str):
        pattern = expression(targets)
        return lambda name: pattern.fullmatch(name) is not None
    wanted = frozenset(targets)
    if not wanted:
        return lambda _: False
    return lambda name: not wanted.isdisjoint(suffixes(name))


def check_known(targets: Targets, names: Iterable[str]) -> None:
    """Refuse a list with an entry that selects nothing: a slip of the pen would go unseen.

    Raises
    ------
    ValueError
        If there is one; a regular expression may select nothing.
    """
    if targets is None or isinstance(targets, str):
        return
    known = {suffix for name in names for suffix in suffixes(name)}
    if unknown := [target for target in targets if target not in known]:
        raise ValueError(f"no module is named {unknown[0]!r}, and no module's name ends with it")


def filtered(names: Iterable[str], include: Targets, exclude: Targets) -> list[str]:
    """The names that `include` selects (all for None) and `exclude` does not.

    Raises
    ------
    ValueError
        If an entry of a list `include` selects nothing.
    """
    names = list(names)
    check_known(include, names)
    included = (lambda _: True) if include is None else matcher(include)
    excluded = (lambda _: False) if exclude is None else matcher(exclude)
    return [name for name in names if included(name) and not excluded(name)]
