"""Gradients of losses that contain gradients, against autograd with trained weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import lorank
from lorank.training import DynamicRanks
from tests.support.seeds import seeded

Loss = Callable[[Any, Any], Any]


class Potential(nn.Module):
    """Energies of positions; one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 10)
        self.twice = nn.Linear(10, 10, bias=False)
        self.last = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.enter(x))
        hidden = torch.tanh(self.twice(torch.sin(self.twice(hidden))))
        return self.last(hidden).squeeze(-1)


class Critic(nn.Module):
    """Scores of images by convolutions with padding, stride and dilation, rectified in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 5, 3, stride=2, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(5, 4, (3, 1), padding="same", dilation=2)
        self.last = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.softplus(self.first(x) * 3)
        hidden = self.second(hidden).relu_().square()
        return self.last(hidden.mean((2, 3))).squeeze(-1)


def points(count: int = 4) -> list[Any]:
    return [torch.randn(5, 6, generator=seeded(i)) for i in range(count)]


def pictures(count: int = 4) -> list[Any]:
    return [torch.randn(3, 2, 7, 6, generator=seeded(i)) for i in range(count)]


def forces(model: Any, batch: Any) -> Any:
    """Return a loss of energies and forces, as for trained potentials."""
    x = batch.clone().requires_grad_()
    energy = model(x)
    (slope,) = grad(energy.sum(), x, create_graph=True)
    return energy.square().mean() + 3 * (slope - 1).square().mean()


def penalty_alone(model: Any, batch: Any) -> Any:
    """Return a loss that depends on the model through gradients only."""
    x = batch.clone().requires_grad_()
    (slope,) = grad(model(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def curvature(model: Any, batch: Any) -> Any:
    """Return a loss of third derivatives: the squared gradient of a squared gradient."""
    x = batch.clone().requires_grad_()
    (slope,) = grad(model(x).sum(), x, create_graph=True)
    (bend,) = grad(slope.square().sum(), x, create_graph=True)
    (more,) = grad(bend.square().sum(), x, create_graph=True)
    return model(x).mean() + bend.square().mean() + more.sin().mean()


def adversarial(model: Any, batch: Any) -> Any:
    """Return the loss after a step along a gradient that is not differentiated."""
    x = batch.clone().requires_grad_()
    (slope,) = grad(model(x).square().sum(), x, retain_graph=True)
    return model(batch + 0.1 * slope.sign()).square().mean() + model(x).mean()


def backward_within(model: Any, batch: Any) -> Any:
    """Return the same loss with input gradients from `backward`, as in older code."""
    x = batch.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    moved = batch + 0.1 * x.grad.sign()
    # Gradients accumulated in trained weights are not part of the gradient of the loss.
    model.zero_grad()
    return model(moved).square().mean()


def functional(model: Any, batch: Any) -> Any:
    """Return a loss of per-sample gradients by `torch.func`."""
    slope = torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(batch)
    return (slope - 1).square().mean() + model(batch).mean()


def nested_functional(model: Any, batch: Any) -> Any:
    """Return a loss of a Laplacian from gradients of gradients by `torch.func`."""

    def along(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: model(y[None]).sum())(x).square().sum()

    return torch.func.vmap(torch.func.grad(along))(batch).square().mean()


def forward_mode(model: Any, batch: Any) -> Any:
    """Return a loss of a directional derivative in forward mode."""
    value, slope = torch.func.jvp(model, (batch,), (torch.cos(batch),))
    return value.mean() + slope.square().mean()


def checkpointed(model: Any, batch: Any) -> Any:
    """Return a loss of forces through a checkpointed block."""
    x = batch.clone().requires_grad_()
    energy = checkpoint(model, x, use_reentrant=False)
    (slope,) = grad(energy.sum(), x, create_graph=True)
    return energy.square().mean() + 3 * (slope - 1).square().mean()


def forces_within_a_checkpoint(model: Any, batch: Any) -> Any:
    """Return a loss whose inner gradient is recomputed during the outer backward pass."""
    return checkpoint(forces, model, batch, use_reentrant=False)


LOSSES = [
    forces,
    penalty_alone,
    curvature,
    adversarial,
    backward_within,
    functional,
    nested_functional,
    forward_mode,
    checkpointed,
    forces_within_a_checkpoint,
]


def spectra(model: nn.Module, batches: list[Any], loss: Loss) -> dict[str, Any]:
    """Return eigenvalues of the Gram matrix of gradients by autograd, with all weights trained in float64."""
    model = copy.deepcopy(model).double()
    rows: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        model.zero_grad()
        loss(model, batch.double()).backward()
        for name, parameter in model.named_parameters():
            if name.endswith(".weight"):
                assert parameter.grad is not None
                rows.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.flatten().clone())
    stacked = {name: torch.stack(found) for name, found in rows.items()}
    return {
        name: np.linalg.eigvalsh((found @ found.T).numpy() / len(batches))[::-1]
        for name, found in stacked.items()
    }


def profiled(model: nn.Module, batches: list[Any], loss: Loss, **options: Any) -> Any:
    return lorank.profile_gradients(
        model, batches, loss=loss, targets=r".*", sketch=None, progress=False, **options
    )


def assert_spectra(report: Any, expected: dict[str, Any], tolerance: float = 2e-4) -> None:
    assert {row.name for row in report} == set(expected)
    for row in report:
        want = expected[row.name]
        assert want[0] > 0
        np.testing.assert_allclose(row.eigenvalues, want, atol=tolerance * want[0], err_msg=row.name)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradients_of_a_potential_equal_those_of_trained_weights(loss: Loss) -> None:
    expected = spectra(Potential(), points(), loss)
    assert_spectra(profiled(Potential(), points(), loss), expected)


@pytest.mark.parametrize("loss", [forces, penalty_alone, functional, adversarial], ids=lambda x: x.__name__)
def test_gradients_of_a_critic_equal_those_of_trained_weights(loss: Loss) -> None:
    expected = spectra(Critic(), pictures(), loss)
    assert_spectra(profiled(Critic(), pictures(), loss), expected)


def test_base_weights_under_adapters_have_the_same_gradients() -> None:
    model = get_peft_model(Potential(), LoraConfig(r=2, target_modules=["enter", "twice"]))
    report = lorank.profile_gradients(
        model, points(), loss=forces, targets=["enter", "twice"], sketch=None, progress=False
    )
    expected = spectra(Potential(), points(), forces)
    del expected["last"]
    assert_spectra(report, expected)


def test_forces_of_a_linear_potential_depend_on_its_weight_only() -> None:
    def loss(model: Any, batch: Any) -> Any:
        x = batch.clone().requires_grad_()
        (slope,) = grad(model(x).sum(), x, create_graph=True)
        return (slope - batch).square().mean()

    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    assert_spectra(profiled(model, points(), loss), spectra(model, points(), loss))


def test_models_and_batches_stay_unchanged() -> None:
    model = Potential()
    batch = {"x": torch.randn(5, 6, requires_grad=True), "y": torch.randn(5)}

    def loss(model: Any, batch: Any) -> Any:
        energy = model(batch["x"])
        (slope,) = grad(energy.sum(), batch["x"], create_graph=True)
        return (energy - batch["y"]).square().mean() + slope.square().mean()

    lorank.profile_gradients(model, [batch, batch], loss=loss, progress=False)
    lorank.profile_tasks(model, [batch, batch], loss=loss, progress=False)
    assert batch["x"].grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_of_parameters_within_the_loss_are_refused() -> None:
    def loss(model: Any, batch: Any) -> Any:
        value = model(batch).square().mean()
        found = grad(value, list(model.parameters()), create_graph=True)
        return value + sum(one.square().sum() for one in found)

    with pytest.raises(
        ValueError, match="batch 0: the loss differentiates with respect to the model's parameters"
    ):
        profiled(Potential(), points(), loss)


def test_tasks_have_rows_of_the_outer_backward_pass_and_flag_the_inner_one() -> None:
    def value(model: Any, batch: Any) -> Any:
        return model(batch).square().mean()

    def doubled(model: Any, batch: Any) -> Any:
        x = batch.clone().requires_grad_()
        grad(model(x).sum(), x, create_graph=True)
        return value(model, batch)

    batches = points(8)
    plain = lorank.profile_tasks(Potential(), batches, loss=value, progress=False)
    assert list(lorank.profile_tasks(Potential(), batches, loss=doubled, progress=False)) == list(plain)
    report = lorank.profile_tasks(Potential(), batches, loss=forces, progress=False)
    assert all("the loss contains a gradient" in " ".join(row.flags) for row in report)
    assert not any("the loss contains" in " ".join(row.flags) for row in plain)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("loss", [forces, adversarial, functional], ids=lambda loss: loss.__name__)
def test_dynamic_ranks_count_only_backward_passes_that_train(loss: Loss, create_graph: bool) -> None:
    model = get_peft_model(Potential(), LoraConfig(r=2, target_modules=["enter", "twice"]))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    batches = points(3)
    with DynamicRanks(model, optimizer, interval=3, window=3, sketch=None, r_max=4) as ranks:
        for batch in batches:
            loss(model, batch).backward(create_graph=create_graph)
            optimizer.step()
            optimizer.zero_grad()
            update = ranks.step()
    assert update is not None
    expected = spectra(Potential(), batches, loss)
    del expected["last"]
    assert_spectra(update.report, expected)


def test_training_by_gradients_of_single_parameters_warns() -> None:
    """Such a backward pass does not reach base weights, so their gradients cannot be measured."""
    model = get_peft_model(Potential(), LoraConfig(r=2, target_modules=["enter", "twice"]))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with DynamicRanks(model, optimizer, interval=1, window=1, r_max=4) as ranks:
        grad(model(points()[0]).square().mean(), trained)
        optimizer.step()
        with pytest.warns(UserWarning, match="no gradient reached any adapted module"):
            assert ranks.step() is None
