"""Arrays, tensors and options that task spectra read or refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lorank.task_spectra import InputMoments, TaskSpectrum, task_spectrum
from tests.support.task_samples import assert_same, sampled


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_small_float_types_are_read_exactly(dtype: Any) -> None:
    X, Y, _ = sampled([2.0, 1.0], 70, 0.1, 5, 4, 3)
    X, Y = X.astype(dtype), Y.astype(dtype)
    assert_same(task_spectrum(X, Y), task_spectrum(X.astype(np.float64), Y.astype(np.float64)), 0)


def test_tensors_of_any_type_are_read() -> None:
    X, Y, _ = sampled([2.0, 1.0], 70, 0.1, 5, 4, 3)
    x, y = torch.from_numpy(X).bfloat16(), torch.from_numpy(Y).float().requires_grad_()
    expected = task_spectrum(x.double().numpy(), y.detach().double().numpy())
    assert_same(task_spectrum(x, y), expected, 0)
    shared = InputMoments(folds=10)
    task = TaskSpectrum(inputs=shared)
    task.update(x, y[:, 0] * 2)
    shared.update(x)
    assert_same(task.estimate(), task_spectrum(x.double().numpy(), 2 * y.detach().double().numpy()[:, 0]), 0)


@pytest.mark.parametrize(
    "unreadable",
    [
        torch.ones(4, 2, device="meta"),
        torch.ones(4, 2).to_sparse(),
        [torch.ones(2, dtype=torch.bfloat16)] * 4,
        [[1.0, 2.0], [3.0]],
    ],
    ids=["meta", "sparse", "list of bfloat16", "ragged"],
)
def test_unreadable_arguments_raise_with_their_name(unreadable: Any) -> None:
    for name, pair in (("X", (unreadable, np.ones(4))), ("Y", (np.ones((4, 2)), unreadable))):
        with pytest.raises(ValueError, match=f"^{name} cannot be read as one array of real numbers: "):
            TaskSpectrum().update(*pair)


def test_arrays_need_no_torch() -> None:
    program = (
        "import sys, numpy, lorank; lorank.task_spectrum(numpy.eye(30)[:, :3], numpy.eye(30)[:, :2]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_results_are_read_only() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    found = task_spectrum(X, Y)
    with pytest.raises(ValueError, match="read-only"):
        found.singular_values[0] = 1.0
    with pytest.raises(AttributeError):
        found.k_star = 3


GOOD = np.ones((4, 2))


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (np.full((4, 2), np.nan), GOOD, "X holds NaN or infinite"),
        (GOOD, np.full((4, 2), np.inf), "Y holds NaN or infinite"),
        (GOOD, np.full(4, 1e200), "Y holds values beyond 1e\\+140"),
        (GOOD, np.ones((3, 2)), "X has 4 rows and Y has 3"),
        (np.ones(4), GOOD, r"X must have the shape \(samples, features\), not \(4,\)"),
        (GOOD, np.ones((4, 2, 1)), "Y must have the shape"),
        (GOOD, np.float64(1), "Y must have the shape"),
        (np.ones((4, 0)), GOOD, "X has no columns"),
        (GOOD, np.ones((4, 0)), "Y has no columns"),
        (GOOD, np.full((4, 2), 1j), "Y must hold real numbers, not complex128"),
        (np.full((4, 2), "a"), GOOD, "X must hold real numbers"),
        (GOOD[:0], GOOD[:0], "no samples"),
    ],
)
def test_malformed_arrays_raise(X: Any, Y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_spectrum(X, Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise must be positive and finite, not 0.0"),
        ({"noise": math.nan}, "noise must be positive"),
        ({"noise": math.inf}, "noise must be positive"),
        ({"leading": -1.0}, "leading must be positive"),
        ({"space": "log"}, "space must be 'weights' or 'prediction', not 'log'"),
        ({"folds": 1}, "folds must be an integer of at least 2, not 1"),
        ({"folds": 2.5}, "folds must be an integer"),
        ({"folds": True}, "folds must be an integer"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_spectrum(GOOD, GOOD, **options)


def test_module_imports_only_numpy() -> None:
    script = (
        "import sys, lorank.task_spectra; "
        "print([name for name in ('torch', 'scipy', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
