"""Updates whose energy or factors leave the range of floating-point numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import lorank


def written(folder: Path, b_size: float, a_size: float, dtype: Any = np.float32, alpha: float = 4.0) -> Path:
    """Write an adapter of two modules: `layers.0` has the given sizes, `layers.1` is ordinary."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, b, a in (("layers.0.q_proj", b_size, a_size), ("layers.1.q_proj", 1.0, 1.0)):
        key = f"base_model.model.{name}"
        with np.errstate(all="ignore"):
            tensors[f"{key}.lora_A.weight"] = (rng.standard_normal((4, 24)) * a).astype(dtype)
            tensors[f"{key}.lora_B.weight"] = (rng.standard_normal((32, 4)) * b).astype(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


EXTREMES = [
    (1e100, 1e100, np.float64, 4.0),
    (1e-120, 1e-120, np.float64, 4.0),
    (1e-42, 1e-42, np.float32, 4.0),
    (1.0, 1.0, np.float32, 1e300),
    (1.0, 1.0, np.float32, 1e-300),
    (1.0, 1.0, np.float32, 1e-80),
    (1.0, 1.0, np.float64, 1e160),
    (math.inf, 1.0, np.float32, 4.0),
    (math.nan, 1.0, np.float16, 4.0),
]


@pytest.mark.parametrize(("b", "a", "dtype", "alpha"), EXTREMES)
def test_energies_beyond_float64_are_refused(
    b: float, a: float, dtype: Any, alpha: float, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "a", b, a, dtype, alpha)
    for operation in (
        lambda: lorank.compress(adapter, avg_rank=2, progress=False),
        lambda: lorank.elastic(adapter, progress=False),
        lambda: lorank.family(adapter, [1, 2], progress=False),
        lambda: lorank.merge([adapter, adapter], avg_rank=2, progress=False),
    ):
        with pytest.raises(lorank.NumericalError, match=r"layers\.0\.q_proj"):
            operation()


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(1e-300, None), (1e-60, None), (1e60, None), (1e-44, "bfloat16")]
)
def test_saving_refuses_a_scaling_that_loses_the_update(alpha: float, dtype: Any, tmp_path: Path) -> None:
    adapter = lorank.LoraAdapter.load(written(tmp_path / "a", 1.0, 1.0, alpha=alpha))
    with pytest.raises(lorank.NumericalError, match="leaves the range of float32"):
        adapter.save(tmp_path / "b", dtype=dtype)
    assert not (tmp_path / "b").exists()


def test_saving_refuses_factors_that_round_to_zero(tmp_path: Path) -> None:
    adapter = lorank.LoraAdapter.load(written(tmp_path / "a", 1e-120, 1.0, np.float64))
    with pytest.raises(lorank.NumericalError, match=r"layers\.0\.q_proj.*round to zero in bfloat16"):
        adapter.save(tmp_path / "b", dtype="bfloat16")


def test_update_of_zero_is_no_error(tmp_path: Path) -> None:
    small = lorank.compress(written(tmp_path / "a", 0.0, 1.0), avg_rank=2, progress=False)
    assert small.certificate is not None
    assert small.certificate.modules[0].energy == 0
    assert small.certificate.modules[0].retained_energy == 1


@given(exponent=st.integers(-110, 110), alpha_exponent=st.integers(-90, 90), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_certificate_is_true_or_refused(
    exponent: int, alpha_exponent: int, seed: int, tmp_path: Path
) -> None:
    """NumPy's float64, after scaling to about 1, is the oracle."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    folder = tmp_path / "a"
    folder.mkdir(exist_ok=True)
    scale = 10.0**exponent
    tensors = {"m.lora_B.weight": b * scale, "m.lora_A.weight": a}
    save_file(tensors, folder / "adapter_model.safetensors")
    alpha = 3 * 10.0**alpha_exponent
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": alpha, "target_modules": ["m"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    values = np.linalg.svd(b @ a, compute_uv=False)
    unit = math.log10(values[0]) + exponent + alpha_exponent
    try:
        small = lorank.compress(folder, avg_rank=1, progress=False)
    except lorank.NumericalError:
        assert abs(exponent + alpha_exponent) > 100 or abs(alpha_exponent) > 100
        return
    certificate = small.certificate
    assert certificate is not None
    assert math.log10(certificate.spectral_error) == pytest.approx(
        unit + math.log10(values[1] / values[0]), abs=1e-9
    )
    assert certificate.relative_error == pytest.approx(
        np.linalg.norm(values[1:]) / np.linalg.norm(values), rel=1e-9
    )


def test_certificate_whose_total_overflows_is_damaged(tmp_path: Path) -> None:
    small = lorank.compress(written(tmp_path / "a", 1.0, 1.0), avg_rank=2, progress=False)
    small.save(tmp_path / "b")
    path = tmp_path / "b" / "lorank.json"
    content = json.loads(path.read_text())
    for module in content["modules"]:
        module["energy"] = 1.5e308
    path.write_text(json.dumps(content))
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert again.certificate is None
    assert any("the sum of all energies is not finite" in note for note in again.notes)
