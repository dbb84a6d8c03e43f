"""Skipped modules, flags, and inputs that profiles refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorank
from tests.support import tiny_models
from tests.support.profiled_models import run_gradients, run_tasks, text_batches, vectors


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


def test_targeted_embeddings_are_skipped() -> None:
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


def test_modules_without_gradients_are_flagged() -> None:
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


@pytest.mark.parametrize("profile", [run_gradients, run_tasks])
def test_invalid_arguments_raise_with_reasons(profile: Any) -> None:
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
    with pytest.raises(ValueError, match=r"returned no loss: put labels into the batches, or pass loss"):
        profile(model, [{"input_ids": batches[0]["input_ids"]}])
    with pytest.raises(ValueError, match=r"a batch has type Tensor, not a mapping: give loss="):
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


def test_invalid_options_raise_before_any_batch_is_drawn() -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was drawn")
        yield

    model = tiny_models.llama()
    for energy in (0, -0.1, 1.0001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
            lorank.profile_gradients(model, never(), energy=energy)
    for sketch in (0, -1, True, 2.5, "8"):
        with pytest.raises(ValueError, match=r"sketch must be a positive integer, or None"):
            lorank.profile_gradients(model, never(), sketch=sketch)


def test_invalid_task_options_raise() -> None:
    model, batches = tiny_models.llama(), text_batches(2)
    for folds in (1, 0, 2.0):
        with pytest.raises(ValueError, match="folds must be an integer of at least 2"):
            lorank.profile_tasks(model, batches, folds=folds)
    with pytest.raises(ValueError, match="space must be 'weights' or 'prediction'"):
        lorank.profile_tasks(model, batches, folds=2, space="log")


def root_of_zero(model: Any, x: torch.Tensor) -> Any:
    """Return a loss with a root of zero, whose slope is infinite."""
    used, other = model["used"](x), model["other"](x)
    return used.sum().square() + (other.sum() * x.sum()).abs().sqrt()


def test_nan_and_infinite_gradients_raise_with_the_module() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    batches = [torch.ones(1, 2), torch.zeros(1, 2)]
    with pytest.raises(ValueError, match="batch 1: the gradient of other holds NaN or infinite values"):
        lorank.profile_gradients(model, batches, loss=root_of_zero)
    with pytest.raises(ValueError, match=r"other.*NaN or infinite"):
        lorank.profile_tasks(model, batches, loss=root_of_zero, folds=2)
