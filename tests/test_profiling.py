"""Gradients and tasks of live models against what autograd and NumPy say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import lorank
import tiny_models
from lorank.profiling.probe import probing
from lorank.profiling.sketch import GradientSketches
from lorank.profiling.targets import find_targets
from lorank.report.gradients import effective_rank

COUNT = 6


def text_batches(count: int = COUNT, length: int = 10, labels: int | None = None) -> list[dict[str, Any]]:
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 64, (3, length + seed % 3), generator=generator)
        target = ids if labels is None else torch.randint(0, labels, (3,), generator=generator)
        made.append({"input_ids": ids, "labels": target})
    return made


class Convolutions(nn.Module):
    """Stride, padding and dilation, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.second = nn.Conv2d(5, 4, (3, 1), padding="same", dilation=2)
        self.twice = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.first(x))).mean((2, 3))
        x = self.twice(torch.relu(self.twice(x)))
        return x.square().mean()


def images(count: int = COUNT) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def adapted() -> Any:
    """A PEFT model whose adapter does something."""
    model = get_peft_model(tiny_models.llama(), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


CASES: dict[str, tuple[Callable[[], Any], Callable[[], list[Any]], Any]] = {
    "llama": (tiny_models.llama, text_batches, None),
    "gpt2": (tiny_models.gpt2, text_batches, None),
    "bert": (tiny_models.bert_classifier, lambda: text_batches(labels=2), None),
    "convolutions": (Convolutions, images, lambda model, batch: model(batch)),
    "adapter": (adapted, text_batches, None),
}


def true_spectra(model: Any, batches: list[Any], loss: Any) -> dict[str, npt.NDArray[np.float64]]:
    """Eigenvalues of the Gram matrix of `weight.grad`, with all base weights trainable."""
    modules = {t.info.name: t.module for t in find_targets(model, None).chosen}
    gradients: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in modules}
    for module in modules.values():
        module.weight.requires_grad_(True)
    for batch in batches:
        for module in modules.values():
            module.weight.grad = None
        value = loss(model, batch) if loss else model(**batch).loss
        value.backward()
        for name, module in modules.items():
            gradients[name].append(module.weight.grad.double().flatten().numpy().copy())
    stacked = {name: np.stack(rows) for name, rows in gradients.items()}
    return {name: np.linalg.eigvalsh(G @ G.T / len(G))[::-1] for name, G in stacked.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_exact_path_has_the_spectra_of_real_gradients(case: str) -> None:
    make, batches, loss = CASES[case]
    model = make()
    report = lorank.profile_gradients(model, batches(), sketch=None, loss=loss)
    expected = true_spectra(model, batches(), loss)
    assert [row.name for row in report] == list(expected)
    for row in report:
        np.testing.assert_allclose(row.eigenvalues, expected[row.name], atol=1e-5 * expected[row.name][0])
        assert row.effective_rank == effective_rank(expected[row.name], 0.9)
        assert row.mean_square == pytest.approx(expected[row.name].sum(), rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_tokens_count_once(reentrant: bool) -> None:
    model = tiny_models.llama().train()
    plain = lorank.profile_gradients(model, text_batches(), sketch=None)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = lorank.profile_gradients(model, text_batches(), sketch=None)
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-4, atol=1e-12)


def test_autocast_changes_the_gradients_but_not_how_they_are_summed() -> None:
    model = tiny_models.llama()

    def loss(module: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(**batch).loss

    wide = lorank.profile_gradients(model, text_batches(), sketch=None)
    narrow = lorank.profile_gradients(model, text_batches(), sketch=None, loss=loss)
    for one, other in zip(wide, narrow, strict=True):
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=0.1, atol=0.02 * one.mean_square)


def test_a_sketch_as_large_as_the_module_changes_nothing() -> None:
    model = tiny_models.llama()
    exact = lorank.profile_gradients(model, text_batches(), sketch=None)
    large = lorank.profile_gradients(model, text_batches(), sketch=64)
    for one, other in zip(exact, large, strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)


def test_sketches_keep_inner_products_on_average() -> None:
    layer = nn.Linear(24, 20, bias=False)
    model = nn.Sequential(layer)
    batches = [torch.randn(5, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def loss(module: Any, batch: torch.Tensor) -> Any:
        return module(batch).square().sum()

    def energy(sketch: int | None, seed: int = 0) -> float:
        report = lorank.profile_gradients(model, batches, loss=loss, sketch=sketch, seed=seed, progress=False)
        return report.modules[0].mean_square

    sketched = [energy(8, seed) for seed in range(200)]
    # Two independent projections of size 8: the mean of 200 has a relative error of about 5 %.
    assert np.mean(sketched) == pytest.approx(energy(None), rel=0.15)
    assert energy(8, 1) == energy(8, 1) != energy(8, 2)


def test_projections_differ_between_modules() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    targets = find_targets(model, None).chosen
    sketches = GradientSketches(targets, 4)
    x = torch.randn(5, 16)
    assert not torch.equal(sketches.see_input(0, x), sketches.see_input(1, x))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = adapted().train()
    some = next(p for n, p in model.named_parameters() if "lora_A" in n)
    some.grad = torch.ones_like(some)
    before = copy.deepcopy(model.state_dict())
    required = [p.requires_grad for p in model.parameters()]
    batches = text_batches(3)
    if fails:
        batches[2]["labels"] = "nonsense"
        with pytest.raises((TypeError, AttributeError, ValueError)):
            lorank.profile_gradients(model, batches)
    else:
        lorank.profile_gradients(model, batches)
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(some.grad, torch.ones_like(some))
    assert all(p.grad is None for p in model.parameters() if p is not some)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_profiled_is_told() -> None:
    model = tiny_models.mixtral()
    report = lorank.profile_gradients(model, text_batches(3))
    assert {s.reason.split(":")[0] for s in report.skipped} == {"an expert"}
    assert {row.name.rpartition(".")[2] for row in report} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match=r"no module .* that can be profiled"):
        lorank.profile_gradients(model, text_batches(3), targets=["embed_tokens"])


def test_a_module_that_no_gradient_reaches_is_flagged() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    report = lorank.profile_gradients(
        model, [torch.randn(2, 4)], loss=lambda module, x: module["used"](x).sum()
    )
    assert report["unused"].effective_rank == 0
    assert report["unused"].flags == ("no gradient reached it",)
    assert report["used"].effective_rank == 1
    alloc = lorank.allocate(report, "gard", r_min=1, r_max=8, avg_rank=3)
    assert alloc.ranks == {"used": 5, "unused": 1}
    assert "no gradient" in alloc.flags["unused"]


def test_refusals_come_with_reasons() -> None:
    model, batches = tiny_models.llama(), text_batches(2)
    for options, reason in (
        ({"energy": 0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"sketch": 0}, "sketch"),
        ({"sketch": True}, "sketch"),
        ({"targets": ["nothing"]}, "no module is named 'nothing'"),
        ({"loss": lambda m, b: m(**b).logits}, "must be a number"),
        ({"loss": lambda m, b: m(**b).loss * float("nan")}, "the loss is nan"),
        ({"loss": lambda m, b: m(**b).logits[0, 0, 0] * 1e38 * 1e38}, "the loss is"),
    ):
        with pytest.raises(ValueError, match=reason):
            lorank.profile_gradients(model, batches, **options)
    with pytest.raises(ValueError, match="no batches"):
        lorank.profile_gradients(model, [])
    with pytest.raises(ValueError, match="no loss"):
        lorank.profile_gradients(model, [{"input_ids": batches[0]["input_ids"]}])
    with pytest.raises(ValueError, match="no mapping"):
        lorank.profile_gradients(model, [batches[0]["input_ids"]])


def test_a_gradient_that_is_not_finite_names_its_module() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="batch 1: the gradient of 0 holds NaN"):
        lorank.profile_gradients(
            nn.Sequential(layer),
            [torch.ones(1, 2), torch.zeros(1, 2)],
            # The root of zero has an infinite slope.
            loss=lambda m, x: (m(x).sum() * x.sum()).abs().sqrt(),
        )


def test_iterators_stop_after_max_batches() -> None:
    seen = []

    def stream() -> Any:
        for batch in text_batches(5):
            seen.append(batch)
            yield batch

    report = lorank.profile_gradients(tiny_models.llama(), stream(), max_batches=2)
    assert report.num_batches == len(seen) == 2
    assert all(len(row.eigenvalues) == 2 for row in report)


@given(
    st.lists(st.floats(0, 1e300), min_size=1, max_size=30),
    st.floats(0.01, 1),
    st.integers(-60, 60),
)
def test_effective_rank_is_the_fewest_that_hold_the_energy(
    values: list[float], energy: float, exponent: int
) -> None:
    found = effective_rank(values, energy)
    scale = max(values)
    if scale == 0:
        assert found == 0
        return
    ordered = sorted((value / scale for value in values), reverse=True)
    total = sum(ordered)
    assert sum(ordered[:found]) >= energy * total * (1 - 1e-9)
    assert sum(ordered[: found - 1]) <= energy * total * (1 + 1e-9)
    assert effective_rank(np.array(ordered) * 2.0**exponent, energy) == effective_rank(ordered, energy)
    assert effective_rank(values, 1.0) >= found


def test_reports_come_back_from_files(tmp_path: Path) -> None:
    model = tiny_models.mixtral()
    gradients = lorank.profile_gradients(model, text_batches(3))
    tasks = lorank.profile_tasks(model, text_batches(3), folds=2)
    for report, name in ((gradients, "g.json"), (tasks, "t.json")):
        report.save(tmp_path / name)
        again = type(report).load(tmp_path / name)
        assert again.to_json() == report.to_json()
        assert list(report.to_pandas()["name"]) == [row.name for row in report]
        assert again["layers.0.self_attn.q_proj"].shape == (32, 32)
    with pytest.raises(lorank.FormatError, match="GradientReport"):
        lorank.GradientReport.load(tmp_path / "t.json")
    (tmp_path / "junk.json").write_text("[" * 100_000)
    with pytest.raises(lorank.FormatError, match=r"junk\.json"):
        lorank.TaskReport.load(tmp_path / "junk.json")
    assert [row.effective_rank for row in gradients.with_energy(1.0)] == [3] * len(gradients)


def test_ranks_follow_effective_ranks() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(), energy=0.7)
    alloc = lorank.allocate(report, "gard", r_min=1, r_max=16, budget=6000)
    assert alloc.num_parameters <= 6000
    total = sum(row.effective_rank for row in report)
    for row in report:
        assert alloc.scores[row.name] == pytest.approx(row.effective_rank / total)
    for a in report:
        for b in report:
            if a.effective_rank > b.effective_rank and sum(a.shape) == sum(b.shape):
                assert alloc.ranks[a.name] >= alloc.ranks[b.name]
    with pytest.raises(ValueError, match="needs a budget"):
        lorank.allocate(report, "gard")
    with pytest.raises(ValueError, match=r"needs spectra.*lorank\.analyze"):
        lorank.allocate(report, "htsr")
    with pytest.raises(ValueError, match=r"needs gradients.*profile_gradients"):
        lorank.allocate(tiny_models.llama(), "gard", avg_rank=4)


class Recorder:
    """An observer that keeps everything, in the order of the backward pass."""

    def __init__(self, count: int) -> None:
        self.x: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.y: list[list[torch.Tensor]] = [[] for _ in range(count)]

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        del index
        return x.clone()

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        self.x[index].append(kept)
        self.y[index].append(-delta)


@pytest.mark.parametrize("space", ["weights", "prediction"])
def test_tasks_are_those_of_inputs_and_output_gradients(space: Any) -> None:
    model, batches = tiny_models.llama(), text_batches()
    report = lorank.profile_tasks(model, batches, folds=3, space=space)
    targets = find_targets(model, None).chosen
    recorder = Recorder(len(targets))
    with probing(targets, recorder):
        for batch in batches:
            model(**batch).loss.backward()
    for index, row in enumerate(report):
        X, Y = torch.cat(recorder.x[index]).numpy(), torch.cat(recorder.y[index]).numpy()
        expected = lorank.task_spectrum(X, Y, folds=3, space=space)
        np.testing.assert_allclose(
            row.singular_values, expected.singular_values, rtol=1e-6, atol=1e-8 * expected.singular_values[0]
        )
        assert (row.k_star, row.predicted_rank) == (expected.k_star, expected.predicted_rank)
    alloc = lorank.allocate(report, "task", r_min=2, r_max=4)
    assert list(alloc.ranks.values()) == [min(max(row.k_star, 2), 4) for row in report]
    wide = lorank.allocate(report, "task", r_min=1, r_max=32, estimate="predicted_rank")
    assert list(wide.ranks.values()) == [max(row.predicted_rank, 1) for row in report]


def test_several_passes_find_what_one_finds() -> None:
    model, batches = tiny_models.llama(), text_batches()
    whole = lorank.profile_tasks(model, batches, folds=2)
    # Room for the widest module alone, so that groups are cut up.
    parts = lorank.profile_tasks(model, batches, folds=2, memory=16 * 2 * 48**2 + 8 * 2 * 48 * 32)
    assert parts.to_json() == whole.to_json()
    with pytest.raises(ValueError, match="batches is an iterator"):
        lorank.profile_tasks(model, iter(batches), folds=2, memory=120_000)
    with pytest.raises(ValueError, match="alone need"):
        lorank.profile_tasks(model, batches, folds=2, memory=1000)
    assert lorank.profile_tasks(model, iter(batches), folds=2).to_json() == whole.to_json()
