"""Profiles: the rank and the scale with which each module is written.

The profiles for runtimes move the scalings into the factors, so that each runtime's own formula gives the
same update. The profile ``"exact"`` keeps the factors and writes the scalings as alphas.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorank.adapters.content import AdapterContent, Profile
from lorank.adapters.module import LoraModule
from lorank.peft_format.rank_groups import rank_groups, separate_experts

PROFILES: tuple[Profile, ...] = ("compact", "portable", "tensor-rank")
"""The profiles for runtimes."""

EXACT: Profile = "exact"


@dataclass(frozen=True, slots=True)
class WrittenRank:
    """The rank and the scale with which a module is written.

    Attributes
    ----------
    rank
        Rank of the written factors: the module's rank, or the rank that it is padded to.
    b_factor
        The number by which ``scaling * B`` is multiplied.
    keeps_scaling
        True if B is not multiplied at all, because the file holds the scaling.
    """

    rank: int
    b_factor: float
    keeps_scaling: bool = False

    @classmethod
    def unscaled(cls, rank: int, scaling: float) -> WrittenRank:
        """Return an entry that keeps B and the scaling of a module."""
        return cls(rank, 1 / scaling if scaling else math.inf, keeps_scaling=True)

    def factor(self, module: LoraModule) -> float:
        """Return the number by which the B of a module is multiplied."""
        return 1.0 if self.keeps_scaling else module.scaling * self.b_factor

    def scaling(self, module: LoraModule) -> float:
        """Return the scaling of the written module."""
        return module.scaling if self.keeps_scaling else 1 / self.b_factor


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
    if profile not in (*PROFILES, EXACT):
        known = ", ".join(map(repr, (*PROFILES, EXACT)))
        raise ValueError(f"profile must be one of {known}, not {profile!r}")
    if reason := nothing_left(adapter):
        raise ValueError(reason)
    modules = adapter.modules
    if profile == "portable":
        largest = max(module.rank for module in adapter.adapted)
        return {name: WrittenRank(largest, 1.0) for name in modules}
    # PEFT has no rank 0: a module whose layer is needed gets rank 1 with factors of zeros.
    ranks = {name: max(m.rank, 1) for name, m in modules.items() if m.rank or name in needed}
    groups = rank_groups(modules.values(), adapter.config)
    for group in groups:
        if largest_of_group := max(ranks.get(name, 0) for name in group):
            ranks |= dict.fromkeys(group, largest_of_group)
    if experts := separate_experts(ranks):
        ranks |= dict.fromkeys(experts, max(ranks[name] for name in experts))
    ranks = {name: ranks[name] for name in modules if name in ranks}
    if profile == EXACT:
        folded = _of_unequal_scalings(modules, [*groups, separate_experts(ranks)])
        return {
            name: WrittenRank(rank, 1.0)
            if name in folded
            else WrittenRank.unscaled(rank, modules[name].scaling)
            for name, rank in ranks.items()
        }
    if profile == "compact":
        return {name: WrittenRank(rank, 1.0) for name, rank in ranks.items()}
    common = common_rank(ranks)
    return {name: WrittenRank(rank, rank / common) for name, rank in ranks.items()}


def _of_unequal_scalings(modules: Mapping[str, LoraModule], groups: Iterable[Sequence[str]]) -> set[str]:
    """Return the modules of groups that have one scaling in a file, but several in the adapter."""
    folded: set[str] = set()
    for group in groups:
        if len({modules[name].scaling for name in group if modules[name].rank}) > 1:
            folded.update(group)
    return folded


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
