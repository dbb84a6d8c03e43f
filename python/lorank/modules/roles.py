"""The block and the role of a module, read from its dotted name.

Tables list the names that transformers, timm and open_clip give to blocks and modules. A name outside the
tables is an error, whose message names the option that helps; nothing is guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lorank.modules import naming

Role = Literal["attention", "feed-forward"]
Placement = Literal["attention", "feed-forward", "all"]
Roles: TypeAlias = "Mapping[str, Role | None] | None"
"""Roles given by a user: role by the regular expression for a run of whole parts of a name."""


@dataclass(frozen=True, slots=True)
class Block:
    """A numbered block of a model.

    Attributes
    ----------
    stack
        The name of the list that holds the block; an encoder and a decoder are two stacks.
    number
        The number of the block in the stack; with stages (Swin), the numbers of the stage and of the block.
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


# Names of lists of blocks, nested lists first. The numbers of all groups order the blocks.
_BLOCKS = tuple(
    re.compile(rf"(?:^|\.){expression}(?=\.|$)")
    for expression in (
        r"layers\.(\d+)\.blocks\.(\d+)",  # Swin
        r"stages\.(\d+)\.(?:layers|blocks)\.(\d+)",  # ConvNeXt
        r"block\.(\d+)\.(\d+)",  # SegFormer
        # ALBERT shares one layer among all depths, unless configured to have more.
        r"albert_layer_groups\.(\d+)\.albert_layers\.(\d+)",
        # Modules between two stages are in no block. Further numbers (T5's sub-layers, experts) do not
        # count as depth.
        r"(?:layers?|h|blocks?|resblocks|(?:single_)?transformer_blocks|(?:en|de)coder_layers)"
        r"\.(\d+)(?!\.downsampl|\d)",
    )
)

# Parts of names of modules before, between and after the blocks.
_OUTSIDE = re.compile(
    r"embeddings?|patch_embed\w*|feature_extractor|feature_projection|downsample|downsampling_layer"
    r"|merger|connector|\w*projector|pooler|heads?|\w*classifier"
)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(?:shared_)?mlps?|ffn?|ff_context|feed_?forward\d*|denserelu_?dense|intermediate"
    r"|(?:shared_)?experts?|\w*moe\w*",
    re.IGNORECASE,
)
# Last parts of names that show a role if no part above them does: OPT's fc1 lies directly in the block.
_LEAVES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"[qkvo]_proj|qkv(?:_proj)?|query|key|value|query_key_value|c_attn|Wqkv"), "attention"),
    (
        re.compile(
            r"fc[12]|fc_in|fc_out|c_fc|(?:gate|up|down|gate_up)_proj|dense_h_to_4h|dense_4h_to_h"
            r"|ffn_output|linear[12]"
        ),
        "feed-forward",
    ),
)
# The feed-forward output of BERT; the output of its attention is `attention.output.dense`.
_BERT_OUTPUT = "output.dense"


def numbered_block(name: str, blocks: str | None = None) -> Block | None:
    r"""Return the numbered block that holds a module; None for modules outside blocks (poolers, heads).

    Parameters
    ----------
    name
        The module's dotted name.
    blocks
        A regular expression that is searched instead of the known ones. Its groups are the numbers of the
        block, stages first; the text before the first group names the stack. Names without a match are in
        no block.

    Raises
    ------
    ValueError
        If the name has a number that may or may not be that of a block, or a group of `blocks` does not
        match a number.

    Examples
    --------
    >>> numbered_block("decoder.block.11.layer.2.DenseReluDense.wi")
    Block(stack='decoder.block', number=(11,))
    >>> numbered_block("backbone.units.3.mixer.in_proj", blocks=r"units\.(\d+)")
    Block(stack='backbone.units', number=(3,))
    """
    found = _known_block(name) if blocks is None else _compiled("blocks", blocks).search(name)
    if found is not None:
        return _block(found, name)
    if blocks is None and _has_number(name) and not _is_outside(name):
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

    Blocks that hold one of `names` or of `others` are counted: if all known modules are in blocks 6 to 11,
    block 6 is the first of six.

    Parameters
    ----------
    names
        The modules' dotted names.
    blocks
        As in `numbered_block`.
    others
        The names of further modules of the model; names that cannot be read are ignored.

    Raises
    ------
    ValueError
        If one of `names` cannot be read, or `blocks` matches none of them.

    Examples
    --------
    >>> depths_of(["layers.0.fc1", "layers.1.fc1", "pooler"])
    [Depth(index=0, count=2), Depth(index=1, count=2), None]
    """
    found = [numbered_block(name, blocks) for name in names]
    if blocks is not None and names and not any(found):
        raise ValueError(f"blocks={blocks!r} matches none of {len(names)} modules ({names[0]}, ...)")
    numbers: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for block in (*found, *_readable_blocks(others, blocks)):
        if block is not None:
            numbers[block.stack].add(block.number)
    order = {
        Block(stack, number): Depth(index, len(present))
        for stack, present in numbers.items()
        for index, number in enumerate(sorted(present))
    }
    return [None if block is None else order[block] for block in found]


def _readable_blocks(names: Iterable[str], blocks: str | None) -> Iterator[Block | None]:
    """Yield the blocks of the names that can be read."""
    for name in names:
        with suppress(ValueError):
            yield numbered_block(name, blocks)


def roles_of(names: Sequence[str], roles: Roles = None) -> list[Role | None]:
    r"""Return the role of each module: ``"attention"``, ``"feed-forward"``, or None for neither.

    Embeddings, poolers, heads, routers of experts and all modules outside blocks have neither role.

    Parameters
    ----------
    names
        The modules' dotted names.
    roles
        Role or None by a regular expression that matches a run of whole parts of a name (``"mixer"``,
        ``r"mixer\.(in|out)_proj"``, ``r".*\.mixer\..*"``). The first match decides, before the tables.

    Raises
    ------
    ValueError
        If a module in a block has an unknown name, or `roles` is malformed.

    Examples
    --------
    >>> roles_of(["h.0.attn.c_proj", "h.0.mlp.c_proj", "lm_head"])
    ['attention', 'feed-forward', None]
    >>> roles_of(["layers.0.mixer.in_proj"], {"mixer": "attention"})
    ['attention']
    """
    own = _compiled_roles(roles)
    return [_role_of(name, own) for name in names]


def check_expressions(blocks: str | None, roles: Roles) -> None:
    """Raise ValueError if an expression is malformed, or a value is not a role."""
    if blocks is not None:
        _compiled("blocks", blocks)
    _compiled_roles(roles)


def check_roles(names: Sequence[str], roles: Roles) -> None:
    """Raise ValueError if `roles` is malformed, or expressions of it match none of the names."""
    if idle := [
        repr(given)
        for given, (expression, _) in zip(roles or (), _compiled_roles(roles), strict=True)
        if not any(expression.fullmatch(name) for name in names)
    ]:
        match = "matches" if len(idle) == 1 else "match"
        raise ValueError(f"roles: {', '.join(idle)} {match} none of {len(names)} modules ({names[0]}, ...)")


def in_placement(names: Sequence[str], placement: Placement, roles: Roles = None) -> list[bool]:
    """Return True for each module that a placement adapts.

    Source: [SCHEDULES], section 2.4.

    Parameters
    ----------
    names
        The modules' dotted names.
    placement
        ``"attention"`` or ``"feed-forward"`` for the modules of that role, ``"all"`` for every module.
    roles
        As in `roles_of`.

    Returns
    -------
    list of bool
        One value per name, in the same order.

    Raises
    ------
    ValueError
        If `placement` has another value, or a role is needed and cannot be read.

    Examples
    --------
    >>> in_placement(["h.0.attn.c_proj", "h.0.mlp.c_proj"], "attention")
    [True, False]
    """
    if placement not in get_args(Placement):
        raise ValueError(
            f"placement must be one of {', '.join(map(repr, get_args(Placement)))}, not {placement!r}"
        )
    if placement == "all":
        return [True] * len(names)
    return [role == placement for role in roles_of(names, roles)]


def _role_of(name: str, own: Sequence[tuple[re.Pattern[str], Role | None]]) -> Role | None:
    """Return the role of one module, by a user's expressions and then by the tables."""
    for expression, role in own:
        if expression.fullmatch(name):
            return role
    found = _known_block(name)
    # The parts above the block name the model and show no role.
    inside = name if found is None else name[found.end() + 1 :]
    parts = inside.split(".")
    if naming.is_embedding(name) or naming.is_output_head(name) or naming.is_router(name):
        return None
    if "router" in parts or (found is None and _is_outside(name)):
        return None
    # The innermost part decides, because a group of layers may be named after one of them.
    for part in reversed(parts):
        if _ATTENTION.search(part):
            return "attention"
        if _FEED_FORWARD.fullmatch(part):
            return "feed-forward"
    if inside == _BERT_OUTPUT:
        return "feed-forward"
    for leaves, role in _LEAVES:
        if leaves.fullmatch(parts[-1]):
            return role
    if found is None and not _has_number(name):
        return None
    above = ".".join(parts[-2:])
    raise ValueError(
        f"the role of {name!r} cannot be read from its name: give roles, such as "
        f"roles={{{above!r}: 'attention'}} ('attention', 'feed-forward' or None for neither)"
    )


def _known_block(name: str) -> re.Match[str] | None:
    """Return the match of the first known list of blocks in a name; None if another list precedes it."""
    for expression in _BLOCKS:
        if found := expression.search(name):
            # A number at the start belongs to a wrapper (nn.Sequential, sentence-transformers).
            above = name[: found.start()].split(".")[1:]
            return None if any(part.isdecimal() for part in above) else found
    return None


def _block(found: re.Match[str], name: str) -> Block:
    """Return the block of a match."""
    groups = [i + 1 for i, text in enumerate(found.groups()) if text is not None]
    if not groups or not all(found[i].isdecimal() for i in groups):
        raise ValueError(
            f"blocks={found.re.pattern!r} gives no number for {name!r}: the block's number must be a group"
        )
    return Block(name[: found.start(groups[0])].rstrip("."), tuple(int(found[i]) for i in groups))


def _has_number(name: str) -> bool:
    """Return True if a part of a name is a number."""
    return any(part.isdecimal() for part in name.split("."))


def _is_outside(name: str) -> bool:
    """Return True for a module before, between or after the blocks."""
    return naming.is_output_head(name) or any(_OUTSIDE.fullmatch(part) for part in name.split("."))


def _compiled(option: str, expression: str) -> re.Pattern[str]:
    """Compile the value of an option."""
    if not isinstance(expression, str):
        raise ValueError(f"{option} must be a regular expression, not {expression!r}")
    try:
        return naming.expression(expression)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _compiled_roles(roles: Roles) -> list[tuple[re.Pattern[str], Role | None]]:
    """Compile and check a user's roles."""
    if roles is None:
        return []
    if not isinstance(roles, Mapping):
        raise ValueError(f"roles must map regular expressions to roles, got {roles!r}")
    for expression, role in roles.items():
        if role is not None and role not in get_args(Role):
            raise ValueError(
                f"roles: {expression!r} must be 'attention', 'feed-forward' or None, not {role!r}"
            )
        _compiled("roles", expression)
    return [(re.compile(rf"(?:.*\.)?(?:{expression})(?:\..*)?"), role) for expression, role in roles.items()]
