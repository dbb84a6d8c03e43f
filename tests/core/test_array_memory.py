"""The memory of arrays during calls: arrays are not resized, and views claim no more than memory holds."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

import lorank
from lorank import _core


@pytest.mark.parametrize("share", [lambda x: x, lambda x: x[:], lambda x: x[1:].reshape(3, -1)[:, 1:]])
def test_arrays_are_not_resized_while_a_matrix_reads_them(share: Any) -> None:
    owner = np.arange(100.0).reshape(4, 25)
    owner = np.array(owner)  # Owns its memory.
    view = share(owner) if share(owner).ndim == 2 else share(owner.reshape(-1))
    matrix = _core.Matrix.from_array(view)
    expected = view.copy()
    with pytest.raises(ValueError, match="cannot resize"):
        owner.resize(10**6, refcheck=False)
    assert np.array_equal(matrix.to_array(), expected)
    del matrix, view
    _core.available_threads()  # The references of other threads are released by the next call.
    owner.resize((4, 30), refcheck=False)


def test_values_are_not_resized_during_a_call() -> None:
    values = np.random.default_rng(0).random(8_000_000)
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(lorank.alpha_hill(values)))
    thread.start()
    time.sleep(0.1)
    if thread.is_alive():
        with pytest.raises(ValueError, match="cannot resize"):
            values.resize(10, refcheck=False)
    thread.join()
    assert found == [lorank.alpha_hill(values.copy())]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_views_that_repeat_few_elements_have_the_spectrum_of_their_copy(dtype: Any) -> None:
    row = np.linspace(-1, 1, 300).astype(dtype)
    views = [
        np.broadcast_to(row, (260, 300)),
        np.broadcast_to(row[:, None], (300, 260)),
        np.broadcast_to(row[:1], (40, 30)),
        np.lib.stride_tricks.sliding_window_view(row, 150),
        np.lib.stride_tricks.sliding_window_view(row, 290),
        np.lib.stride_tricks.sliding_window_view(row, 150).T,
        row.reshape(15, 20)[::-1, ::-1],
        row.reshape(15, 20)[:, ::-3],
    ]
    for view in views:
        for accuracy in ("exact", "fast"):
            found = lorank.spectrum(view, accuracy=accuracy)  # type: ignore[arg-type]
            expected = lorank.spectrum(np.array(view), accuracy=accuracy)  # type: ignore[arg-type]
            assert np.allclose(found, expected, rtol=0, atol=1e-12 * expected[-1])


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**20, 2**20), (10**8, 10), (3, 10**9)])
def test_views_that_claim_more_than_memory_holds_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"repeats the .* elements in memory"):
        lorank.spectrum(np.broadcast_to(np.float16(1), shape))
