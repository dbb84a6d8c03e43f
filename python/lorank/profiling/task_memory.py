"""Memory for the sums that `profile_tasks` keeps, and the division of modules into passes."""

from __future__ import annotations

from collections.abc import Sequence

from lorank.profiling.targets import Target


def input_bytes(target: Target, folds: int) -> int:
    """Return the bytes of the sums over a module's inputs, including factorisations."""
    return 16 * folds * target.info.shape[1] ** 2


def output_bytes(target: Target, folds: int) -> int:
    """Return the bytes of the products of a module's inputs and targets."""
    out, fan_in = target.info.shape
    return 8 * folds * fan_in * out


def passes_within(
    memory: int, groups: Sequence[tuple[int, ...]], targets: Sequence[Target], folds: int
) -> list[list[tuple[int, ...]]]:
    """Distribute groups of modules over passes; a group that is too large is divided.

    Parameters
    ----------
    memory
        Bytes for the sums of one pass.
    groups
        Modules that share the sums over their inputs, by index in `targets`.
    targets
        The modules.
    folds
        Number of folds.

    Raises
    ------
    ValueError
        If the sums of one module do not fit into memory.
    """
    passes: list[list[tuple[int, ...]]] = []
    left = 0
    for group in groups:
        inputs = input_bytes(targets[group[0]], folds)
        is_open = False
        for index in group:
            outputs = output_bytes(targets[index], folds)
            if inputs + outputs > memory:
                raise ValueError(
                    f"memory {memory:,}: the sums of {targets[index].info.name} alone need "
                    f"{inputs + outputs:,} bytes: raise memory, or use fewer folds"
                )
            if is_open and outputs <= left:
                passes[-1][-1] = (*passes[-1][-1], index)
                left -= outputs
                continue
            if inputs + outputs > left:
                passes.append([])
                left = memory
            passes[-1].append((index,))
            left -= inputs + outputs
            is_open = True
    return passes
