"""Initialisations of LoRA that change the base model, or that allow some ranks only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of `init_lora_weights` that change the base model; saved factors belong to the changed model."""


def changes_the_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation that changed the base model; None if none did."""
    init = config.get("init_lora_weights", True)
    return init if _changes_the_base(init) else None


def _changes_the_base(init: Any) -> bool:
    return isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)


def check_config(config: Any, new_ranks: Sequence[int]) -> None:
    """Refuse new ranks that a config's initialisation does not allow when PEFT repeats it on loading.

    Raises
    ------
    NotImplementedError
        If the initialisation derives the base model from the rank.
    ValueError
        If the initialisation allows only even ranks, and a new rank is odd.
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
