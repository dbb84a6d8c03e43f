"""Tables of ranks and summaries that stay readable at any width."""

from __future__ import annotations

from rich.console import Console

from lorank.cli.tables.ranks import rank_map
from lorank.cli.tables.reports import skipped_summary
from lorank.report.spectral import SpectralReport
from lorank.sources.base import Skipped


def printed(ranks: dict[str, int], width: int) -> str:
    terminal = Console(width=width)
    with terminal.capture() as captured:
        terminal.print(rank_map(ranks, "ranks", width))
    return captured.get()


def test_wide_map_lists_ranks_by_block() -> None:
    ranks = {f"layers.{i}.attention.projection_{j}": i + j for i in range(2) for j in range(9)}
    wide, narrow = printed(ranks, 200), printed(ranks, 80)
    assert "projection_8 9" not in wide
    assert all(f"projection_{j} {j + 1}" in " ".join(narrow.split()) for j in range(9))
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow


def test_experts_as_modules_share_a_column() -> None:
    ranks = {f"layers.0.mlp.experts.{e}.up_proj": 2 + e for e in range(64)}
    text = printed({**ranks, "layers.0.q_proj": 4}, 80)
    assert "2-65" in text
    assert "63" not in text


def test_router_parameter_is_named_with_its_module() -> None:
    assert "gate" in printed({"layers.0.mlp.gate.weight": 2, "layers.0.q_proj": 4}, 80)


def test_reasons_with_different_names_are_counted_together() -> None:
    skipped = [Skipped(f"{i}.scale", (1,), f"scale of the packed weight {i}.weight (GPTQ)") for i in range(9)]
    summary = skipped_summary(SpectralReport([], skipped))
    assert summary == "9 tensors skipped: scale of a packed weight (GPTQ)"
    summary = skipped_summary(SpectralReport([], [Skipped("norm", (4,), "1-D tensor"), *skipped]))
    assert summary == "10 tensors skipped: 9 x scale of a packed weight (GPTQ), 1 x 1-D tensor"
