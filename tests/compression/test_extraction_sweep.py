"""Extraction from perturbed tiny models of many architectures: PEFT reproduces the tuned outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorank
from tests.support.architectures import perturbed, tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


TOKENS = {"input_ids": torch.arange(10, 22)[None]}


def tokens(_: Any) -> dict[str, torch.Tensor]:
    return TOKENS


def pairs_of_tokens(_: Any) -> dict[str, torch.Tensor]:
    return {**TOKENS, "decoder_input_ids": torch.arange(5, 12)[None]}


def image(model: Any) -> dict[str, torch.Tensor]:
    side, channels = model.config.image_size, model.config.num_channels
    return {"pixel_values": torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(3))}


def sound(_: Any) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(1, 4000, generator=torch.Generator().manual_seed(3))}


ARCHITECTURES: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    # Dense decoders, tied and not.
    "LlamaForCausalLM": tokens,
    "Qwen2ForCausalLM": tokens,
    "Qwen3ForCausalLM": tokens,
    "Gemma2ForCausalLM": tokens,
    "Gemma3ForCausalLM": tokens,
    "Phi3ForCausalLM": tokens,
    "GPTNeoXForCausalLM": tokens,
    "OPTForCausalLM": tokens,
    "BloomForCausalLM": tokens,
    "FalconForCausalLM": tokens,
    # Conv1D.
    "GPT2LMHeadModel": tokens,
    "OpenAIGPTLMHeadModel": tokens,
    # Mixtures of experts.
    "MixtralForCausalLM": tokens,
    "Qwen2MoeForCausalLM": tokens,
    "Qwen3MoeForCausalLM": tokens,
    "OlmoeForCausalLM": tokens,
    "GptOssForCausalLM": tokens,
    "JetMoeForCausalLM": tokens,
    "GraniteMoeForCausalLM": tokens,
    "Ernie4_5_MoeForCausalLM": tokens,
    "Glm4MoeForCausalLM": tokens,
    # State-space models and hybrids.
    "Lfm2ForCausalLM": tokens,
    "FalconH1ForCausalLM": tokens,
    "Qwen3NextForCausalLM": tokens,
    # Models of text and images.
    "LlavaForConditionalGeneration": tokens,
    "PaliGemmaForConditionalGeneration": tokens,
    "Idefics3ForConditionalGeneration": tokens,
    "InternVLForConditionalGeneration": tokens,
    "Mistral3ForConditionalGeneration": tokens,
    # Encoders, encoder-decoders, vision, speech.
    "BertForMaskedLM": tokens,
    "DistilBertForMaskedLM": tokens,
    "T5ForConditionalGeneration": pairs_of_tokens,
    "BartForConditionalGeneration": pairs_of_tokens,
    "ViTForImageClassification": image,
    "Wav2Vec2ForCTC": sound,
}


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits.float()


def without_left_out(base: Any, tuned: Any, adapted: Collection[str]) -> list[str]:
    """Reset parameters of the tuned model that the adapter does not hold; return their names."""
    left_out = []
    before = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        held = name in adapted or name.removesuffix(".weight") in adapted
        if not held and not torch.equal(parameter, before[name]):
            parameter.data = before[name].data.clone()
            left_out.append(name)
    return left_out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gives_the_outputs_of_the_tuned_model(name: str, tmp_path: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    model = tiny(name)
    assert model is not None
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base").float()
    tuned = type(model)(base.config).eval().float()
    tuned.load_state_dict(perturbed(base))
    tuned.save_pretrained(tmp_path / "tuned")

    folders = tmp_path / "base", tmp_path / "tuned"
    adapter = lorank.extract(*folders, energy=1.0, max_rank=4096, progress=False)
    adapter.save(tmp_path / "adapter")

    left_out = without_left_out(base, tuned, adapter.modules)
    named = [note for note in adapter.notes if "left out" in note or "cannot hold them" in note]
    assert bool(left_out) == bool(named)
    inputs = ARCHITECTURES[name](base)
    before, wanted = outputs(base, inputs), outputs(tuned, inputs)
    found = outputs(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs)
    assert float((found - wanted).norm()) < 1e-5 * float((wanted - before).norm())
