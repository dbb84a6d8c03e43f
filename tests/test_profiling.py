"""Gradients and tasks of live models against what autograd and NumPy say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import lorank
import tiny_models
from live_tensors import live_numbers, only_new_tensors
from lorank.profiling.sketch import GradientSketches
from lorank.profiling.targets import find_targets
from lorank.report.gradients import ModuleGradients, effective_rank
from lorank.report.tasks import ModuleTask

Array = npt.NDArray[np.float64]
Batches = list[Any]

COUNT = 6
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_batches(count: int = COUNT, length: int = 10, labels: int | None = None) -> Batches:
    """Batches whose lengths differ."""
    made = []
    for seed in range(count):
        ids = torch.randint(1, 64, (3, length + seed % 3), generator=seeded(seed))
        target = ids if labels is None else torch.randint(0, labels, (3,), generator=seeded(seed))
        made.append({"input_ids": ids, "labels": target})
    return made


def label_batches(count: int = COUNT) -> Batches:
    return text_batches(count, labels=2)


def picture_batches() -> Batches:
    return [
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=seeded(i)), "labels": torch.tensor([i % 2, 1])}
        for i in range(COUNT)
    ]


def images(count: int = COUNT) -> Batches:
    return [torch.randn(2, 3, 9, 8, generator=seeded(seed)) for seed in range(count)]


def vectors(count: int = COUNT, rows: int = 5, width: int = 8) -> Batches:
    return [torch.randn(rows, width, generator=seeded(seed)) for seed in range(count)]


def called(model: Any, batch: Any) -> Any:
    """The loss of models that return it."""
    return model(batch)


class Convolutions(nn.Module):
    """Stride, padding and dilation, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 5, 3, stride=(2, 1), padding=(1, 2))
        self.second = nn.Conv2d(5, 4, (3, 1), padding="same", dilation=2)
        self.third = nn.Conv2d(4, 6, (2, 3), padding="valid", dilation=(1, 2), bias=False)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.second(torch.relu(self.first(x))))
        return self.last(self.third(x).mean((2, 3))).square().mean()


class Layer(nn.Module):
    """One layer, under the name `layer`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().sum() / 10


class Recurrent(nn.Module):
    """One module, called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.enter(x))))
        return torch.tanh(self.twice(x)).square().sum()


class Readers(nn.Module):
    """Two modules that read one input, or each its copy; a third that reads what they make."""

    def __init__(self, copies: bool = False, first_counts: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(6, 3)
        self.copies, self.first_counts = copies, first_counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x.clone() if self.copies else x)
        if not self.first_counts:
            a = a.detach()
        return torch.tanh(self.c(torch.tanh(a))).square().sum() + torch.tanh(b).square().sum()


def albert() -> Any:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return transformers.AlbertForSequenceClassification(config).eval()


def t5() -> Any:
    model = tiny_models.t5()
    model.config.decoder_start_token_id = 0
    return model


def adapted() -> Any:
    """A PEFT model whose adapter does something."""
    model = get_peft_model(tiny_models.llama(), LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def base_weights(model: Any) -> dict[str, Any]:
    """The parameters of the base model, under the names that they have without PEFT."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def true_gradients(model: Any, batches: Batches, loss: Any = None) -> dict[str, Array]:
    """Flat gradients of every base weight that is trained, a row per batch."""
    model = copy.deepcopy(model).requires_grad_(True)
    weights = base_weights(model)
    found: dict[str, list[Array]] = {name: [] for name in weights}
    for batch in batches:
        model.zero_grad()
        value = loss(model, batch) if loss else model(**batch).loss
        value.backward()
        for name, weight in weights.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            found[name].append(gradient.double().flatten().numpy().copy())
    return {name: np.stack(rows) for name, rows in found.items()}


def true_spectrum(gradients: Array) -> Array:
    values = np.linalg.eigvalsh(gradients @ gradients.T / len(gradients))
    return np.asarray(values[::-1], dtype=np.float64)


def assert_true(report: lorank.GradientReport, gradients: dict[str, Array], tolerance: float = 1e-5) -> None:
    assert len(report) > 0
    for row in report:
        expected = true_spectrum(gradients[f"{row.module}.weight"])
        assert expected[0] > 0
        np.testing.assert_allclose(row.eigenvalues, expected, rtol=0, atol=tolerance * expected[0])
        assert np.all(np.diff(row.eigenvalues) <= 0)
        assert row.mean_square == pytest.approx(expected.sum(), rel=10 * tolerance)
        assert row.effective_rank == effective_rank(row.eigenvalues, report.energy)


def same_spectra(report: lorank.GradientReport, other: lorank.GradientReport, tolerance: float) -> bool:
    assert [row.name for row in report] == [row.name for row in other]
    return all(
        np.allclose(a.eigenvalues, b.eigenvalues, rtol=0, atol=tolerance * a.eigenvalues[0])
        for a, b in zip(report, other, strict=True)
    )


@dataclass(frozen=True)
class Case:
    """A model, its batches, and how many modules a profile of it has."""

    make: Callable[[], Any]
    count: int
    batches: Callable[[], Batches] = text_batches
    loss: Any = None
    targets: Any = None
    tolerance: float = 1e-5


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
def test_the_exact_path_has_the_spectra_of_real_gradients(name: str) -> None:
    case = CASES[name]
    model, batches = case.make(), case.batches()
    torch.manual_seed(5)  # Of dropout.
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


def test_dropout_counts_in_the_mode_that_the_model_is_in() -> None:
    model = tiny_models.bert_classifier()
    calm = lorank.profile_gradients(model, label_batches(), sketch=None)
    torch.manual_seed(5)
    assert not same_spectra(lorank.profile_gradients(model.train(), label_batches(), sketch=None), calm, 1e-3)


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.bert_classifier, t5, adapted])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_tokens_count_once(make: Callable[[], Any], reentrant: bool) -> None:
    model = make().train()
    batches = label_batches() if make is tiny_models.bert_classifier else text_batches()
    torch.manual_seed(3)
    plain = lorank.profile_gradients(model, batches, sketch=None)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    again = lorank.profile_gradients(model, batches, sketch=None)
    assert all(row.eigenvalues[0] > 0 for row in plain)
    assert same_spectra(plain, again, 1e-5)
    torch.manual_seed(3)
    tasks = lorank.profile_tasks(model, batches, folds=2)
    model.gradient_checkpointing_disable()
    torch.manual_seed(3)
    plain_tasks = lorank.profile_tasks(model, batches, folds=2)
    for one, other in zip(tasks, plain_tasks, strict=True):
        scale = other.singular_values[0]
        np.testing.assert_allclose(one.singular_values, other.singular_values, rtol=0, atol=1e-4 * scale)


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
def test_a_convolution_is_profiled_rightly_or_skipped(layer: Any, x_shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"conv": Layer(layer), "plain": nn.Linear(4, 4)})
    batches = [torch.randn(x_shape, generator=seeded(i)) for i in range(4)]

    def loss(model: Any, x: torch.Tensor) -> Any:
        return model["conv"](x) + model["plain"](x.flatten()[:4]).square().sum()

    report = lorank.profile_gradients(model, batches, sketch=None, targets=r".+", loss=loss)
    assert_true(report, true_gradients(model, batches, loss))
    assert len(report) + len(report.skipped) == 2
    if len(x_shape) in (3, 5) and not isinstance(layer, nn.Conv2d):
        assert [skipped.reason for skipped in report.skipped] == ["a convolution that is grouped or not 2-D"]


def test_inputs_of_any_rank_and_by_keyword() -> None:
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


def test_all_adapters_of_peft_are_left_out() -> None:
    model = get_peft_model(
        tiny_models.bert_classifier(),
        LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    )
    report = lorank.profile_gradients(model, label_batches(2))
    plain = lorank.profile_gradients(tiny_models.bert_classifier(), label_batches(2))
    assert [row.name for row in report] == [row.name for row in plain]
    assert report.num_parameters == plain.num_parameters
    # B is zero: nothing else has changed.
    assert same_spectra(report, plain, 1e-5)


def test_the_loss_may_be_the_callers_and_its_unit_counts_squared() -> None:
    model, batches = tiny_models.llama(), text_batches(3)
    plain = lorank.profile_gradients(model, batches, sketch=None)
    scaled = lorank.profile_gradients(
        model, iter(batches), sketch=None, loss=lambda model, batch: 8 * model(**batch).loss
    )
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other.eigenvalues, 64 * one.eigenvalues, rtol=1e-3, atol=1e-12)
        assert one.effective_rank == other.effective_rank


def test_batches_may_be_more_than_the_module_has_numbers() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    batches = vectors(9, 3, 2)
    report = lorank.profile_gradients(model, batches, sketch=None, loss=lambda m, x: m(x).square().sum())
    assert_true(report, true_gradients(model, batches, lambda m, x: m(x).square().sum()))
    assert np.all(report.modules[0].eigenvalues >= 0)
    assert effective_rank(report.modules[0].eigenvalues, 1 - 1e-6) == 2


# Sketches.


@pytest.mark.parametrize("size", [48, 10**6])
def test_a_sketch_as_large_as_the_module_changes_nothing(size: int) -> None:
    model = tiny_models.llama()
    exact = lorank.profile_gradients(model, text_batches(), sketch=None)
    large = lorank.profile_gradients(model, text_batches(), sketch=size, seed=7)
    for one, other in zip(exact, large, strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    small = lorank.profile_gradients(model, text_batches(), sketch=47)
    differ = [not np.array_equal(a.eigenvalues, b.eigenvalues) for a, b in zip(exact, small, strict=True)]
    # Only sides of 48 are projected.
    assert differ == [48 in row.shape for row in exact]


@pytest.mark.parametrize(("out", "fan_in", "size"), [(12, 12, 4), (24, 5, 8), (5, 24, 8), (30, 20, 1)])
def test_sketches_keep_inner_products_on_average(out: int, fan_in: int, size: int) -> None:
    targets = find_targets(nn.Sequential(nn.Linear(fan_in, out)), None).chosen
    rows = [torch.randn(6, fan_in + out, generator=seeded(i)) for i in range(3)]
    # Rows whose gradient is symmetric where it can be: equal projections of both sides would show.
    rows[0][:, fan_in : 2 * fan_in] = rows[0][:, : min(fan_in, out)] if out == fan_in else 1.0
    rows[1] = rows[0] + rows[1]
    split = [(row[:, :fan_in], row[:, fan_in:]) for row in rows]
    found = []
    for seed in range(600):
        sketches = GradientSketches(targets, size, seed)
        taken = []
        for x, delta in split:
            sketches.see_gradient(0, sketches.see_input(0, x[:4]), delta[:4])
            sketches.see_gradient(0, sketches.see_input(0, x[4:]), delta[4:])
            (sketch,) = sketches.take()
            assert sketch is not None
            assert sketch.shape == (min(out, size), min(fan_in, size))
            taken.append(sketch.flatten().double().numpy())
        found.append(np.stack(taken) @ np.stack(taken).T)
    whole = np.stack([(delta.T @ x).flatten().double().numpy() for x, delta in split])
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(np.mean(found, axis=0) - whole @ whole.T) <= 4.5 * error)
    assert np.all(error < 0.15 * np.abs(np.trace(whole @ whole.T)))


def test_the_spectrum_of_a_sketch_is_right_on_average() -> None:
    model = Readers()
    exact = lorank.profile_gradients(model, vectors(3), sketch=None, loss=called)
    found: dict[str, list[float]] = {row.name: [] for row in exact}
    for seed in range(150):
        for row in lorank.profile_gradients(model, vectors(3), sketch=3, seed=seed, loss=called):
            found[row.name].append(row.mean_square)
    for row in exact:
        error = np.std(found[row.name]) / np.sqrt(150)
        assert abs(np.mean(found[row.name]) - row.mean_square) <= 4.5 * error


def test_the_seed_decides_the_bits() -> None:
    model = tiny_models.llama()

    def values(seed: int) -> list[list[float]]:
        torch.manual_seed(np.random.default_rng().integers(2**31))
        report = lorank.profile_gradients(model, text_batches(3), sketch=8, seed=seed)
        assert report.sketch == 8
        return [row.eigenvalues.tolist() for row in report]

    assert values(1) == values(1)
    assert all(one != other for one, other in zip(values(1), values(2), strict=True))


def test_profiling_draws_nothing_from_the_global_generator() -> None:
    model = tiny_models.llama()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    lorank.profile_gradients(model, text_batches(2), sketch=8)
    lorank.profile_tasks(model, text_batches(2), folds=2, targets=["q_proj"])
    assert torch.equal(state, torch.get_rng_state())


def test_every_module_has_its_own_projections() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(16, 16)
            self.b = copy.deepcopy(self.a)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) + self.b(x)).square().sum()

    batches = vectors(3, 5, 16)
    one, other = lorank.profile_gradients(Twins(), batches, sketch=None, loss=called)
    np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    one, other = lorank.profile_gradients(Twins(), batches, sketch=4, loss=called)
    assert np.abs(one.eigenvalues - other.eigenvalues).max() > 1e-3 * one.eigenvalues[0]


@only_new_tensors()
def test_memory_grows_by_the_sketches_alone() -> None:
    """`modules * M * k^2` numbers and the projections, when no batch is on its way."""
    model, k = tiny_models.llama(), 16
    shapes = [target.info.shape for target in find_targets(model, None).chosen]
    sketches = sum(min(out, k) * min(fan_in, k) for out, fan_in in shapes)
    projections = sum(k * side for shape in shapes for side in shape if side > k)
    seen = []

    def drawn() -> Iterator[Any]:
        for batch in text_batches():
            seen.append(live_numbers())
            yield batch

    lorank.profile_gradients(model, drawn(), sketch=k)
    # The batches and what they are made of: a few rows of tokens.
    few = 100 * COUNT
    for count, numbers in enumerate(seen):
        assert abs(numbers - seen[0] - count * sketches - min(count, 1) * projections) <= few < sketches
    assert live_numbers() - seen[0] <= few


# Nothing is left behind.


def hooks(model: Any) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    more = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds + more]


def left_of(model: Any) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "parameters": [(id(p), p.tolist(), len(p._backward_hooks or ())) for p in model.parameters()],
        "buffers": [(name, buffer.tolist()) for name, buffer in model.named_buffers()],
        "hooks": hooks(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def interrupted(batches: Batches) -> Iterator[Any]:
    yield from batches
    raise KeyboardInterrupt


def explode(model: Any, batch: Any) -> Any:
    """Fails in the middle of a backward pass."""
    loss = model(**batch).loss
    if batch["input_ids"].shape[1] == 11:
        loss.register_hook(lambda _gradient: 1 / 0)
    return loss


def run_gradients(model: Any, batches: Any, **options: Any) -> lorank.GradientReport:
    return lorank.profile_gradients(model, batches, **options)


def run_tasks(model: Any, batches: Any, **options: Any) -> lorank.TaskReport:
    return lorank.profile_tasks(model, batches, folds=2, **options)


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("end", ["well", "interrupted", "in backward", "no loss", "nan"])
def test_the_model_is_left_as_it_was(profile: Any, checkpointing: bool, end: str) -> None:
    model = adapted().train()
    model.get_submodule("base_model.model.model.layers.1").eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    parameters = list(model.parameters())
    parameters[0].requires_grad_(True)
    for parameter in parameters[:5]:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.get_submodule("base_model.model.model.layers.0").register_forward_hook(lambda *_args: None)
    before, batches = left_of(model), text_batches(3)
    if end == "well":
        profile(model, batches)
    elif end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            profile(model, interrupted(batches))
    elif end == "in backward":
        with pytest.raises(ZeroDivisionError):
            profile(model, batches, loss=explode)
    elif end == "no loss":
        with pytest.raises(ValueError, match="no loss"):
            profile(model, [*batches, {"input_ids": batches[0]["input_ids"]}])
    else:
        with pytest.raises(ValueError, match="batch 0: the loss is nan"):
            profile(model, batches, loss=lambda m, b: m(**b).loss * float("nan"))
    assert left_of(model) == before


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_are_left_as_they_were(profile: Any, training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).train(training)
    before = left_of(model)
    profile(model, vectors(), loss=lambda m, x: m(x).square().sum())
    assert left_of(model) == before


def test_no_parameter_asks_for_a_gradient_meanwhile() -> None:
    model, seen = adapted(), []

    def loss(model: Any, batch: Any) -> Any:
        seen.append(any(parameter.requires_grad for parameter in model.parameters()))
        return model(**batch).loss

    lorank.profile_gradients(model, text_batches(2), loss=loss)
    assert seen == [False, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())


# Errors and flags.


def test_stacks_of_experts_are_skipped() -> None:
    for make in (tiny_models.mixtral, tiny_models.gpt_oss):
        report = lorank.profile_gradients(make(), text_batches(3))
        assert {row.name.rpartition(".")[2] for row in report} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert sorted(skipped.name for skipped in report.skipped) == [
            f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")
        ]
        assert all(skipped.reason.startswith("an expert: ") for skipped in report.skipped)
        tasks = lorank.profile_tasks(make(), text_batches(3), folds=2)
        assert [s.name for s in tasks.skipped] == [s.name for s in report.skipped]


def test_who_allocates_is_told_of_stacks_that_get_no_rank(tmp_path: Path) -> None:
    model = tiny_models.mixtral()
    experts = [
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")
    ]
    gradients = lorank.profile_gradients(model, text_batches(3))
    tasks = lorank.profile_tasks(model, text_batches(3), folds=2)
    for report, method in ((gradients, "gard"), (tasks, "task")):
        allocation = lorank.allocate(report, method, r_min=1, r_max=8, avg_rank=4)
        assert not set(experts) & set(allocation.ranks)
        for name in experts:
            assert allocation.flags[name].startswith("not adapted: an expert: its gradient")
        allocation.save(tmp_path / "ranks.json")
        assert lorank.RankAllocation.load(tmp_path / "ranks.json") == allocation


def test_embeddings_are_skipped_where_they_are_asked_for() -> None:
    model = tiny_models.llama()
    report = lorank.profile_gradients(model, text_batches(2), targets=["embed_tokens", "q_proj"])
    assert [skipped.name for skipped in report.skipped] == ["model.embed_tokens"]
    assert report.skipped[0].shape == (64, 32)
    assert "an embedding" in report.skipped[0].reason
    assert len(report) == 2
    assert not lorank.profile_gradients(model, text_batches(2)).skipped
    for profile in (run_gradients, run_tasks):
        with pytest.raises(ValueError, match=r"no module of LlamaForCausalLM that can be profiled"):
            profile(model, text_batches(2), targets=["embed_tokens"])


def test_a_module_that_no_gradient_reaches_is_flagged() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("used", "unused", "detached", "untracked")})

    def loss(model: Any, x: torch.Tensor) -> Any:
        with torch.no_grad():
            x = model["untracked"](x)
        return (model["used"](x) + model["detached"](x).detach()).sum()

    report = lorank.profile_gradients(model, vectors(3, 2, 4), loss=loss)
    assert report["used"].effective_rank > 0
    assert report["used"].flags == ()
    tasks = lorank.profile_tasks(model, vectors(8, 4, 4), loss=loss, folds=2)
    for name in ("unused", "detached", "untracked"):
        assert report[name].effective_rank == 0
        assert report[name].eigenvalues.tolist() == [0, 0, 0]
        assert report[name].flags == ("no gradient reached it",)
        assert tasks[name].flags == ("no gradient reached it",)
        assert (tasks[name].k_star, tasks[name].predicted_rank, tasks[name].num_above) == (0, 0, 0)
        assert len(tasks[name].singular_values) == 0
    allocation = lorank.allocate(report, "gard", r_min=1, r_max=4, avg_rank=7 / 4)
    assert allocation.ranks == {"used": 4, "unused": 1, "detached": 1, "untracked": 1}
    assert "no gradient" in allocation.flags["unused"]
    assert "used" not in allocation.flags
    assert lorank.allocate(tasks, "task", r_min=2).ranks["unused"] == 2


def test_batches_that_miss_a_module_count_as_zeros() -> None:
    model = nn.ModuleDict({"always": nn.Linear(8, 4), "sometimes": nn.Linear(8, 4)})
    batches = vectors()

    def loss(model: Any, x: torch.Tensor) -> Any:
        name = "sometimes" if x[0, 0] > 0 else "always"
        return (model["always"](x) + model[name](x)).square().sum()

    assert 0 < sum(bool(x[0, 0] > 0) for x in batches) < COUNT
    report = lorank.profile_gradients(model, batches, sketch=None, loss=loss)
    assert_true(report, true_gradients(model, batches, loss))
    assert report["sometimes"].flags == ()


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_refusals_come_with_reasons(profile: Any) -> None:
    model, batches = tiny_models.llama(), text_batches(2)
    options: list[tuple[dict[str, Any], str]] = [
        ({"targets": ["nothing"]}, "no module is named 'nothing'"),
        ({"targets": "nothing"}, "targets 'nothing' select none"),
        ({"loss": lambda m, b: m(**b).logits}, "batch 0: the loss must be a number that depends on"),
        ({"loss": lambda m, b: m(**b).loss.detach()}, "batch 0: the loss must be a number that depends on"),
        ({"loss": lambda m, b: m(**b).loss.item()}, "batch 0: the loss must be a number that depends on"),
        ({"loss": lambda m, b: m(**b).loss * float("nan")}, "batch 0: the loss is nan"),
        ({"loss": lambda m, b: m(**b).loss * float("inf")}, "batch 0: the loss is inf"),
        ({"loss": lambda *_: None}, "no loss"),
        ({"max_batches": 0}, "no batches"),
    ]
    for option, reason in options:
        with pytest.raises(ValueError, match=reason):
            profile(model, batches, **option)
    nothings: list[Any] = [[], iter([])]
    for nothing in nothings:
        with pytest.raises(ValueError, match="no batches: profiling needs at least one"):
            profile(model, nothing)
    with pytest.raises(ValueError, match=r"returned no loss: put labels into the batches, or give loss"):
        profile(model, [{"input_ids": batches[0]["input_ids"]}])
    with pytest.raises(ValueError, match=r"a batch is a Tensor, not a mapping: give loss="):
        profile(model, [batches[0]["input_ids"]])
    singles: list[Any] = [
        batches[0],
        transformers.BatchEncoding(batches[0]),
        batches[0]["input_ids"],
        None,
        3,
    ]
    for single in singles:
        with pytest.raises(TypeError, match=r"batches must be an iterable of batches, not .*: put a single"):
            profile(model, single)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not str: load it first"):
        profile("model", batches)
    with torch.device("meta"):
        empty = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="weight is on the meta device: load the model's weights first"):
        profile(empty, batches)
    with torch.inference_mode():
        cut_off = tiny_models.llama()
    with pytest.raises(ValueError, match=r"embed_tokens.weight was made under torch.inference_mode\(\)"):
        profile(cut_off, batches)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_switched_off_gradients_are_switched_on(profile: Any, mode: Any) -> None:
    expected = profile(tiny_models.llama(), text_batches(2))
    model = tiny_models.llama()
    with mode():
        found = profile(model, text_batches(2))
        assert not torch.is_grad_enabled()
    assert found == expected


def placed(model: Any) -> Any:
    """Where DataParallel takes a model to: a GPU, if there is one."""
    return model.cuda() if torch.cuda.is_available() else model


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_wrapped_models_have_their_own_names(profile: Any) -> None:
    model = placed(tiny_models.llama())
    expected = profile(model, text_batches(2))
    compiled = torch.compile(model)
    for wrapped in (compiled, nn.DataParallel(model), nn.DataParallel(compiled)):
        assert list(profile(wrapped, text_batches(2))) == list(expected)


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_no_copies_are_made_for_several_devices(profile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would share the hooks of the model, on other devices and at the same time."""
    model = placed(tiny_models.llama())
    expected = profile(model, text_batches(2))
    monkeypatch.setattr(nn.DataParallel, "forward", lambda *_, **__: pytest.fail("the wrapper was called"))
    assert profile(nn.DataParallel(model), text_batches(2)) == expected


class Checkpointed(nn.Module):
    """Blocks of a model that does not say what its input embeddings are, and changes its inputs in place."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(4, 4)
        self.gradient_checkpointing = True
        self.reentrant = reentrant

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run: Any = torch.utils.checkpoint.checkpoint(self.block, x.mul_(2), use_reentrant=self.reentrant)
        return run.square().sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_without_known_embeddings(reentrant: bool, wrap: Any) -> None:
    model = Checkpointed(reentrant)
    report = lorank.profile_gradients(wrap(model), vectors(3, 2, 4), sketch=None, loss=called)
    assert_true(report, true_gradients(Checkpointed(False), vectors(3, 2, 4), called))
    assert not any(hooks(model))


def test_checkpointing_of_a_model_within() -> None:
    """Its inputs are integers: only its embeddings can ask."""
    model = tiny_models.llama().train()
    plain = lorank.profile_gradients(model, text_batches(2))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert same_spectra(plain, lorank.profile_gradients(nn.DataParallel(model), text_batches(2)), 1e-5)


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    report = lorank.profile_gradients(Readers(), vectors(), loss=called, sketch=np.int64(4))  # type: ignore[arg-type]
    report.save(tmp_path / "report.json")
    assert lorank.GradientReport.load(tmp_path / "report.json").sketch == 4


def test_bad_options_are_refused_before_any_batch_is_drawn() -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was drawn")
        yield

    model = tiny_models.llama()
    for energy in (0, -0.1, 1.0001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
            lorank.profile_gradients(model, never(), energy=energy)
    for sketch in (0, -1, True, 2.5, "8"):
        with pytest.raises(ValueError, match=r"sketch must be a positive integer, or None"):
            lorank.profile_gradients(model, never(), sketch=sketch)  # type: ignore[arg-type]


def test_bad_options_of_tasks_are_refused() -> None:
    model, batches = tiny_models.llama(), text_batches(2)
    for folds in (1, 0, 2.0):
        with pytest.raises(ValueError, match="folds must be an integer of at least 2"):
            lorank.profile_tasks(model, batches, folds=folds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="space must be 'weights' or 'prediction'"):
        lorank.profile_tasks(model, batches, folds=2, space="log")  # type: ignore[arg-type]


def root_of_zero(model: Any, x: torch.Tensor) -> Any:
    """Zero has a root, whose slope is infinite."""
    used, other = model["used"](x), model["other"](x)
    return used.sum().square() + (other.sum() * x.sum()).abs().sqrt()


def test_a_gradient_that_is_not_finite_names_its_module() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    batches = [torch.ones(1, 2), torch.zeros(1, 2)]
    with pytest.raises(ValueError, match="batch 1: the gradient of other holds NaN or infinite values"):
        lorank.profile_gradients(model, batches, loss=root_of_zero)
    with pytest.raises(ValueError, match=r"other.*NaN or infinite"):
        lorank.profile_tasks(model, batches, loss=root_of_zero, folds=2)


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
        # No token follows the last of a sequence: its outputs count for nothing.
        assert report.num_samples == sum(batch["input_ids"][:, 1:].numel() for batch in batches[:3])


# Effective ranks.


@given(
    st.lists(st.one_of(st.floats(0, 1e300), st.sampled_from([0.0, 1.0, 2.0])), max_size=30),
    st.floats(1e-3, 1),
)
def test_effective_rank_is_the_fewest_that_hold_the_energy(values: list[float], energy: float) -> None:
    found = effective_rank(values, energy)
    if not any(values):
        assert found == 0
        return
    ordered = np.sort(np.array(values) / max(values))[::-1]
    held = [float(np.sum(ordered[:k])) for k in range(len(values) + 1)]
    # What lies nearer than rounding may fall either way.
    assert held[found] >= energy * held[-1] * (1 - 2e-12)
    assert held[found - 1] < energy * held[-1] * (1 + 1e-13)
    assert 1 <= found <= len(values)


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
    st.integers(-200, 200),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.randoms(),
)
def test_effective_rank_knows_no_scale_and_no_order_and_grows_with_energy(
    values: list[int], exponent: int, one: float, other: float, random: Any
) -> None:
    shuffled = random.sample(values, len(values))
    scaled = np.ldexp(np.array(shuffled, dtype=np.float64), exponent)
    assert effective_rank(scaled, one) == effective_rank(values, one)
    low, high = sorted((one, other))
    assert effective_rank(values, low) <= effective_rank(values, high)
    assert effective_rank([*values, 0, 0], one) == effective_rank(values, one)


@pytest.mark.parametrize(
    ("values", "energy", "expected"),
    [
        ([], 0.9, 0),
        ([0.0, 0.0], 0.9, 0),
        ([-1e-17, 0.0], 1.0, 0),
        ([3.0], 1e-300, 1),
        ([1.0] * 10, 0.9, 9),
        ([1.0] * 10, 0.7, 7),
        ([0.1] * 10, 0.3, 3),
        ([1.0] * 10, 1.0, 10),
        ([1.0] * 10, 0.9000001, 10),
        ([1.0, -5.0, 1.0], 1.0, 2),
        ([9.0, 1.0], 0.9, 1),
        ([1.0, 9.0], 0.900001, 2),
        ([1e308] * 4, 1.0, 4),
        ([5e-324] * 4, 0.5, 2),
        ([1.0, 1e-14], 1.0, 1),
        (np.array([4, 3, 2, 1], dtype=np.float32), 0.7, 2),
        ((4, 3, 2, 1), 0.7, 2),
    ],
)
def test_effective_ranks_at_the_edges(values: Any, energy: float, expected: int) -> None:
    assert effective_rank(values, energy) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_eigenvalues_that_are_not_finite_have_no_effective_rank(bad: float) -> None:
    with pytest.raises(ValueError, match="eigenvalues must be finite"):
        effective_rank([1.0, bad], 0.5)


@pytest.mark.parametrize("energy", [0, -0.5, 1.0000001, float("nan"), float("inf")])
def test_shares_out_of_range(energy: float) -> None:
    with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
        effective_rank([1.0], energy)


# Reports and ranks.


def gradient_row(name: str, shape: tuple[int, int], effective: float) -> ModuleGradients:
    return ModuleGradients(
        name=name,
        module=name,
        kind="linear",
        shape=shape,
        effective_rank=effective,
        eigenvalues=np.ones(4),
    )


def task_row(name: str, k_star: int, predicted_rank: int, **more: Any) -> ModuleTask:
    values: dict[str, Any] = {
        "rho": 1.5,
        "tau": 0.1,
        "noise": 0.01,
        "num_above": k_star,
        "singular_values": np.array([2.0, 1.0]),
        "predicted_r2": np.array([0.0, 0.5, np.nan]),
    }
    return ModuleTask(
        name=name,
        module=name,
        kind="linear",
        shape=(60, 80),
        k_star=k_star,
        predicted_rank=predicted_rank,
        **(values | more),
    )


def test_reports_are_equal_by_value() -> None:
    for one, other in (
        (gradient_row("a", (4, 4), 2), gradient_row("a", (4, 4), 3)),
        (task_row("a", 1, 1, rho=np.nan), task_row("a", 1, 1, rho=2.0)),
        (task_row("a", 1, 1), task_row("a", 1, 1, singular_values=np.array([2.0, 1.5]))),
        (task_row("a", 1, 1), task_row("a", 1, 1, singular_values=np.array([2.0]))),
    ):
        kind = lorank.GradientReport if isinstance(one, ModuleGradients) else lorank.TaskReport
        assert kind([copy.deepcopy(one)]) == kind((one,))
        assert kind([one]) != kind([other])
        assert kind([one]) != kind([one, one])
        assert kind([one]) != kind([one], source="elsewhere")
    assert lorank.GradientReport([]) != lorank.TaskReport([])


def test_profiles_are_kept_as_json(tmp_path: Path) -> None:
    for report in (lorank.GradientReport([gradient_row("a", (4, 4), 2)]), lorank.TaskReport([])):
        with pytest.raises(ValueError, match=r"x\.parquet: a \w+Report is kept as JSON"):
            report.save(tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sketch", [None, 8])
def test_gradient_reports_come_back_from_files(sketch: int | None, tmp_path: Path) -> None:
    report = lorank.profile_gradients(tiny_models.mixtral(), text_batches(3), sketch=sketch, energy=0.8)
    report.save(tmp_path / "g.json")
    again = lorank.GradientReport.load(tmp_path / "g.json")
    assert again == report
    assert (again.sketch, again.energy, again.num_batches) == (sketch, 0.8, 3)
    assert again.skipped
    ranks = [lorank.allocate(r, "gard", r_min=1, r_max=9, avg_rank=4).ranks for r in (report, again)]
    assert ranks[0] == ranks[1]


def test_task_reports_come_back_from_files(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 3), "unused": nn.Linear(8, 3)})
    report = lorank.profile_tasks(model, vectors(), loss=lambda m, x: m["used"](x).square().sum(), folds=2)
    report.save(tmp_path / "t.json")
    again = lorank.TaskReport.load(tmp_path / "t.json")
    assert again == report
    assert np.isnan(again["unused"].rho)
    odd = lorank.TaskReport([task_row("a", 1, 1, rho=np.inf, tau=np.nan, noise=-np.inf)])
    odd.save(tmp_path / "o.json")
    assert lorank.TaskReport.load(tmp_path / "o.json") == odd


def test_files_that_are_no_such_report(tmp_path: Path) -> None:
    gradients = lorank.GradientReport([gradient_row("a", (4, 4), 2)])
    tasks = lorank.TaskReport([task_row("a", 1, 1)])
    spectra = lorank.analyze({"a.weight": np.eye(4, dtype=np.float32)}, progress=False)
    contents: dict[str, Any] = {"g": gradients, "t": tasks, "s": spectra}
    for name, report in contents.items():
        report.save(tmp_path / f"{name}.json")
    texts = {
        "empty": "",
        "list": "[]",
        "null": "null",
        "deep": "[" * 100_000,
        "other": '{"format": "other", "version": 1}',
        "future": (tmp_path / "g.json").read_text().replace('"version": 1', '"version": 99'),
        "cut": (tmp_path / "g.json").read_text()[:-20],
        "shape": (tmp_path / "g.json").read_text().replace('"shape"', '"form"'),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    for name in [*texts, "t", "s"]:
        with pytest.raises(lorank.FormatError, match=rf"{name}\.json: is no GradientReport"):
            lorank.GradientReport.load(tmp_path / f"{name}.json")
    for name in [*texts, "g", "s"]:
        with pytest.raises(lorank.FormatError, match=rf"{name}\.json: is no TaskReport"):
            lorank.TaskReport.load(tmp_path / f"{name}.json")


def test_data_frames() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(3))
    frame = report.to_pandas()
    assert list(frame.columns) == ["name", "kind", "out", "in", "effective_rank", "mean_square", "flags"]
    assert list(frame["name"]) == [row.name for row in report]
    assert list(frame["mean_square"]) == [row.eigenvalues.sum() for row in report]
    assert list(zip(frame["out"], frame["in"], strict=True)) == [row.shape for row in report]
    tasks = lorank.TaskReport([task_row("a", 3, 2, flags=("one", "two")), task_row("b", 1, 1)])
    frame = tasks.to_pandas()
    assert list(frame["k_star"]) == [3, 1]
    assert list(frame["flags"]) == ["one; two", ""]


def test_rows_by_name() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(2))
    assert report[QUERY] is report["layers.0.self_attn.q_proj"] is report.modules[0]
    for name, message in (("q_proj", "2 modules end with 'q_proj'"), ("proj", "no module is named 'proj'")):
        with pytest.raises(KeyError, match=message):
            report[name]


def test_another_energy_of_the_same_spectra() -> None:
    model = tiny_models.llama()
    report = lorank.profile_gradients(model, text_batches())
    for energy in (0.3, 0.6, 1.0):
        expected = lorank.profile_gradients(model, text_batches(), energy=energy)
        assert report.with_energy(energy) == expected
    assert [row.effective_rank for row in report.with_energy(1.0)] == [COUNT] * len(report)
    assert [row.effective_rank for row in report.with_energy(1e-6)] == [1] * len(report)
    assert report.energy == 0.9
    with pytest.raises(ValueError, match="energy must be above 0"):
        report.with_energy(0)


def test_ranks_are_proportional_to_effective_ranks() -> None:
    shapes = [(100, 200), (300, 100), (50, 50), (200, 200)]
    report = lorank.GradientReport(
        [
            gradient_row(f"layer.{i}", shape, effective)
            for i, (shape, effective) in enumerate(zip(shapes, (1, 2, 3.5, 0), strict=True))
        ]
    )
    allocation = lorank.allocate(report, "gard", r_min=2, r_max=100, avg_rank=2 + 65 / 4)
    assert list(allocation.ranks.values()) == [12, 22, 37, 2]
    assert list(allocation.scores.values()) == pytest.approx([1 / 6.5, 2 / 6.5, 3.5 / 6.5, 0])
    cost = sum((2 + n) * sum(shape) for n, shape in zip((10, 20, 35, 0), shapes, strict=True))
    assert lorank.allocate(report, "gard", r_min=2, r_max=100, budget=cost).ranks == allocation.ranks
    # Scores are shares of the modules that are adapted.
    some = lorank.allocate(report, "gard", r_min=1, r_max=50, targets=["0", "1"], avg_rank=16)
    assert list(some.ranks.values()) == [11, 21]
    assert sum(some.scores.values()) == pytest.approx(1)


def test_an_effective_rank_of_all_batches_is_remarked_on() -> None:
    rows = [
        gradient_row("full", (8, 8), 4),
        gradient_row("less", (8, 8), 3),
        gradient_row("small", (4, 8), 4),
    ]
    report = lorank.GradientReport(rows, num_batches=4)
    flags = lorank.allocate(report, "gard", r_min=1, r_max=4, avg_rank=2).flags
    assert flags == {"full": "its effective rank is the number of batches: more batches may show more"}


def test_a_budget_in_parameters_holds() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(), energy=0.7)
    for budget, limit in ((6000, 6000), ("6k", 6000), ("20%", report.num_parameters // 5)):  # type: ignore[operator]
        allocation = lorank.allocate(report, "gard", r_min=1, r_max=16, budget=budget)
        assert limit - max(sum(row.shape) for row in report) < allocation.num_parameters <= limit
        for one in report:
            for other in report:
                if one.effective_rank > other.effective_rank and sum(one.shape) == sum(other.shape):
                    assert allocation.ranks[one.name] >= allocation.ranks[other.name]


def test_modules_that_no_gradient_reaches_share_alike() -> None:
    report = lorank.GradientReport([gradient_row(f"layer.{i}", (4, 4), 0) for i in range(3)])
    assert list(lorank.allocate(report, "gard", r_min=1, r_max=9, avg_rank=3).ranks.values()) == [3, 3, 3]


def test_a_method_refuses_the_wrong_report(tmp_path: Path) -> None:
    gradients = lorank.GradientReport([gradient_row("a", (4, 4), 2)])
    tasks = lorank.TaskReport([task_row("a", 1, 1)])
    weights: Any = {"a.weight": np.eye(4, dtype=np.float32)}
    torch.save({"a.weight": torch.eye(4)}, tmp_path / "model.bin")
    spectra = lorank.analyze(weights, progress=False)
    cases: list[tuple[str, list[Any], str]] = [
        ("htsr", [gradients, tasks], r"needs spectra: .*lorank\.analyze\("),
        (
            "gard",
            [tasks, spectra, weights, nn.Sequential(nn.Linear(4, 4))],
            r"needs gradients: .*gradients\(",
        ),
        ("gard", [tmp_path / "model.bin", str(tmp_path / "model.bin")], r"needs gradients"),
        ("task", [gradients, spectra, weights, tmp_path / "model.bin"], r"needs tasks: .*profile_tasks\("),
    ]
    for method, wrong, message in cases:
        for source in wrong:
            with pytest.raises(ValueError, match=f"method '{method}' {message}"):
                lorank.allocate(source, method, r_min=1, avg_rank=4)
    with pytest.raises(ValueError, match="'gard' needs a budget or avg_rank"):
        lorank.allocate(gradients, "gard")
    with pytest.raises(ValueError, match="'gard' has no option 'energy'"):
        lorank.allocate(gradients, "gard", avg_rank=4, energy=0.5)
    # Shapes are all that these need.
    for report in (gradients, tasks):
        assert lorank.allocate(report, "uniform", r_max=4).ranks == {"a": 4}


def test_ranks_of_tasks_are_k_star_within_the_bounds() -> None:
    report = lorank.TaskReport([task_row(f"m.{i}", k, 2 * k) for i, k in enumerate((0, 1, 3, 7, 40))])
    allocation = lorank.allocate(report, "task", r_min=2, r_max=8)
    assert list(allocation.ranks.values()) == [2, 2, 3, 7, 8]
    assert list(allocation.scores.values()) == [0, 0, 1, 5, 38]
    predicted = lorank.allocate(report, "task", r_min=2, r_max=8, estimate="predicted_rank")
    assert list(predicted.ranks.values()) == [2, 2, 6, 8, 8]
    # c = 1 meets this budget.
    budget = 140 * (2 + 2 + 3 + 7 + 40)
    under_budget = lorank.allocate(report, "task", r_min=2, r_max=64, budget=budget)
    assert list(under_budget.ranks.values()) == [2, 2, 3, 7, 40]
    with pytest.raises(ValueError, match="estimate must be 'k_star' or 'predicted_rank', not 'rank'"):
        lorank.allocate(report, "task", estimate="rank")


# Tasks.


class Tape:
    """What goes into modules, and the gradients of what comes out, in the order of backward passes."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.x: dict[str, list[Array]] = {name: [] for name in names}
        self.delta: dict[str, list[Array]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self.listen(name))

    def listen(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].detach().clone()

            def see(gradient: torch.Tensor) -> None:
                self.x[name].append(x.double().numpy())
                self.delta[name].append(gradient.detach().double().numpy().copy())

            output.register_hook(see)

        return hook

    def rows(self, name: str) -> tuple[Array, Array]:
        x = [part.reshape(-1, part.shape[-1]) for part in self.x[name]]
        delta = [part.reshape(-1, part.shape[-1]) for part in self.delta[name]]
        return that_count(np.concatenate(x), -np.concatenate(delta))


def that_count(X: Array, Y: Array) -> tuple[Array, Array]:
    """Rows to which a gradient came back, not only what rounding leaves of zeros."""
    sizes = np.abs(Y).max(1)
    counts = sizes > 1e-6 * sizes.max()
    return X[counts], Y[counts]


def recorded(model: Any, batches: Batches, names: list[str], loss: Any = None) -> Tape:
    model = copy.deepcopy(model).requires_grad_(True)
    tape = Tape(model, names)
    for batch in batches:
        (loss(model, batch) if loss else model(**batch).loss).backward()
    return tape


def assert_task(row: ModuleTask, X: Array, Y: Array, **options: Any) -> None:
    expected = lorank.task_spectrum(X, Y, **options)
    scale = expected.singular_values[0]
    np.testing.assert_allclose(row.singular_values, expected.singular_values, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(row.predicted_r2, expected.predicted_r2, rtol=1e-3, atol=1e-3)
    assert row.noise == pytest.approx(expected.noise, rel=1e-4)
    assert row.tau == pytest.approx(expected.tau, rel=1e-4)
    assert row.rho == pytest.approx(expected.rho, rel=1e-3, nan_ok=True)
    assert (row.k_star, row.num_above) == (expected.k_star, expected.num_above)
    assert row.predicted_rank == expected.predicted_rank
    assert row.flags == expected.flags


TASKS = {
    "llama": Case(tiny_models.llama, 14),
    "llama, float64": Case(lambda: tiny_models.llama().double(), 4, targets=["q_proj", "down_proj"]),
    "bert": Case(tiny_models.bert_classifier, 7, label_batches, targets=r".*\.(0\..*|pooler\.dense)"),
    "gpt2": Case(tiny_models.gpt2, 2, targets=["attn.c_attn"]),
    "t5": Case(t5, 10, targets=["SelfAttention.v", "EncDecAttention.k", "wo"]),
    "called twice": Case(Recurrent, 2, vectors, called),
    "readers of one input": Case(Readers, 3, vectors, called),
}


@pytest.mark.parametrize("space", ["weights", "prediction"])
@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_those_of_inputs_and_output_gradients(name: str, space: Any) -> None:
    case = TASKS[name]
    model, batches = case.make(), case.batches()
    report = lorank.profile_tasks(model, batches, loss=case.loss, targets=case.targets, folds=3, space=space)
    assert len(report) == case.count
    tape = recorded(model, batches, [row.name for row in report], case.loss)
    for row in report:
        assert_task(row, *tape.rows(row.name), folds=3, space=space)
    assert report.num_samples == max(len(tape.rows(row.name)[0]) for row in report)


def test_prediction_space_and_five_folds_are_the_default() -> None:
    report = lorank.profile_tasks(tiny_models.llama(), text_batches())
    tape = recorded(tiny_models.llama(), text_batches(), [QUERY])
    assert_task(report[QUERY], *tape.rows(QUERY), folds=5, space="prediction")


def test_tasks_of_an_adapted_model_are_those_of_its_base_modules() -> None:
    name = f"base_model.model.{QUERY}.base_layer"
    tape = recorded(adapted(), text_batches(), [name])
    report = lorank.profile_tasks(adapted(), text_batches(), targets=["q_proj"])
    assert_task(report[QUERY], *tape.rows(name), folds=5, space="prediction")


def patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Rows of `in * kh * kw` inputs, a row per position, for layers without dilation."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    windows = nn.functional.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, layer.in_channels * kh * kw)


def test_tasks_of_a_convolution_are_those_of_its_patches() -> None:
    model = Convolutions()
    batches = images(8)
    report = lorank.profile_tasks(model, batches, loss=called, targets=["first"], folds=3)
    tape = recorded(model, batches, ["first"], called)
    X = np.concatenate([patches(model.first, torch.from_numpy(x)).numpy() for x in tape.x["first"]])
    Y = np.concatenate([-delta.transpose(0, 2, 3, 1).reshape(-1, 5) for delta in tape.delta["first"]])
    assert_task(report["first"], *that_count(X, Y), folds=3, space="prediction")


@pytest.mark.parametrize("make", [tiny_models.bert_classifier, tiny_models.llama])
def test_padding_changes_no_task(make: Callable[[], Any]) -> None:
    batches = label_batches() if make is tiny_models.bert_classifier else text_batches()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    fill = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    padded = [
        {
            name: nn.functional.pad(value, (0, 9), value=fill[name]) if value.ndim == 2 else value
            for name, value in batch.items()
        }
        for batch in batches
    ]
    plain = lorank.profile_tasks(make(), batches, folds=2)
    report = lorank.profile_tasks(make(), padded, folds=2)
    assert report.num_samples == plain.num_samples
    for row, expected in zip(report, plain, strict=True):
        assert (row.k_star, row.predicted_rank) == (expected.k_star, expected.predicted_rank)
        # A causal model's first token attends to itself alone: the gradient of its query is rounding,
        # which is zero, and so no sample, in one of the two and not in the other.
        assert row.noise == pytest.approx(expected.noise, rel=1e-2)
        np.testing.assert_allclose(
            row.singular_values, expected.singular_values, rtol=1e-2, atol=1e-2 * expected.singular_values[0]
        )


def test_readers_of_one_input_that_see_other_rows_part() -> None:
    # In the second batch, no gradient comes to one row of `b`.
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

    def loss(model: Any, x: torch.Tensor) -> Any:
        weight = torch.ones(len(x), 1)
        weight[0] = 0.0 if torch.equal(x, vectors()[1]) else 1.0
        return torch.tanh(model["a"](x)).square().sum() + (weight * torch.tanh(model["b"](x))).square().sum()

    tape = recorded(model, vectors(), ["a", "b"], loss)
    assert len(tape.rows("b")[0]) == len(tape.rows("a")[0]) - 1
    sums = 32 * 8 * 8 + 2 * 16 * 8 * 4
    # Without memory for inputs of its own, `b` takes another pass.
    for memory, passes in ((sums + 32 * 8 * 8, 1), (sums, 2)):
        counted = Counted(loss)
        report = lorank.profile_tasks(model, vectors(), loss=counted, folds=2, memory=memory)
        assert counted.calls == 1 + passes * COUNT
        for name in ("a", "b"):
            assert_task(report[name], *tape.rows(name), folds=2, space="prediction")


def test_modules_that_share_an_input_are_as_those_that_do_not() -> None:
    shared = lorank.profile_tasks(Readers(), vectors(), loss=called, folds=3)
    apart = lorank.profile_tasks(Readers(copies=True), vectors(), loss=called, folds=3)
    assert shared.to_json() == apart.to_json()


def test_a_module_that_shares_the_input_of_one_without_gradients() -> None:
    model = Readers(first_counts=False)
    report = lorank.profile_tasks(model, vectors(), loss=called, folds=3)
    assert report["a"].flags == ("no gradient reached it",)
    tape = recorded(model, vectors(), ["b", "c"], called)
    for name in ("b", "c"):
        assert_task(report[name], *tape.rows(name), folds=3, space="prediction")


def test_modules_that_share_an_input_in_the_first_batch_only() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

    def loss(model: Any, x: torch.Tensor) -> Any:
        other = x if torch.equal(x, vectors()[0]) else x.flip(0) + 1
        return torch.tanh(model["a"](x)).square().sum() + torch.tanh(model["b"](other)).square().sum()

    report = lorank.profile_tasks(model, vectors(), loss=loss, folds=3)
    tape = recorded(model, vectors(), ["a", "b"], loss)
    for name in ("a", "b"):
        assert_task(report[name], *tape.rows(name), folds=3, space="prediction")


class Counted:
    """A loss that counts its calls."""

    def __init__(self, loss: Any = None) -> None:
        self.calls = 0
        self._loss = loss

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        if self._loss is not None:
            return self._loss(model, batch)
        return model(batch) if isinstance(batch, torch.Tensor) else model(**batch).loss


def test_what_is_shared_is_kept_once() -> None:
    # Two folds: 16 * 2 * 8^2 bytes for the inputs, 8 * 2 * 8 * (6 + 4) for the products with them.
    memory = 2048 + 1280
    for copies, passes in ((False, 1), (True, 2)):
        loss = Counted()
        targets = ["a", "b"]
        lorank.profile_tasks(Readers(copies), vectors(), loss=loss, folds=2, targets=targets, memory=memory)
        assert loss.calls == 1 + passes * COUNT


@pytest.mark.parametrize("name", ["llama", "bert", "called twice", "readers of one input"])
def test_several_passes_find_what_one_finds(name: str) -> None:
    case = TASKS[name]
    model, batches = case.make(), case.batches()
    options: dict[str, Any] = {"targets": case.targets, "folds": 2}
    loss = Counted()
    whole = lorank.profile_tasks(model, batches, loss=loss, **options)
    assert loss.calls == 1 + COUNT
    widest = max(32 * row.shape[1] ** 2 + 16 * row.shape[0] * row.shape[1] for row in whole)
    for memory in (widest, 2 * widest, 5 * widest):
        loss = Counted()
        parts = lorank.profile_tasks(model, batches, loss=loss, **options, memory=memory)
        assert loss.calls > 1 + COUNT or memory > widest
        assert parts.to_json() == whole.to_json()
    with pytest.raises(
        ValueError, match=rf"memory {widest - 1:,}: the sums of .* alone need {widest:,} bytes"
    ):
        lorank.profile_tasks(model, batches, loss=loss, **options, memory=widest - 1)
    with pytest.raises(ValueError, match=r"needs \d+ passes, and batches is an iterator: pass a list"):
        lorank.profile_tasks(model, iter(batches), loss=loss, **options, memory=widest)
    assert lorank.profile_tasks(model, iter(batches), **options, loss=loss).to_json() == whole.to_json()


def test_a_loader_that_shuffles_is_no_reason_to_fail() -> None:
    loader: Any = torch.utils.data.DataLoader(torch.cat(vectors()), batch_size=7, shuffle=True)
    report = lorank.profile_tasks(Readers(), loader, loss=called, folds=2)
    assert report.num_samples == 5 * COUNT


def test_a_loss_that_needs_a_wrapper_may_have_one() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_models.llama()

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    report = lorank.profile_gradients(Outer(), text_batches(2), sketch=None)
    plain = lorank.profile_gradients(tiny_models.llama(), text_batches(2), sketch=None)
    assert [row.name for row in report] == [f"inner.{row.name}" for row in plain]
    for one, other in zip(report, plain, strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
