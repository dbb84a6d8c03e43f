"""Gradient spectra of live models, compared with autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorank
from lorank.report.gradients import effective_rank
from tests.support import tiny_models
from tests.support.gradient_oracle import assert_true, base_weights, same_spectra, true_gradients
from tests.support.profiled_models import (
    COUNT,
    Case,
    Convolutions,
    Layer,
    Recurrent,
    adapted,
    albert,
    called,
    images,
    label_batches,
    picture_batches,
    t5,
    text_batches,
    vectors,
)
from tests.support.seeds import seeded


def under(dtype: torch.dtype) -> Callable[[Any, Any], Any]:
    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return model(**batch).loss

    return loss


CASES = {
    "llama": Case(tiny_models.llama, 14),
    "llama, tied": Case(tiny_models.llama_tied, 14),
    "llama, head": Case(tiny_models.llama, 1, targets=["lm_head"]),
    "llama, float64": Case(lambda: tiny_models.llama().double(), 14),
    "llama, bfloat16": Case(lambda: tiny_models.llama().bfloat16(), 14, tolerance=0.03),
    "llama, bfloat16 autocast": Case(tiny_models.llama, 14, loss=under(torch.bfloat16), tolerance=0.03),
    "llama, float16 autocast": Case(tiny_models.llama, 14, loss=under(torch.float16), tolerance=0.01),
    "gpt2": Case(tiny_models.gpt2, 8),
    "bert": Case(tiny_models.bert_classifier, 13, label_batches),
    "bert, dropout": Case(lambda: tiny_models.bert_classifier().train(), 13, label_batches),
    "albert": Case(albert, 8, label_batches),
    "t5": Case(t5, 32),
    "vit": Case(tiny_models.vit, 13, picture_batches, targets=r"vit\..*"),
    "convolutions": Case(Convolutions, 4, images, called, r".+"),
    "convolutions, float64": Case(
        lambda: Convolutions().double(), 4, lambda: [x.double() for x in images()], called, r".+"
    ),
    "called twice": Case(Recurrent, 2, vectors, called),
    "adapter": Case(adapted, 14),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_spectra_equal_those_of_autograd(name: str) -> None:
    case = CASES[name]
    model, batches = case.make(), case.batches()
    torch.manual_seed(5)  # Seeds dropout.
    report = lorank.profile_gradients(model, batches, sketch=None, targets=case.targets, loss=case.loss)
    torch.manual_seed(5)
    gradients = true_gradients(model, batches, case.loss)
    assert len(report) == case.count
    assert report.num_batches == len(batches)
    assert report.sketch is None
    assert_true(report, gradients, case.tolerance)
    weights = base_weights(model)
    for row in report:
        assert int(np.prod(row.shape)) == weights[f"{row.module}.weight"].numel()


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = tiny_models.bert_classifier()
    calm = lorank.profile_gradients(model, label_batches(), sketch=None)
    torch.manual_seed(5)
    assert not same_spectra(lorank.profile_gradients(model.train(), label_batches(), sketch=None), calm, 1e-3)


@pytest.mark.parametrize(
    ("layer", "x_shape"),
    [
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, 5, stride=5), (2, 3, 5, 11)),
        (nn.Conv2d(3, 4, (1, 4), padding=(0, 3)), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, 2, padding="same", dilation=(3, 2)), (2, 3, 7, 6)),
        (nn.Conv2d(3, 4, 3), (3, 5, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"), (2, 3, 5, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 6)),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 6)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (2, 3, 5, 6)),
        (nn.Conv1d(3, 4, 3), (2, 3, 6)),
        (nn.Conv3d(3, 4, 2), (2, 3, 4, 5, 3)),
    ],
    ids=lambda value: f"{value}".replace(" ", "") if isinstance(value, nn.Module) else "",
)
def test_convolutions_are_profiled_correctly_or_skipped(layer: Any, x_shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"conv": Layer(layer), "plain": nn.Linear(4, 4)})
    batches = [torch.randn(x_shape, generator=seeded(i)) for i in range(4)]

    def loss(model: Any, x: torch.Tensor) -> Any:
        return model["conv"](x) + model["plain"](x.flatten()[:4]).square().sum()

    report = lorank.profile_gradients(model, batches, sketch=None, targets=r".+", loss=loss)
    assert_true(report, true_gradients(model, batches, loss))
    assert len(report) + len(report.skipped) == 2
    if len(x_shape) in (3, 5) and not isinstance(layer, nn.Conv2d):
        assert [skipped.reason for skipped in report.skipped] == ["a convolution that is grouped or not 2-D"]


def test_inputs_of_any_dimension_and_by_keyword_are_profiled() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.flat, self.deep = nn.Linear(4, 3), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep(input=torch.tanh(self.flat(x)).expand(2, 3, 4, 3)).square().sum()

    batches = vectors(3, 4, 4)
    for shape in ((4, 4), (4,)):
        cut = [x if shape == (4, 4) else x[0] for x in batches]
        report = lorank.profile_gradients(Odd(), cut, sketch=None, loss=called)
        assert_true(report, true_gradients(Odd(), cut, called))


def test_outputs_may_be_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.sigmoid_(self.first(x).mul_(2))
            return torch.tanh_(self.second(x).add_(1)).square().sum()

    report = lorank.profile_gradients(InPlace(), vectors(), sketch=None, loss=called)
    assert_true(report, true_gradients(InPlace(), vectors(), called))


def test_weights_of_peft_adapters_are_excluded() -> None:
    model = get_peft_model(
        tiny_models.bert_classifier(),
        LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    )
    report = lorank.profile_gradients(model, label_batches(2))
    plain = lorank.profile_gradients(tiny_models.bert_classifier(), label_batches(2))
    assert [row.name for row in report] == [row.name for row in plain]
    assert report.num_parameters == plain.num_parameters
    # B is zero, so outputs are unchanged.
    assert same_spectra(report, plain, 1e-5)


def test_spectra_scale_with_the_square_of_a_custom_loss() -> None:
    model, batches = tiny_models.llama(), text_batches(3)
    plain = lorank.profile_gradients(model, batches, sketch=None)
    scaled = lorank.profile_gradients(
        model, iter(batches), sketch=None, loss=lambda model, batch: 8 * model(**batch).loss
    )
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other.eigenvalues, 64 * one.eigenvalues, rtol=1e-3, atol=1e-12)
        assert one.effective_rank == other.effective_rank


def test_more_batches_than_weights_are_accepted() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    batches = vectors(9, 3, 2)
    report = lorank.profile_gradients(model, batches, sketch=None, loss=lambda m, x: m(x).square().sum())
    assert_true(report, true_gradients(model, batches, lambda m, x: m(x).square().sum()))
    assert np.all(report.modules[0].eigenvalues >= 0)
    assert effective_rank(report.modules[0].eigenvalues, 1 - 1e-6) == 2


def test_batches_without_a_module_count_as_zero_gradients() -> None:
    model = nn.ModuleDict({"always": nn.Linear(8, 4), "sometimes": nn.Linear(8, 4)})
    batches = vectors()

    def loss(model: Any, x: torch.Tensor) -> Any:
        name = "sometimes" if x[0, 0] > 0 else "always"
        return (model["always"](x) + model[name](x)).square().sum()

    assert 0 < sum(bool(x[0, 0] > 0) for x in batches) < COUNT
    report = lorank.profile_gradients(model, batches, sketch=None, loss=loss)
    assert_true(report, true_gradients(model, batches, loss))
    assert report["sometimes"].flags == ()


@pytest.mark.parametrize(
    "profile",
    [lorank.profile_gradients, partial(lorank.profile_tasks, folds=2, targets=["q_proj", "v_proj"])],
)
def test_iterators_stop_after_max_batches(profile: Any) -> None:
    seen, batches = [], text_batches(5)

    def stream() -> Iterator[Any]:
        for batch in batches:
            seen.append(batch)
            yield batch

    model = tiny_models.llama()
    report = profile(model, stream(), max_batches=3)
    assert len(seen) == 3
    assert report.to_json() == profile(model, batches[:3]).to_json()
    assert report.to_json() == profile(model, batches, max_batches=3).to_json()
    assert profile(model, batches, max_batches=99).to_json() == profile(model, iter(batches)).to_json()
    if profile is lorank.profile_gradients:
        assert report.num_batches == 3
        assert all(len(row.eigenvalues) == 3 for row in report)
    else:
        # The last token of a sequence has no successor, so its outputs do not affect the loss.
        assert report.num_samples == sum(batch["input_ids"][:, 1:].numel() for batch in batches[:3])
