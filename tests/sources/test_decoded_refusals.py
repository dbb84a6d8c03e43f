"""Packed weights that contradict their configuration or their scales are refused with one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank.sources import open_source
from tests.support.decoded_matrices import matrices, random_codes, write_model

FP8 = torch.float8_e4m3fn
ONE = torch.ones(())


def awq(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "a.qweight": random_codes((32, 4), torch.int32),
        "a.qzeros": random_codes((2, 4), torch.int32),
        "a.scales": torch.ones(2, 32),
        **more,
    }


CASES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "scales that divide no blocks": (
        {"a.weight": random_codes((64, 64), FP8), "a.weight_scale_inv": torch.ones(5, 3)},
        {},
        r"tensor `a\.weight_scale_inv`: has shape \[5, 3\], which does not divide 64 x 64",
    ),
    "blocks of another size than declared": (
        {"a.weight": random_codes((64, 64), FP8), "a.weight_scale_inv": torch.ones(4, 4)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        r"tensor `a\.weight_scale_inv`: .*\[4, 4\].*declared shape \(128, 128\)",
    ),
    "another method than declared": (
        awq(),
        {"quant_method": "fp8"},
        r"tensor `a\.qweight`: .*AWQ.*declares the quantization fp8",
    ),
    "a weight beside its codes": (
        awq() | {"a.weight": torch.ones(32, 32)},
        {},
        r"tensors `a\.qweight` and `a\.weight` define the same weight",
    ),
    "integers as scales": (
        {"a.weight": random_codes((64, 64), FP8), "a.weight_scale": torch.ones(64, 1, dtype=torch.int32)},
        {},
        r"tensor `a\.weight_scale`: holds scales of type I32",
    ),
    "zero points of another shape": (
        awq() | {"a.qzeros": random_codes((3, 4), torch.int32)},
        {},
        r"tensor `a\.qzeros`: has shape \[3, 4\], expected 8 elements",
    ),
    "zero points of integers of another shape": (
        {
            "a.weight": random_codes((64, 64), torch.int8),
            "a.weight_scale": torch.ones(64, 1),
            "a.weight_zero_point": torch.ones(9, dtype=torch.int8),
        },
        {},
        r"tensor `a\.weight_zero_point`: has shape \[9\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_contradictions_are_refused_when_the_source_is_opened(tmp_path: Path, name: str) -> None:
    tensors, quantization, message = CASES[name]
    folder = write_model(tmp_path, tensors, quantization)
    with pytest.raises(lorank.FormatError, match=message) as error:
        open_source(folder)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_absurd_shapes_of_packed_integers_are_skipped(tmp_path: Path) -> None:
    for shape in ([2**62, 2**62], [-1, 5], [0, 0], [72, 10**15]):
        tensors = {
            "a.weight_packed": random_codes((72, 20), torch.int32),
            "a.weight_scale": torch.ones(72, 5),
            "a.weight_shape": torch.tensor(shape),
        }
        source = open_source(write_model(tmp_path, tensors))
        assert not source.matrices
        assert source.num_parameters is None


def test_group_out_of_range_is_an_error_of_its_module(tmp_path: Path) -> None:
    tensors = {
        "a.qweight": random_codes((8, 32), torch.int32),
        "a.qzeros": random_codes((2, 4), torch.int32),
        "a.scales": torch.ones(2, 32),
        "a.g_idx": torch.arange(64, dtype=torch.int32) // 31,
    }
    folder = write_model(tmp_path, tensors, {"quant_method": "gptq", "bits": 4})
    message = r"tensor `a\.g_idx`: has group 2 at position 62, but there are 2 groups"
    with pytest.raises(lorank.FormatError, match=message):
        matrices(open_source(folder))
    with pytest.raises(lorank.FormatError, match=message):
        lorank.analyze(folder, progress=False)


def test_file_that_was_cut_off_after_opening_is_an_error(tmp_path: Path) -> None:
    tensors = {"a.weight": random_codes((64, 64), FP8), "a.weight_scale": ONE}
    source = open_source(write_model(tmp_path, tensors))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(lorank.FormatError, match=r"tensor `a\.weight"):
        matrices(source)


def test_updates_of_quantized_models_are_extracted(tmp_path: Path) -> None:
    """Both models are quantized, and the update between their values has rank 2."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-6, 7, (48, 32), generator=generator).float()
    left = torch.randint(0, 2, (48, 2), generator=generator).float()
    right = torch.randint(0, 2, (2, 32), generator=generator).float()
    scale = torch.full((48, 1), 0.25)
    folders = [
        write_model(tmp_path / name, {"a.q_proj.weight": x.to(FP8), "a.q_proj.weight_scale": scale})
        for name, x in (("base", weight), ("tuned", weight + left @ right))
    ]
    adapter = lorank.extract(*folders, energy=1.0, guess=True)
    (module,) = adapter.modules.values()
    update = module.scaling * (module.B @ module.A)
    torch.testing.assert_close(torch.as_tensor(update).float(), left @ right * 0.25, rtol=1e-4, atol=1e-4)
