"""Ranks from gradient and task reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorank
from tests.support import tiny_models
from tests.support.profiled_models import text_batches
from tests.support.report_rows import gradient_row, task_row


def test_ranks_are_proportional_to_effective_ranks() -> None:
    shapes = [(100, 200), (300, 100), (50, 50), (200, 200)]
    report = lorank.GradientReport(
        [
            gradient_row(f"layer.{i}", shape, effective)
            for i, (shape, effective) in enumerate(zip(shapes, (1, 2, 3.5, 0), strict=True))
        ]
    )
    allocation = lorank.allocate(report, "gard", r_min=2, r_max=100, avg_rank=2 + 65 / 4)
    assert allocation.facts.reason == "the report does not describe the model"
    assert list(allocation.ranks.values()) == [12, 22, 37, 2]
    assert list(allocation.scores.values()) == pytest.approx([1 / 6.5, 2 / 6.5, 3.5 / 6.5, 0])
    cost = sum((2 + n) * sum(shape) for n, shape in zip((10, 20, 35, 0), shapes, strict=True))
    assert lorank.allocate(report, "gard", r_min=2, r_max=100, budget=cost).ranks == allocation.ranks
    # Scores are shares of the adapted modules.
    some = lorank.allocate(report, "gard", r_min=1, r_max=50, targets=["0", "1"], avg_rank=16)
    assert list(some.ranks.values()) == [11, 21]
    assert sum(some.scores.values()) == pytest.approx(1)


def test_effective_rank_equal_to_the_number_of_batches_is_flagged() -> None:
    rows = [
        gradient_row("full", (8, 8), 4),
        gradient_row("less", (8, 8), 3),
        gradient_row("small", (4, 8), 4),
    ]
    report = lorank.GradientReport(rows, num_batches=4)
    flags = lorank.allocate(report, "gard", r_min=1, r_max=4, avg_rank=2).flags
    assert flags == {"full": "the number of batches limits its effective rank: more batches may raise it"}


def test_budget_in_parameters_holds() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(), energy=0.7)
    for budget, limit in ((6000, 6000), ("6k", 6000), ("20%", report.num_parameters // 5)):
        allocation = lorank.allocate(report, "gard", r_min=1, r_max=16, budget=budget)
        assert limit - max(sum(row.shape) for row in report) < allocation.num_parameters <= limit
        for one in report:
            for other in report:
                if one.effective_rank > other.effective_rank and sum(one.shape) == sum(other.shape):
                    assert allocation.ranks[one.name] >= allocation.ranks[other.name]


def test_modules_without_gradients_get_equal_ranks() -> None:
    report = lorank.GradientReport([gradient_row(f"layer.{i}", (4, 4), 0) for i in range(3)])
    assert list(lorank.allocate(report, "gard", r_min=1, r_max=9, avg_rank=3).ranks.values()) == [3, 3, 3]


def test_stacks_without_ranks_are_flagged(tmp_path: Path) -> None:
    model = tiny_models.mixtral()
    experts = [
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")
    ]
    gradients = lorank.profile_gradients(model, text_batches(3))
    tasks = lorank.profile_tasks(model, text_batches(3), folds=2)
    for report, method in ((gradients, "gard"), (tasks, "task")):
        allocation = lorank.allocate(report, method, r_min=1, r_max=8, avg_rank=4)
        assert not set(experts) & set(allocation.ranks)
        for name in experts:
            assert allocation.flags[name].startswith("not adapted: an expert: its gradient")
        allocation.save(tmp_path / "ranks.json")
        assert lorank.RankAllocation.load(tmp_path / "ranks.json") == allocation


def test_method_with_the_wrong_report_raises(tmp_path: Path) -> None:
    gradients = lorank.GradientReport([gradient_row("a", (4, 4), 2)])
    tasks = lorank.TaskReport([task_row("a", 1, 1)])
    weights: Any = {"a.weight": np.eye(4, dtype=np.float32)}
    torch.save({"a.weight": torch.eye(4)}, tmp_path / "model.bin")
    spectra = lorank.analyze(weights, progress=False)
    cases: list[tuple[str, list[Any], str]] = [
        ("htsr", [gradients, tasks], r"needs spectra: .*lorank\.analyze\("),
        (
            "gard",
            [tasks, spectra, weights, nn.Sequential(nn.Linear(4, 4))],
            r"needs gradients: .*gradients\(",
        ),
        ("gard", [tmp_path / "model.bin", str(tmp_path / "model.bin")], r"needs gradients"),
        ("task", [gradients, spectra, weights, tmp_path / "model.bin"], r"needs tasks: .*profile_tasks\("),
    ]
    for method, wrong, message in cases:
        for source in wrong:
            with pytest.raises(ValueError, match=f"method '{method}' {message}"):
                lorank.allocate(source, method, r_min=1, avg_rank=4)
    with pytest.raises(ValueError, match="'gard' needs a budget or avg_rank"):
        lorank.allocate(gradients, "gard")
    with pytest.raises(ValueError, match="'gard' has no option 'energy'"):
        lorank.allocate(gradients, "gard", avg_rank=4, energy=0.5)
    # The method "uniform" needs only shapes.
    for report in (gradients, tasks):
        assert lorank.allocate(report, "uniform", r_max=4).ranks == {"a": 4}


def test_ranks_of_tasks_equal_k_star_within_the_bounds() -> None:
    report = lorank.TaskReport([task_row(f"m.{i}", k, 2 * k) for i, k in enumerate((0, 1, 3, 7, 40))])
    allocation = lorank.allocate(report, "task", r_min=2, r_max=8)
    assert list(allocation.ranks.values()) == [2, 2, 3, 7, 8]
    assert list(allocation.scores.values()) == [0, 0, 1, 5, 38]
    predicted = lorank.allocate(report, "task", r_min=2, r_max=8, estimate="predicted_rank")
    assert list(predicted.ranks.values()) == [2, 2, 6, 8, 8]
    # c = 1 meets this budget.
    budget = 140 * (2 + 2 + 3 + 7 + 40)
    under_budget = lorank.allocate(report, "task", r_min=2, r_max=64, budget=budget)
    assert list(under_budget.ranks.values()) == [2, 2, 3, 7, 40]
    with pytest.raises(ValueError, match="estimate must be 'k_star' or 'predicted_rank', not 'rank'"):
        lorank.allocate(report, "task", estimate="rank")
