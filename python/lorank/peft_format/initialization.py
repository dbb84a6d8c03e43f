"""Initialisations of LoRA that change the base model, or that allow some ranks only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of `init_lora_weights` whose saved factors belong to a base model that the method has changed."""


def changes_the_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation by which training changed the base model; None if it did not."""
    init = config.get("init_lora_weights", True)
    return init if _changes_the_base(init) else None


def _changes_the_base(init: Any) -> bool:
    return isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)


def check_config(config: Any, new_ranks: Sequence[int]) -> None:
    """Refuse a config of PEFT whose initialisation, which PEFT repeats on loading, does not allow new ranks.

    Raises
    ------
    NotImplementedError
        If the initialisation derives the base model from the rank.
    ValueError
        If it allows even ranks only, and a new rank is odd.
    """
    init = config.init_lora_weights
    if not new_ranks:
        return
    if _changes_the_base(init):
        # Loading such an adapter derives the base model from the rank once more.
        raise NotImplementedError(
            f"the adapter was initialised by {init!r}, which derives the base model from the rank: with "
            "other ranks the saved adapter would be loaded into another base model. Save the base model as "
            "it is now, and set init_lora_weights to True in the adapter's config"
        )
    if init == "orthogonal" and any(rank % 2 for rank in new_ranks):
        raise ValueError(
            "the adapter was initialised by 'orthogonal': PEFT loads even ranks only. Set init_lora_weights "
            "to True in the adapter's config: the loaded adapter is the same, whatever its initialisation was"
        )
