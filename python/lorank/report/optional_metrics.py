"""Names of the metrics that an analysis computes only if asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

GROUPS: Mapping[str, tuple[str, ...]] = {
    "mp-distance": ("mp_distance", "mp_distance_median"),
    "tracy-widom": ("tw_edge", "tw_spikes", "tw_edge_median", "tw_spikes_median"),
    "norms": ("nuclear_norm", "log_frobenius_norm", "log_spectral_norm", "log_alpha_norm"),
    "tail-fits": (
        "exponential_rate",
        "exponential_ratio",
        "exponential_p",
        "truncated_alpha",
        "truncated_rate",
        "truncated_ratio",
        "truncated_p",
    ),
    "entropy": ("eigenvalue_entropy", "singular_value_entropy"),
    "randomized": ("randomized_distance", "correlation_traps"),
}
"""Columns by the name of the group of metrics that `analyze` takes."""

OPTIONAL_COUNTS = frozenset({"tw_spikes", "tw_spikes_median", "correlation_traps"})
"""Names of the optional metrics that are integers."""

OPTIONAL_COLUMNS = tuple(column for columns in GROUPS.values() for column in columns)
"""Names of all optional metrics, in order."""


def columns_of(groups: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of some groups, in order."""
    return tuple(column for group in groups for column in GROUPS[group])


def groups_in(columns: Collection[str]) -> tuple[str, ...]:
    """Return the groups all of whose columns are among some columns."""
    return tuple(group for group, needed in GROUPS.items() if set(needed) <= set(columns))


def check_groups(groups: Iterable[str]) -> tuple[str, ...]:
    """Return the groups in the order of `GROUPS`, without repetitions.

    Raises
    ------
    ValueError
        If a group is unknown.
    """
    if isinstance(groups, str):
        raise ValueError(f"metrics must be a list of names, not {groups!r}")
    given = set(groups)
    if unknown := sorted(given - GROUPS.keys()):
        raise ValueError(f"metrics must be among {', '.join(GROUPS)}, not {unknown[0]!r}")
    return tuple(group for group in GROUPS if group in given)
