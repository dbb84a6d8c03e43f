"""Reads the numbered block of a module, and the depth of that block, from the dotted name of the module.

Tables list the names that transformers, timm and open_clip give to blocks. A name with another
number is an error, and its message gives the option `blocks`. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from lorank._internal.patterns import Expression
from lorank.modules import naming


@dataclass(frozen=True, slots=True)
class Block:
    """A numbered block of a model.

    Attributes
    ----------
    stack
        The name of the list that holds the block; an encoder and a decoder are two stacks.
    number
        The number of the block in the stack; in models with stages (Swin), the numbers of the stage and of
        the block.
    """

    stack: str
    number: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Depth:
    """The depth of a block, counted over the known blocks of its stack.

    Attributes
    ----------
    index
        Position of the block, ``0 <= index < count``.
    count
        Number of blocks in the stack, `L`.
    """

    index: int
    count: int


# Expressions for the names of lists of blocks, nested lists first. The groups' numbers order the blocks.
_BLOCKS = tuple(
    re.compile(rf"(?:^|\.){expression}(?=\.|$)")
    for expression in (
        r"layers\.(\d+)\.blocks\.(\d+)",  # Swin
        r"stages\.(\d+)\.(?:layers|blocks)\.(\d+)",  # ConvNeXt
        r"block\.(\d+)\.(\d+)",  # SegFormer
        # ALBERT shares one layer among all depths, unless its configuration sets several.
        r"albert_layer_groups\.(\d+)\.albert_layers\.(\d+)",
        # Modules between two stages are outside blocks. Further numbers (T5's sub-layers, experts) do not
        # count as depth.
        r"(?:layers?|h|blocks?|resblocks|(?:single_)?transformer_blocks|(?:en|de)coder_layers)"
        r"\.(\d+)(?!\.downsampl|\d)",
    )
)

# Parts of names that mark modules before, between and after the blocks.
_OUTSIDE = re.compile(
    r"embeddings?|patch_embed\w*|feature_extractor|feature_projection|downsample|downsampling_layer"
    r"|merger|connector|\w*projector|pooler|heads?|\w*classifier"
)


def numbered_block(name: str, blocks: str | None = None) -> Block | None:
    r"""Return the numbered block that holds a module; None for modules outside blocks (poolers, heads).

    Parameters
    ----------
    name
        The module's dotted name.
    blocks
        A regular expression that is searched instead of the known ones. Its groups match the numbers of
        stages, if any, and of the block; the text before the first group names the stack. Modules whose names
        do not match are outside blocks.

    Raises
    ------
    ValueError
        If it is unclear whether a number in the name is a block's, or a group of `blocks` does not match a
        number.

    Examples
    --------
    >>> numbered_block("decoder.block.11.layer.2.DenseReluDense.wi")
    Block(stack='decoder.block', number=(11,))
    >>> numbered_block("backbone.units.3.mixer.in_proj", blocks=r"units\.(\d+)")
    Block(stack='backbone.units', number=(3,))
    """
    if blocks is not None:
        return _block_by(naming.option_expression("blocks", blocks), name)
    if found := match_of_block(name):
        return _block([found.span(i) for i in range(found.re.groups + 1)], name, found.re.pattern)
    if has_number(name) and not is_outside(name):
        before = naming.block_of(name).split(".")[-2:-1]
        example = r"\.".join([*map(re.escape, before), r"(\d+)"])
        raise ValueError(
            f"the block of {name!r} cannot be read from its name: give blocks, a regular expression with the "
            f"block's number in a group, such as blocks=r'{example}'"
        )
    return None


def depths_of(
    names: Sequence[str], blocks: str | None = None, others: Iterable[str] = ()
) -> list[Depth | None]:
    """Return the depth of each module in its stack; None for modules outside numbered blocks.

    Only blocks that hold a module of `names` or `others` count: if all these modules are in blocks 6 to 11,
    block 6 is the first of six.

    Parameters
    ----------
    names
        The modules' dotted names.
    blocks
        A regular expression that finds blocks, as in `numbered_block`.
    others
        The names of other modules of the model; names without a readable block are ignored.

    Raises
    ------
    ValueError
        If the block of one of `names` cannot be read, or `blocks` matches no name.

    Examples
    --------
    >>> depths_of(["layers.0.fc1", "layers.1.fc1", "pooler"])
    [Depth(index=0, count=2), Depth(index=1, count=2), None]
    """
    block_of = numbered_block
    if blocks is not None:
        block_of = partial(_block_by, naming.option_expression("blocks", blocks))
    found = [block_of(name) for name in names]
    if blocks is not None and names and not any(found):
        raise ValueError(f"blocks={blocks!r} matches none of {len(names)} modules ({names[0]}, ...)")
    numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for block in (*found, *_readable_blocks(others, block_of)):
        if block is not None:
            numbers[block.stack].add(block.number)
    order = {
        Block(stack, number): Depth(index, len(present))
        for stack, present in numbers.items()
        for index, number in enumerate(sorted(present))
    }
    return [None if block is None else order[block] for block in found]


def _readable_blocks(names: Iterable[str], block_of: Callable[[str], Block | None]) -> Iterator[Block | None]:
    """Yield the blocks of modules; skip names whose block cannot be read."""
    for name in names:
        with suppress(ValueError):
            yield block_of(name)


def match_of_block(name: str) -> re.Match[str] | None:
    """Match the first known list of blocks in a name; None if a number of another list precedes the match."""
    for expression in _BLOCKS:
        if found := expression.search(name):
            # A number at the start of the name belongs to a wrapper (nn.Sequential, sentence-transformers).
            above = name[: found.start()].split(".")[1:]
            return None if any(part.isdecimal() for part in above) else found
    return None


def _block_by(expression: Expression, name: str) -> Block | None:
    """Return the block that a user's expression finds; None for modules outside blocks."""
    spans = expression.spans("search", name)
    return None if spans is None else _block(spans, name, expression.text)


def _block(spans: Sequence[tuple[int, int]], name: str, pattern: str) -> Block:
    """Return the block of a match, by the spans of the match and of its groups."""
    groups = [(start, name[start:end]) for start, end in spans[1:] if start >= 0]
    if not groups or not all(naming.is_number(text) for _, text in groups):
        raise ValueError(
            f"blocks={pattern!r} matches no number in {name!r}: the block's number must be a group"
        )
    return Block(name[: groups[0][0]].rstrip("."), tuple(int(text) for _, text in groups))


def has_number(name: str) -> bool:
    """Return True if a part of a name is a number."""
    return any(part.isdecimal() for part in name.split("."))


def is_outside(name: str) -> bool:
    """Return True for a module before, between or after the blocks."""
    return naming.is_output_head(name) or any(_OUTSIDE.fullmatch(part) for part in name.split("."))
