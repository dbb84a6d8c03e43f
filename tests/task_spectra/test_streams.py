"""Samples in batches, merged streams and inputs that tasks share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorank.task_spectra import InputMoments, TaskSpectrum, task_spectrum
from tests.support.task_samples import assert_same, refitted_r2, sampled


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 60), max_size=6), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_estimate_does_not_depend_on_batches(cuts: list[int], folds: int, seed: int) -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 60, 0.1, seed, 6, 4)
    stream = TaskSpectrum(folds=folds)
    bounds = sorted({0, 60, *cuts})
    for start, stop in itertools.pairwise(bounds):
        stream.update(X[start:stop], Y[start:stop])
        stream.update(X[:0], Y[:0])
    assert_same(stream.estimate(), task_spectrum(X, Y, folds=folds))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 50), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_merging_equals_concatenation(cut: int, folds: int, seed: int) -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 50, 0.1, seed, 5, 4)
    first, second = TaskSpectrum(folds=folds), TaskSpectrum(folds=folds)
    if cut:
        first.update(X[:cut], Y[:cut])
    if cut < 50:
        second.update(X[cut:], Y[cut:])
    first.merge(second)
    assert_same(first.estimate(), task_spectrum(X, Y, folds=folds))


def test_rows_beyond_one_conversion_are_used() -> None:
    X, Y, _ = sampled([2.0, 1.0], 20_000, 0.1, 0, 3, 2)
    found = task_spectrum(X, Y)
    np.testing.assert_allclose(found.predicted_r2, refitted_r2(X, Y, 10), rtol=1e-9)


def test_tasks_with_shared_inputs_equal_separate_tasks() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 75, 0.1, 9, 6, 5)
    other = Y[:, :2] - 3 * X[:, 2:4] ** 2
    inputs = InputMoments(folds=5)
    tasks = [TaskSpectrum(inputs=inputs), TaskSpectrum(inputs=inputs)]
    for rows in (slice(0, 13), slice(13, 75)):
        inputs.update(X[rows])
        for task, target in zip(tasks, (Y, other), strict=True):
            task.update(X[rows], target[rows])
        tasks[0].estimate()  # Cached results must not outlive new rows.
    assert_same(tasks[0].estimate(), task_spectrum(X, Y, folds=5))
    assert_same(tasks[1].estimate(), task_spectrum(X, other, folds=5))
    inputs.update(X[:1])
    with pytest.raises(ValueError, match="have 76 samples and this task has 75"):
        tasks[0].estimate()


def test_shared_inputs_merge_once() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 75, 0.1, 9, 6, 5)
    inputs = [InputMoments(), InputMoments()]
    tasks = [TaskSpectrum(inputs=part) for part in inputs]
    for task, part, rows in zip(tasks, inputs, (slice(0, 33), slice(33, 75)), strict=True):
        part.update(X[rows])
        task.update(X[rows], Y[rows])
    inputs[0].merge(inputs[1])
    tasks[0].merge(tasks[1])
    assert_same(tasks[0].estimate(), task_spectrum(X, Y))
    with pytest.raises(ValueError, match="shares its inputs"):
        tasks[0].merge(TaskSpectrum())


def test_refused_batch_changes_nothing() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    stream = TaskSpectrum()
    stream.update(X, Y)
    before = stream.estimate()
    for bad_X, bad_Y, message in [
        (X[:, :3], Y, "X has 3 columns, but earlier batches had 4"),
        (X, Y[:, :2], "Y has 2 columns, but earlier batches had 3"),
        (X, Y * np.nan, "Y holds NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.update(bad_X, bad_Y)
    assert_same(stream.estimate(), before, 0)
    with pytest.raises(ValueError, match="10 folds cannot be merged with 3"):
        stream.merge(TaskSpectrum(folds=3))
    narrow = TaskSpectrum()
    narrow.update(X[:, :2], Y)
    with pytest.raises(ValueError, match="widths differ"):
        stream.merge(narrow)
    assert_same(stream.estimate(), before, 0)
    with pytest.raises(ValueError, match="contradicts inputs"):
        TaskSpectrum(folds=3, inputs=InputMoments(folds=4))
