"""Profiles of models that compute blocks twice, with and without gradients of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import lorank
from tests.support import tiny_models
from tests.support.gradient_oracle import assert_true, same_spectra, true_gradients
from tests.support.profiled_models import adapted, called, hooks, label_batches, t5, text_batches, vectors


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


class Checkpointed(nn.Module):
    """A checkpointed model without known input embeddings that changes its inputs in place."""

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
        return run.square().sum()


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_works_without_known_embeddings(reentrant: bool, wrap: Any) -> None:
    model = Checkpointed(reentrant)
    report = lorank.profile_gradients(wrap(model), vectors(3, 2, 4), sketch=None, loss=called)
    assert_true(report, true_gradients(Checkpointed(False), vectors(3, 2, 4), called))
    assert not any(hooks(model))


def test_checkpointing_works_inside_a_wrapper() -> None:
    """Integer inputs cannot require gradients, so the outputs of embeddings must."""
    model = tiny_models.llama().train()
    plain = lorank.profile_gradients(model, text_batches(2))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert same_spectra(plain, lorank.profile_gradients(nn.DataParallel(model), text_batches(2)), 1e-5)


KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
_SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
} | dict.fromkeys(
    (
        "hidden_dropout",
        "attention_dropout",
        "feat_proj_dropout",
        "layerdrop",
        "activation_dropout",
        "final_dropout",
        "mask_time_prob",
    ),
    0.0,
)


def speech(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SPEECH)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).train()


def sounds() -> list[Any]:
    made = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(2, 400, generator=generator)
        made.append({"input_values": values, "labels": torch.tensor([0, 1])})
    return made


def texts() -> list[Any]:
    made = []
    for seed in range(3):
        ids = torch.randint(1, 64, (2, 8 + seed), generator=torch.Generator().manual_seed(seed))
        made.append({"input_ids": ids, "labels": ids})
    return made


def embedded(requires_grad: bool) -> list[Any]:
    """Return the same texts as vectors; vectors that require gradients come from another model."""
    table = tiny_models.llama().get_input_embeddings()
    made = []
    for batch in texts():
        vectors = table(batch["input_ids"])
        made.append(
            {"inputs_embeds": vectors if requires_grad else vectors.detach(), "labels": batch["labels"]}
        )
    return made


def assert_alike(found: Any, expected: Any) -> None:
    assert [row.name for row in found] == [row.name for row in expected]
    assert sum(plain.eigenvalues[0] > 0 for plain in expected) >= len(expected) / 2
    for row, plain in zip(found, expected, strict=True):
        assert row.flags == plain.flags
        np.testing.assert_allclose(row.eigenvalues, plain.eigenvalues, atol=1e-4 * plain.eigenvalues[0])


def profiled(model: Any, batches: list[Any]) -> Any:
    return lorank.profile_gradients(model, batches, progress=False)


@KINDS
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "WavLM", "UniSpeechSat"])
def test_speech_models_count_checkpointed_blocks_once(name: str, reentrant: bool) -> None:
    model = speech(name)
    expected = profiled(model, sounds())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_alike(profiled(model, sounds()), expected)
    assert lorank.profile_tasks(model, sounds(), progress=False)["projector"].k_star >= 0


def required(model: Any) -> None:
    model.enable_input_require_grads()


def as_it_is(_model: Any) -> None:
    pass


@KINDS
@pytest.mark.parametrize("prepare", [as_it_is, required], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    "batches", [texts, lambda: embedded(False), lambda: embedded(True)], ids=["ids", "vectors", "tracked"]
)
def test_tokens_count_once_whatever_requires_a_gradient(
    prepare: Callable[[Any], None], batches: Callable[[], list[Any]], reentrant: bool
) -> None:
    expected = profiled(tiny_models.llama(), texts())
    model = tiny_models.llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    prepare(model)
    assert_alike(profiled(model, batches()), expected)
    assert_alike(profiled(model, batches()), expected)


def test_input_vectors_get_no_gradients() -> None:
    batches = embedded(False)
    for batch in batches:
        batch["inputs_embeds"].requires_grad_()
    profiled(tiny_models.llama(), batches)
    lorank.profile_tasks(tiny_models.llama(), batches, progress=False)
    assert all(batch["inputs_embeds"].grad is None for batch in batches)


class Blocks(nn.Module):
    """A custom model whose blocks take tensors without gradients and change them in place."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.reentrant = reentrant

    def block(self, layer: Any, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return layer(x)[which].relu_() + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.requires_grad = True
        which = torch.arange(len(x)).flip(0)
        for layer in self.blocks:
            if self.reentrant is None:
                x = self.block(layer, x, which)
            else:
                x = checkpoint(self.block, layer, x, which, use_reentrant=self.reentrant)
        return x.square().mean()


@KINDS
def test_blocks_of_a_custom_model_count_once(reentrant: bool) -> None:
    def loss(model: Any, batch: Any) -> Any:
        return model(batch.clone())

    batches = [torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    options: dict[str, Any] = {"loss": loss, "sketch": None, "progress": False}
    expected = lorank.profile_gradients(Blocks(None), batches, **options)
    assert_alike(lorank.profile_gradients(Blocks(reentrant), batches, **options), expected)


def test_checkpoint_function_of_torch_is_restored() -> None:
    before = CheckpointFunction.apply

    def loss(_model: Any, _batch: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorank.profile_gradients(Blocks(True), [torch.randn(5, 6)], loss=loss, progress=False)
    assert CheckpointFunction.apply == before
    assert "apply" not in vars(CheckpointFunction)
