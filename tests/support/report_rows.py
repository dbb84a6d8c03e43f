"""Rows of gradient and task reports with given ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorank.report.gradients import ModuleGradients
from lorank.report.tasks import ModuleTask


def gradient_row(name: str, shape: tuple[int, int], effective: float) -> ModuleGradients:
    return ModuleGradients(
        name=name,
        module=name,
        kind="linear",
        shape=shape,
        effective_rank=effective,
        eigenvalues=np.ones(4),
    )


def task_row(name: str, k_star: int, predicted_rank: int, **more: Any) -> ModuleTask:
    values: dict[str, Any] = {
        "rho": 1.5,
        "tau": 0.1,
        "noise": 0.01,
        "num_above": k_star,
        "singular_values": np.array([2.0, 1.0]),
        "predicted_r2": np.array([0.0, 0.5, np.nan]),
    }
    return ModuleTask(
        name=name,
        module=name,
        kind="linear",
        shape=(60, 80),
        k_star=k_star,
        predicted_rank=predicted_rank,
        **(values | more),
    )
