"""A GGUF adapter in llama.cpp itself, against the model that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import loaded
from tests.support.layouts import llama_adapter

llama_cpp = pytest.importorskip("llama_cpp")

TOKENS = [1, 5, 9, 3]


def model_file(model: Any, path: Path) -> Path:
    """Write a tiny Llama as a GGUF file with a vocabulary of single letters."""
    import gguf

    config, heads = model.config, {"q_proj": 4, "k_proj": 2}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in heads:
            values = values.reshape(heads[part], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)) + ".weight", np.ascontiguousarray(values)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_equal_those_of_the_merged_model(tmp_path: Path) -> None:
    model = tiny_models.llama()
    file = model_file(model, tmp_path / "base.gguf")
    folder = llama_adapter(tmp_path / "a")
    lorank.convert(folder, "gguf", base=model).save(tmp_path / "a.gguf", "exact")
    merged = loaded(model, folder).merge_and_unload()
    with torch.no_grad():
        expected = merged(torch.tensor([TOKENS])).logits[0].numpy()
    for adapter, same in ((str(tmp_path / "a.gguf"), True), (None, False)):
        engine = llama_cpp.Llama(str(file), lora_path=adapter, logits_all=True, n_ctx=16, verbose=False)
        engine.eval(TOKENS)
        found = np.array(engine.scores[: len(TOKENS)])
        assert np.allclose(found, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max()) == same
