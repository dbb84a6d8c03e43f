"""Merges element by element against PEFT's functions on dense updates."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils

import lorank
from lorank.compression.merge_methods import MergeMethod, random_mask
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, loaded, norm, saved, trained
from tests.support.command_line import ok, run

SETTINGS: list[dict[str, Any]] = [
    {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "up_proj"]},
    {"r": 3, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 8, "lora_alpha": 8, "target_modules": ["up_proj", "q_proj"]},
]
WEIGHTS = [0.7, 0.3, -0.2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model = tiny_models.llama()
    return [
        saved(trained(model, LoraConfig(**s), seed=k), tmp_path_factory.mktemp(f"adapter{k}"))
        for k, s in enumerate(SETTINGS)
    ]


@pytest.fixture(scope="module")
def adapters(folders: list[Path]) -> list[lorank.LoraAdapter]:
    return [lorank.LoraAdapter.load(folder) for folder in folders]


def updates(count: int = 3, shape: tuple[int, int] = (37, 23)) -> list[npt.NDArray[np.float64]]:
    return list(np.random.default_rng(5).standard_normal((count, *shape)))


def merged(method: MergeMethod, arrays: Any, weights: Any, label: str = "m") -> npt.NDArray[np.float64]:
    return method.merged([lambda array=array: array.copy() for array in arrays], weights, label)


def of_peft(method: MergeMethod, arrays: Any, weights: Any) -> npt.NDArray[np.float64]:
    tensors, shares = [torch.from_numpy(a) for a in arrays], torch.tensor(weights, dtype=torch.float64)
    assert method.density is not None
    if method.name == "magnitude":
        found = merge_utils.magnitude_prune(tensors, shares, method.density)
    else:
        found = merge_utils.ties(tensors, shares, method.density, method.election)
    return np.asarray(found)


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.777, 1.0])
@pytest.mark.parametrize(
    ("name", "election"), [("magnitude", "total"), ("ties", "total"), ("ties", "frequency")]
)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [0.0, 2.0, 0.0]])
def test_deterministic_methods_equal_peft(
    name: Any, election: Any, density: float, weights: list[float]
) -> None:
    method = MergeMethod(name, density, election=election)
    expected = of_peft(method, updates(), weights)
    np.testing.assert_allclose(merged(method, updates(), weights), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["dare", "dare-ties"])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_dare_equals_peft_with_the_same_masks(
    name: Any, election: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = MergeMethod(name, 0.3, 11, election)
    masks = [torch.from_numpy(random_mask((37, 23), 0.3, 11, "m", i).astype(np.float64)) for i in range(3)]
    monkeypatch.setattr(torch, "bernoulli", lambda _: masks.pop(0))
    tensors, shares = [torch.from_numpy(a) for a in updates()], torch.tensor(WEIGHTS, dtype=torch.float64)
    if name == "dare":
        expected = merge_utils.dare_linear(tensors, shares, 0.3)
    else:
        expected = merge_utils.dare_ties(tensors, shares, 0.3, election)
    found = merged(method, updates(), WEIGHTS)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-15)


def test_masks_follow_from_seed_module_and_position() -> None:
    key = int.from_bytes(hashlib.sha256(b"3\n1\nq").digest()[:16], "little")
    expected = np.random.Generator(np.random.Philox(key=key)).random((200, 300)) < 0.25
    mask = random_mask((200, 300), 0.25, 3, "q", 1)
    assert np.array_equal(mask, expected)
    assert mask.mean() == pytest.approx(0.25, abs=0.01)
    for other in [(4, "q", 1), (3, "r", 1), (3, "q", 0)]:
        assert not np.array_equal(mask, random_mask((200, 300), 0.25, *other))


def test_dare_is_unbiased() -> None:
    draws = [merged(MergeMethod("dare", 0.5, seed), updates(), WEIGHTS) for seed in range(800)]
    expected = sum(w * a for w, a in zip(WEIGHTS, updates(), strict=True))
    # The variance of an element is the sum of w^2 x^2 (1 - density) / density.
    deviation = np.sqrt(sum((w * a) ** 2 for w, a in zip(WEIGHTS, updates(), strict=True)) / 800)
    assert np.abs((np.mean(draws, axis=0) - expected) / deviation).max() < 5


def test_equal_elements_are_pruned_in_order() -> None:
    found = merged(MergeMethod("magnitude", 0.5), [np.array([[1.0, -1.0], [1.0, 1.0]])], [1.0])
    assert found.tolist() == [[1.0, -1.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["magnitude", "ties", "dare", "dare-ties"])
def test_merged_adapter_and_certificate_equal_the_dense_merge(
    adapters: list[lorank.LoraAdapter], name: Any
) -> None:
    options = {"method": name, "density": 0.4, "seed": 7, "progress": False}
    method = MergeMethod(name, 0.4, 7)
    parts = [dense(adapter) for adapter in adapters]
    names = {module for part in parts for module in part}
    target = {}
    for module in names:
        chosen = [(p[module], w) for p, w in zip(parts, WEIGHTS, strict=True) if module in p]
        target[module] = merged(
            method, [x.astype(np.float64) for x, _ in chosen], [w for _, w in chosen], module
        )
    exact = lorank.merge(adapters, WEIGHTS, energy=1.0, **options)
    assert distance(dense(exact), target) <= 2e-6 * norm(target)
    small = lorank.merge(adapters, WEIGHTS, avg_rank=4, **options)
    assert small.certificate is not None
    assert small.certificate.error == pytest.approx(distance(dense(small), target), rel=1e-5)
    assert small.certificate.norm == pytest.approx(norm(target), rel=1e-6)
    assert f"by {method}," in small.certificate.action
    assert ("seed 7" in small.certificate.action) == name.startswith("dare")


def test_ties_equals_peft_model(folders: list[Path]) -> None:
    model = PeftModel.from_pretrained(tiny_models.llama(), folders[0], adapter_name="a0")
    for k in (1, 2):
        model.load_adapter(folders[k], adapter_name=f"a{k}")
    model.add_weighted_adapter(
        ["a0", "a1", "a2"], [1.0, 0.5, 2.0], "t", combination_type="ties_svd", svd_rank=16, density=0.5
    )
    ours = lorank.merge(
        folders, [1.0, 0.5, 2.0], method="ties", density=0.5, avg_rank=16, scope="module", progress=False
    )
    found, theirs = dense(ours), dense(lorank.LoraAdapter.from_model(model, "t"))
    assert found.keys() == theirs.keys()
    assert distance(found, theirs) <= 1e-4 * norm(theirs)


@pytest.mark.parametrize("name", ["ties", "dare-ties"])
def test_result_does_not_depend_on_threads(adapters: list[lorank.LoraAdapter], name: Any) -> None:
    results = [
        lorank.merge(adapters, method=name, density=0.3, seed=1, avg_rank=5, threads=threads, progress=False)
        for threads in (1, 2, 5)
    ]
    for other in results[1:]:
        for key, module in results[0].modules.items():
            assert np.array_equal(module.A, other.modules[key].A)
            assert np.array_equal(module.B, other.modules[key].B)


def test_default_weights_of_ties_give_the_mean(adapters: list[lorank.LoraAdapter]) -> None:
    twice = lorank.merge([adapters[0]] * 2, method="ties", density=1, energy=1, progress=False)
    assert distance(dense(twice), dense(adapters[0])) <= 2e-6 * norm(dense(adapters[0]))


def test_stacked_experts_are_merged_one_by_one() -> None:
    model = tiny_models.mixtral()
    config = LoraConfig(r=3, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    adapters = [lorank.LoraAdapter.from_model(trained(model, config, seed=k)) for k in range(2)]
    method = MergeMethod("dare", 0.5, 3)
    result = lorank.merge(adapters, method="dare", density=0.5, seed=3, energy=1, progress=False)
    for name, module in result.modules.items():
        sources = [a.modules[name] for a in adapters]
        for copy in range(module.copies):
            arrays = [(s.B[copy].astype(np.float64) * s.scaling) @ s.A[copy] for s in sources]
            expected = merged(method, arrays, [0.5, 0.5], f"{name}[{copy}]")
            np.testing.assert_allclose(module.B[copy] @ module.A[copy], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "method='ties' needs a density"),
        ({"method": "ties", "density": 0.0}, r"density=0\.0 is not above 0"),
        ({"method": "dare", "density": 1.5}, r"density=1\.5"),
        ({"method": "dare", "density": float("nan")}, "density=nan"),
        ({"density": 0.5}, "density has no meaning for method='sum'"),
        ({"method": "slerp"}, "method must be one of sum, ties"),
        ({"method": "ties", "density": 0.5, "election": "lot"}, "election must be"),
        ({"method": "dare", "density": 0.5, "seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options_raise(
    adapters: list[lorank.LoraAdapter], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lorank.merge(adapters, avg_rank=2, progress=False, **options)


def test_rank_ratio_of_a_dense_merge_raises(adapters: list[lorank.LoraAdapter]) -> None:
    with pytest.raises(ValueError, match="rank_ratio has no meaning"):
        lorank.merge(adapters, rank_ratio=0.5, method="ties", density=0.5, progress=False)


def test_values_that_are_not_finite_raise() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapter.base_model.model[0].lora_A["default"].weight.data[0, 0] = float("inf")
    broken = lorank.LoraAdapter.from_model(adapter)
    with pytest.raises(lorank.NumericalError, match="module '0'"):
        lorank.merge([broken], method="ties", density=0.5, avg_rank=1, progress=False)


def test_command(folders: list[Path], tmp_path: Path) -> None:
    arguments = [
        "merge",
        f"{folders[0]}:1",
        f"{folders[1]}:0.5",
        "-o",
        str(tmp_path / "out"),
        "--avg-rank",
        "2",
    ]
    ok(*arguments, "--method", "dare-ties", "--density", "0.5", "--seed", "4", "--election", "frequency")
    certificate = lorank.LoraAdapter.load(tmp_path / "out").certificate
    assert certificate is not None
    assert "dare-ties (density 0.5, seed 4, signs by frequency)" in certificate.action
    loaded(tiny_models.llama(), tmp_path / "out")
    wrong = run(*arguments, "--method", "ties")
    assert wrong.returncode == 2
    assert "density" in wrong.stderr
