"""Values of packed integers equal those of compressed-tensors, GPTQ and AWQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.decoded_matrices import assert_same, decoded

ROWS, COLS = 72, 160


def packed_bits(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack codes along the last dimension, from the lowest bit on, into words of 32 bits."""
    loose = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = loose.reshape(*codes.shape[:-1], -1)
    padding = -stream.shape[-1] % 32
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, padding)])
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def random(high: int, *shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 160])
def test_packed_integers_equal_compressed_tensors(
    tmp_path: Path, bits: int, is_symmetric: bool, group: int
) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    options: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": is_symmetric}
    options |= {"strategy": "channel"} if group == COLS else {"strategy": "group", "group_size": group}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**options)
    )
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    generator = torch.Generator().manual_seed(bits)
    state = {
        "weight": torch.randn(ROWS, COLS, generator=generator),
        "weight_scale": torch.rand(ROWS, COLS // group, generator=generator) / 2 ** (bits - 2) + 1e-3,
    }
    half = 2 ** (bits - 1)
    if not is_symmetric:
        state["weight_zero_point"] = torch.randint(
            -half, half, state["weight_scale"].shape, generator=generator, dtype=torch.int8
        )
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    declared = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": options}}}
    tensors = {f"a.{name}": value for name, value in stored.items()}
    assert ("a.weight_zero_point" in tensors) is not is_symmetric
    assert_same(decoded(tmp_path, tensors, declared)["a"], expected)


def test_plain_zero_points_and_order_of_groups(tmp_path: Path) -> None:
    codes, zeros = random(16, ROWS, COLS), random(16, ROWS, 5, seed=1).astype(np.int8) - 8
    order = np.random.default_rng(3).permutation(np.arange(COLS) // 32).astype(np.int32)
    scale = np.random.default_rng(4).random((ROWS, 5), dtype=np.float32)
    tensors = {
        "a.weight_packed": torch.from_numpy(packed_bits(codes, 4)),
        "a.weight_scale": torch.from_numpy(scale),
        "a.weight_zero_point": torch.from_numpy(zeros),
        "a.weight_shape": torch.tensor([ROWS, COLS]),
    }
    for indices in (order, np.full(COLS, -1, dtype=np.int32)):
        column = order if indices is order else np.arange(COLS) // 32
        found = decoded(tmp_path, {**tensors, "a.weight_g_idx": torch.from_numpy(indices)})["a"]
        centred = codes.astype(np.float32) - 8 - zeros[:, column]
        assert_same(found, centred * scale[:, column])


def gptq(
    q: npt.NDArray[np.uint8],
    zeros: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
    groups: npt.NDArray[np.int32],
    bias: int,
) -> npt.NDArray[np.float32]:
    """Return the weight ``(out, in)`` of codes ``(in, out)``."""
    centred = q.astype(np.int32) - (zeros[groups].astype(np.int32) + bias)
    return (centred.astype(np.float32) * scales[groups].astype(np.float32)).T


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    groups=st.integers(1, 4),
    version=st.sampled_from(["gptq", "gptq_v2", None]),
    is_ordered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gptq_equals_numpy(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    size: tuple[int, int],
    groups: int,
    version: str | None,
    is_ordered: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    fan_in, out = 32 * groups * size[0], 32 * size[1]
    q, zeros = random(2**bits, fan_in, out, seed=seed), random(2**bits, groups, out, seed=seed + 1)
    scales = rng.standard_normal((groups, out)).astype(np.float16)
    index = (np.arange(fan_in) // (fan_in // groups)).astype(np.int32)
    index = rng.permutation(index) if is_ordered else index
    tensors = {
        "a.qweight": torch.from_numpy(np.ascontiguousarray(packed_bits(np.ascontiguousarray(q.T), bits).T)),
        "a.qzeros": torch.from_numpy(packed_bits(zeros, bits)),
        "a.scales": torch.from_numpy(scales),
        "a.g_idx": torch.from_numpy(index),
    }
    declared = {"quant_method": "gptq", "bits": bits, "group_size": fan_in // groups}
    declared |= {"checkpoint_format": version} if version else {}
    found = decoded(tmp_path_factory.mktemp("a"), tensors, declared)["a"]
    assert_same(found, gptq(q, zeros, scales, index, 0 if version == "gptq_v2" else 1))


@settings(max_examples=40, deadline=None)
@given(
    fan_in=st.integers(1, 40),
    words=st.integers(1, 20),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_awq_equals_numpy(
    tmp_path_factory: pytest.TempPathFactory, fan_in: int, words: int, groups: int, seed: int
) -> None:
    fan_in, out = fan_in * groups, 8 * words
    q, zeros = random(16, fan_in, out, seed=seed), random(16, groups, out, seed=seed + 1)
    scales = np.random.default_rng(seed).standard_normal((groups, out)).astype(np.float16)
    # The nibbles of a word, from the lowest: columns 0, 2, 4, 6, 1, 3, 5, 7.
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def interleaved(codes: npt.NDArray[np.uint8]) -> torch.Tensor:
        mixed = codes.reshape(codes.shape[0], -1, 8)[..., order].reshape(codes.shape)
        return torch.from_numpy(packed_bits(mixed, 4))

    tensors = {
        "a.qweight": interleaved(q),
        "a.qzeros": interleaved(zeros),
        "a.scales": torch.from_numpy(scales),
    }
    declared = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    found = decoded(tmp_path_factory.mktemp("a"), tensors, declared)["a"]
    index = (np.arange(fan_in) // (fan_in // groups)).astype(np.int32)
    assert_same(found, gptq(q, zeros, scales, index, 0))
