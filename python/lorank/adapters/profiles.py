"""Profiles: the rank and the scale with which each module is written.

Every profile moves the scalings into the factors, so that each runtime's own formula gives the same update.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lorank.adapters.content import AdapterContent, Profile
from lorank.peft_format.rank_groups import rank_groups, separate_experts

PROFILES: tuple[Profile, ...] = ("compact", "portable", "tensor-rank")


@dataclass(frozen=True, slots=True)
class WrittenRank:
    """The rank and the scale with which a module is written.

    Attributes
    ----------
    rank
        Rank of the written factors: the module's rank, or the rank that it is padded to.
    b_factor
        The number by which ``scaling * B`` is multiplied.
    """

    rank: int
    b_factor: float


def written_ranks(
    adapter: AdapterContent, profile: Profile, needed: Collection[str]
) -> dict[str, WrittenRank]:
    """Return the rank and the scale of every written module by name.

    Parameters
    ----------
    adapter, profile
        The adapter and the profile that it is written in.
    needed
        Names of modules whose layer is written even at rank 0.

    Raises
    ------
    ValueError
        If no module has any rank left, or the profile is unknown.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(map(repr, PROFILES))}, not {profile!r}")
    if reason := nothing_left(adapter):
        raise ValueError(reason)
    modules = adapter.modules
    if profile == "portable":
        largest = max(module.rank for module in adapter.adapted)
        return {name: WrittenRank(largest, 1.0) for name in modules}
    # PEFT has no rank 0: a module whose layer is needed gets rank 1 with factors of zeros.
    ranks = {name: max(m.rank, 1) for name, m in modules.items() if m.rank or name in needed}
    for group in rank_groups(modules.values(), adapter.config):
        if largest_of_group := max(ranks.get(name, 0) for name in group):
            ranks |= dict.fromkeys(group, largest_of_group)
    if experts := separate_experts(ranks):
        ranks |= dict.fromkeys(experts, max(ranks[name] for name in experts))
    ranks = {name: ranks[name] for name in modules if name in ranks}
    if profile == "compact":
        return {name: WrittenRank(rank, 1.0) for name, rank in ranks.items()}
    common = common_rank(ranks)
    return {name: WrittenRank(rank, rank / common) for name, rank in ranks.items()}


def common_rank(ranks: Mapping[str, int]) -> int:
    """Return the settings' `r`: the rank of separate experts, if there are any, else the largest rank."""
    # PEFT gives all separate experts the rank `r`.
    return max(ranks[name] for name in separate_experts(ranks) or ranks)


def nothing_left(adapter: AdapterContent) -> str | None:
    """Return the reason why an adapter has no factors to write; None if it has some."""
    if adapter.adapted:
        return None
    if adapter.certificate is not None and adapter.certificate.norm == 0:
        return "every update is zero: the adapter is untrained, or the merged adapters cancel out"
    return "no module has any rank left: give a larger share, rank or budget"
