"""Every function of the core raises ordinary exceptions for absurd arguments: no panic, hang or crash."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorank import _core
from lorank.sources import arrays

# `EXAMPLES=200000 pytest tests/core/test_absurd_arguments.py` searches longer.
EXAMPLES = int(os.environ.get("EXAMPLES", "400"))

# torch raises RuntimeError for tensors that NumPy cannot represent.
EXPECTED = (
    _core.LorankError,
    TypeError,
    ValueError,
    OverflowError,
    IndexError,
    OSError,
    MemoryError,
    RuntimeError,
)


class Subclass(np.ndarray[Any, Any]):
    """An array of a class of its own."""


def odd_arrays() -> list[Any]:
    """Return arrays of every kind that NumPy has."""
    plain = np.arange(12.0).reshape(3, 4)
    readonly = plain.copy()
    readonly.flags.writeable = False
    types = ["f4", "f2", "g", ">f8", "<i8", "u1", "?", "c16", "O", "U3", "S2", "M8[s]", "m8[D]", "V5"]
    cast = [np.zeros((2, 3), kind) for kind in types] + [np.zeros(4, kind) for kind in types]
    unaligned = np.frombuffer(bytes(97), np.uint8)[1:].view(np.float64)
    return [
        *cast,
        plain,
        plain[0],
        plain.T,
        plain[::-1],
        plain[:, ::2],
        plain[0, ::-2],
        readonly,
        unaligned,
        unaligned.reshape(3, 4),
        plain.view(Subclass),
        np.ma.masked_array(plain[0], mask=[1, 0, 1, 0]),
        np.zeros(()),
        np.zeros((2, 2, 2)),
        np.zeros(0),
        np.zeros((0, 5)),
        np.zeros((5, 0)),
        np.full(3, np.nan),
        np.full((2, 2), np.inf),
        np.array([1e308, 1e308]),
        np.array([5e-324, 1.0]),
        -plain,
        np.broadcast_to(np.float64(2), (5, 7)),
        np.broadcast_to(np.float32(2), (10**6, 10**6)),
        np.broadcast_to(np.float16(2), (2**30, 2**31)),
        np.lib.stride_tricks.sliding_window_view(np.arange(300.0), 100),
        np.lib.stride_tricks.sliding_window_view(np.arange(60.0, dtype=np.float32), 7),
        np.zeros(4, [("a", "f8"), ("b", "f4")]),
        np.zeros(4, [("a", "f8"), ("b", "f4")])["b"],
    ]


NUMBERS = [0, 1, 2, 3, 5, -1, True, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]
REALS = [0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    "exact",
    "fast",
    "sampled",
    "median",
    "mean",
    "xmin_mid",
    "F32",
    "float32",
    "uint8",
    "\0",
    "ä" * 9,
]
OTHERS: list[Any] = [None, b"", b"abc", bytearray(8), [], (), {}, [1.0, 2.0], [[1.0]], ["a"], object(), len]


def odd_values(folder: Path) -> list[Any]:
    """Return values of every kind that the functions of the core receive."""
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int64)}, folder / "a.safetensors")
    checkpoint = _core.Checkpoint(folder / "a.safetensors")
    matrices = [
        _core.Matrix.from_array(np.ones((3, 2))),
        _core.Matrix.from_array(np.ones((2, 3), np.float32)),
        _core.Matrix.from_array(np.zeros((0, 3))),
        _core.Matrix.from_array(np.full((2, 2), np.nan)),
        _core.Matrix.from_array(np.lib.stride_tricks.sliding_window_view(np.arange(300.0), 150)),
        _core.Matrix.from_array(np.broadcast_to(np.arange(200.0), (150, 200))),
        _core.Matrix.from_array(np.broadcast_to(np.arange(200.0, dtype="f4")[:, None], (200, 150))),
        _core._panicking_matrix(2, 3),
        _core._panicking_matrix(2**40, 2**40),
        checkpoint.matrix(1, 2, 3),
    ]
    found: list[Any] = []
    _core.decompose([[(matrices[0], matrices[1], 1.0)]], 1, lambda _, outcome: found.append(outcome))
    shapes = [(3, 4), (0, 0), (2**40, 2**40), (-1, 2), (1,)]
    nested = [matrices, matrices[:1], [[(matrices[0], matrices[1], 2.0)]], [(matrices[1], matrices[1])]]
    selections = [[(found[0], [True, False])], [(found[0], [])], [(found[0], [True] * 9)]]
    tensors = [
        [("a", [2, 3], matrices[1], "F32")],
        [("a", [2], b"12", "U8")],
        [("b", [], (checkpoint, 9), "F4")],
    ]
    values = odd_arrays() + NUMBERS + REALS + TEXTS + OTHERS + matrices + found + shapes
    return [*values, *nested, *selections, *tensors, checkpoint, [3, 4], [2**64], {"a": "b"}]


def methods(folder: Path) -> dict[str, tuple[Callable[..., Any], int]]:
    """Return every function and method of the core with its largest number of arguments."""
    matrix = _core.Matrix.from_array(np.ones((3, 2)))
    checkpoint = _core.Checkpoint(folder / "a.safetensors")
    return {
        "Checkpoint": (_core.Checkpoint, 1),
        "Matrix": (_core.Matrix, 1),
        "Decomposition": (_core.Decomposition, 1),
        "Matrix.from_array": (_core.Matrix.from_array, 2),
        "Matrix.to_array": (matrix.to_array, 1),
        "Checkpoint.tensors": (checkpoint.tensors, 1),
        "Checkpoint.files": (checkpoint.files, 1),
        "Checkpoint.metadata": (checkpoint.metadata, 1),
        "Checkpoint.matrix": (checkpoint.matrix, 4),
        "Checkpoint.stored_bytes": (checkpoint.stored_bytes, 1),
        "_panicking_matrix": (_core._panicking_matrix, 2),
        "available_threads": (_core.available_threads, 1),
        "spectrum": (_core.spectrum, 3),
        "alpha_hill": (_core.alpha_hill, 2),
        "check_thread_memory": (_core.check_thread_memory, 1),
        "copy_mapped": (_core.copy_mapped, 1),
        "energy_rank": (_core.energy_rank, 2),
        "exchange": (_core.exchange, 2),
        "marchenko_pastur": (_core.marchenko_pastur, 3),
        "marchenko_pastur_median": (_core.marchenko_pastur_median, 1),
        "spectral_metrics": (_core.spectral_metrics, 2),
        "analyze": (_core.analyze, 5),
        "sample": (_core.sample, 1),
        "decompose": (_core.decompose, 3),
        "rebuild": (_core.rebuild, 3),
        "subtract": (_core.subtract, 4),
        "UpdatedMatrix": (_core.UpdatedMatrix, 3),
        "compare": (_core.compare, 3),
        "gguf_types": (_core.gguf_types, 1),
        "select_largest": (_core.select_largest, 2),
        "select_smallest": (_core.select_smallest, 2),
        "select_energy": (_core.select_energy, 2),
        "select_budget": (_core.select_budget, 4),
        "write_safetensors": (_core.write_safetensors, 4),
    }


def fitting(name: str, values: list[Any]) -> list[list[Any]]:
    """Return, for each argument of a function, values of the right type, so that calls reach its body."""

    def of(*kinds: type) -> list[Any]:
        return [value for value in values if isinstance(value, kinds) and not isinstance(value, bool)]

    matrices, spectra, counts = of(_core.Matrix), [v for v in of(np.ndarray) if v.ndim == 1], of(int)
    lists, reals, texts = of(list), of(float), of(str)
    accuracies, receivers = ["exact", "fast", "sampled"], [lambda *_: None, None, lambda: None]
    shapes = [(12, 12), (3, 9), (4, 4), *of(tuple)]
    return {
        "Matrix.from_array": [of(np.ndarray), [None, *texts]],
        "spectrum": [matrices, accuracies, counts],
        "sample": [matrices],
        "alpha_hill": [spectra, ["median", "xmin_mid"]],
        "energy_rank": [spectra, reals],
        "marchenko_pastur": [spectra, shapes, ["mean", "median"]],
        "spectral_metrics": [spectra, shapes],
        "analyze": [lists, accuracies, counts, [True, False], receivers],
        "decompose": [lists, counts, receivers],
        "rebuild": [lists, counts, receivers],
        "subtract": [lists, counts, counts, receivers],
        "UpdatedMatrix": [matrices, lists, [None, *of(tuple)]],
        "compare": [lists, counts, receivers],
        "select_largest": [spectra, counts],
        "select_smallest": [spectra, counts],
        "select_energy": [spectra, reals],
        "select_budget": [spectra, [[4], [12], [3], [0, 4]], [[1], [0], [2**63], [1, 2]], counts],
        "write_safetensors": [[], lists, [{}, {"a": "b"}], counts],
    }.get(name, [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("absurd")


def failure(function: Callable[..., Any], arguments: Sequence[Any]) -> Exception | None:
    """Return the exception of a call, which must be of the expected classes; None if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*arguments)
        except EXPECTED as error:
            return error
    return None


def called(function: Callable[..., Any], arguments: Sequence[Any] = ()) -> None:
    """Call a function, whose exceptions must be of the expected classes and no defects."""
    error = failure(function, arguments)
    assert type(error) is not _core.LorankError or "a defect, in two lines" in str(error), error


def test_absurd_arguments_raise_ordinary_exceptions(folder: Path) -> None:
    values = odd_values(folder)
    targets = [folder / "out.safetensors", "nowhere/x", folder, "", "a\0b", 3, None]
    functions = methods(folder)
    public = {name for name in _core.__all__ if not isinstance(getattr(_core, name), type | str)}
    assert {name for name in functions if "." not in name} >= public
    count = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=EXAMPLES == 400,
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        name = data.draw(st.sampled_from(sorted(functions)), "function")
        function, most = functions[name]
        fits = fitting(name, values)
        size = most if fits else data.draw(st.integers(0, most + 1), "size")
        is_fitting = data.draw(st.lists(st.integers(0, 3).map(bool), min_size=size, max_size=size), "fits")
        arguments = [
            data.draw(
                st.sampled_from(fits[i]) if fits and fits[i] and is_fitting[i] else st.sampled_from(values),
                f"{i}",
            )
            for i in range(size)
        ]
        if name == "write_safetensors" and arguments:
            arguments[0] = data.draw(st.sampled_from(targets), "target")
        called(function, arguments)

    check()
    assert count >= EXAMPLES


def test_arrays_of_every_kind_become_matrices_or_type_errors() -> None:
    for value, accuracy in itertools.product(odd_arrays(), ["exact", "fast", "sampled"]):

        def spectrum(value: Any = value, accuracy: str = accuracy) -> None:
            _core.spectrum(arrays.matrix(value), accuracy, 2)

        called(spectrum)


def test_tensors_of_every_kind_become_matrices_or_type_errors() -> None:
    torch = pytest.importorskip("torch")
    plain = torch.arange(12.0).reshape(3, 4)
    tensors = [
        plain,
        plain.clone().requires_grad_(),
        torch.empty(2, 3, device="meta"),
        plain.to_sparse(),
        plain.to_sparse_csr(),
        torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        plain.to(torch.complex64).conj(),
        torch.view_as_complex(torch.ones(3, 4, 2)).imag,
        torch.complex(plain, plain).conj().imag,
        plain._neg_view(),
        plain.to(torch.bfloat16)._neg_view(),
        plain.to(torch.float8_e4m3fn),
        plain.to(torch.bfloat16).T,
        plain.expand(2, 3, 4),
        torch.ones(1).expand(10**6, 10**6),
        torch.ones(1, dtype=torch.float16).as_strided((10**6, 10**6), (0, 0)),
        torch.nested.nested_tensor([plain, plain]),
        torch.zeros(()),
        torch.zeros(0, 4),
        plain.bool(),
        torch.nn.Parameter(plain),
    ]
    for tensor in tensors:
        called(lambda tensor=tensor: _core.spectrum(arrays.matrix(tensor), "exact", 1))
