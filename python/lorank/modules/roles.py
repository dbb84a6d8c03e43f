"""The role of a module, attention or feed-forward, read from its dotted name.

Tables list the names of modules in transformers, timm and open_clip. A name that is not in the tables raises
an error, and the message gives the option that sets its role. Roles are never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from lorank._internal.patterns import Expression, TimeLimit
from lorank.modules import naming
from lorank.modules.blocks import has_number, is_outside, match_of_block

Role = Literal["attention", "feed-forward"]
Placement = Literal["attention", "feed-forward", "all"]
Roles: TypeAlias = "Mapping[str, Role | None] | None"
"""A user's roles, by regular expression.

An expression matches consecutive, whole parts of a dotted name.
"""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(?:shared_)?mlps?|ffn?|ff_context|feed_?forward\d*|denserelu_?dense|intermediate"
    r"|(?:shared_)?experts?|\w*moe\w*",
    re.IGNORECASE,
)
# Last parts of names that show a role if no earlier part does: OPT's fc1 is directly in the block.
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


def roles_of(names: Sequence[str], roles: Roles = None) -> list[Role | None]:
    r"""Return the role of each module: ``"attention"``, ``"feed-forward"``, or None for neither.

    Embeddings, poolers, heads, routers of experts and all modules outside blocks have neither role.

    Parameters
    ----------
    names
        The modules' dotted names.
    roles
        A map from regular expressions to a role, or to None for neither. An expression matches consecutive,
        whole parts of a name (``"mixer"``, ``r"mixer\.(in|out)_proj"``, ``r".*\.mixer\..*"``). The first
        expression that matches decides; the tables decide if none matches.

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
        naming.option_expression("blocks", blocks)
    _compiled_roles(roles)


def check_roles(names: Sequence[str], roles: Roles) -> None:
    """Raise ValueError if `roles` is malformed, or one of its expressions matches no name."""
    if unmatched := [
        repr(given)
        for given, (expression, _) in zip(roles or (), _compiled_roles(roles), strict=True)
        if not any(map(expression.matches, names))
    ]:
        match = "matches" if len(unmatched) == 1 else "match"
        listed = ", ".join(unmatched)
        raise ValueError(f"roles: {listed} {match} none of {len(names)} modules ({names[0]}, ...)")


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


def _role_of(name: str, own: Sequence[tuple[Expression, Role | None]]) -> Role | None:
    """Return the role of one module, by a user's expressions and then by the tables."""
    for expression, role in own:
        if expression.matches(name):
            return role
    found = match_of_block(name)
    # The parts before the block belong to the model's name and show no role.
    inside = name if found is None else name[found.end() + 1 :]
    parts = inside.split(".")
    if naming.is_embedding(name) or naming.is_output_head(name) or naming.is_router(name):
        return None
    if "router" in parts or (found is None and is_outside(name)):
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
    if found is None and not has_number(name):
        return None
    above = ".".join(parts[-2:])
    raise ValueError(
        f"the role of {name!r} cannot be read from its name: give roles, such as "
        f"roles={{{above!r}: 'attention'}} ('attention', 'feed-forward' or None for neither)"
    )


def _compiled_roles(roles: Roles) -> list[tuple[Expression, Role | None]]:
    """Compile and check a user's roles."""
    if roles is None:
        return []
    if not isinstance(roles, Mapping):
        raise ValueError(f"roles must map regular expressions to roles, got {roles!r}")
    limit = TimeLimit("roles")
    for expression, role in roles.items():
        if role is not None and role not in get_args(Role):
            raise ValueError(
                f"roles: {expression!r} must be 'attention', 'feed-forward' or None, not {role!r}"
            )
        naming.option_expression("roles", expression, limit)
    return [
        (naming.option_expression("roles", rf"(?:.*\.)?(?:{expression})(?:\..*)?", limit), role)
        for expression, role in roles.items()
    ]
