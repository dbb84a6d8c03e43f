"""Quantized base models: adapted weights become plain ones, and all other codes are copied."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lorank
from lorank.baking.bake import Baked
from lorank.baking.plain_models import PLAIN_MODELS
from tests.baking.merged_models import baked_beside, saved_pair
from tests.support import quantized_models, tiny_models

PACKED = "model.layers.0.mlp.up_proj"

Made = tuple[Path, Path, Any]


def packed_base(folder: Path) -> Path:
    """Replace one weight by codes and scales of fp8 blocks."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{PACKED}.weight"] = tensors[f"{PACKED}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{PACKED}.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, file, {"format": "pt"})
    declare(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    return folder


def declare(folder: Path, quantization: dict[str, Any]) -> None:
    """Declare a quantization in the settings of a model."""
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(settings))


def quantization_of(folder: Path) -> Any:
    """Return the settings of the quantization; None if the model declares none."""
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def made(make: Callable[[Path], Path], config: LoraConfig, folder: Path) -> Made:
    """Write a quantized model and an adapter; return both, and the dequantized model with the adapter."""
    base = make(folder / "base")
    adapted = peft.get_peft_model(quantized_models.loaded(base), config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter", adapted


def is_part(name: str, weights: Sequence[str]) -> bool:
    """Return True for codes, scales and shapes of packed weights."""
    parts = ("_blocks", "_scales", "_packed", "_scale", "_shape", "_scale_inv")
    return any(name == weight + part for weight in weights for part in parts)


def assert_baked(model: Made, baked: Baked, tensors: int) -> None:
    """Assert that a baked model has the outputs of PEFT's merge, and that other tensors are copies."""
    base, adapter, adapted = model
    old, new = (load_file(folder / "model.safetensors") for folder in (base, baked.path))
    computed = {*baked.updated, *baked.unpacked}
    for name in set(old) & set(new) - computed:
        assert torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8)), name
    assert len(baked.unpacked) == tensors
    for weight in baked.unpacked:
        assert new[weight].dtype == torch.float32
    lost = {name for name in old if is_part(name, baked.unpacked)}
    assert set(new) == (set(old) - lost) | computed
    assert baked.copied == len(set(old) & set(new) - computed)
    if quantization_of(baked.path) is None:
        model_class = transformers.AutoModelForCausalLM
        found = model_class.from_pretrained(baked.path, dtype=torch.float32)
    else:
        found = quantized_models.loaded(baked.path)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = adapted.disable_adapter
        expected, outputs = adapted(tokens).logits, found(tokens).logits
        with before():
            changed = (adapted(tokens).logits - expected).abs().max()
    assert (outputs - expected).abs().max() < 1e-3 * changed
    merged = adapted.merge_and_unload()
    own, other = found.state_dict(), merged.state_dict()
    for name, value in other.items():
        assert torch.allclose(own[name], value, rtol=1e-6, atol=1e-6), name
    assert lorank.verify(base, adapter, baked.path, progress=False).status == "holds"
    assert lorank.verify(base, adapter, base, progress=False).status == "unknown"


def kimi_of_three_layers(folder: Path) -> Path:
    return quantized_models.kimi(folder, layers=3)


def test_untouched_codes_are_copied(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    baked = baked_beside(packed_base(base), adapter)
    old, new = load_file(base / "model.safetensors"), load_file(baked.path / "model.safetensors")
    assert len(baked.updated) == 2
    for name, value in old.items():
        same = torch.equal(value.view(torch.uint8), new[name].view(torch.uint8))
        assert same == (name not in baked.updated)
    assert (baked.path / "config.json").read_text() == (base / "config.json").read_text()
    assert lorank.verify(base, adapter, baked.path, progress=False).status == "holds"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "targets", "modules"),
    [
        (quantized_models.qwen3, ["up_proj"], [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]),
        (quantized_models.deepseek_v3, ["o_proj"], [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]),
    ],
)
def test_adapted_fp8_blocks_become_plain(
    make: Callable[[Path], Path], targets: list[str], modules: list[str], tmp_path: Path
) -> None:
    model = made(make, LoraConfig(r=4, target_modules=targets), tmp_path)
    baked = baked_beside(*model[:2], dtype="float32")
    found = quantization_of(baked.path)
    assert found == {**quantization_of(model[0]), "modules_to_not_convert": ["lm_head", *modules]}
    assert_baked(model, baked, 2)


@pytest.mark.filterwarnings("ignore")
def test_all_experts_of_a_block_become_plain(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["0.mlp.experts.gate_up_proj"])
    model = made(quantized_models.qwen3_moe, config, tmp_path)
    baked = baked_beside(*model[:2], dtype="float32")
    assert quantization_of(baked.path)["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.experts"]
    assert "4 of them have no update" in baked.notes[-1]
    assert_baked(model, baked, 12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "target", "tensors", "modules"),
    [
        (quantized_models.gpt_oss, "0.mlp.experts.down_proj", 2, ["model.layers.0.mlp.experts"]),
        (quantized_models.gpt_oss, "mlp.experts.gate_up_proj", 4, None),
        (kimi_of_three_layers, "1.mlp.experts.down_proj", 24, None),
        (quantized_models.kimi, "mlp.experts.down_proj", 12, None),
    ],
)
def test_adapted_experts_of_four_bits_become_plain(
    make: Callable[[Path], Path], target: str, tensors: int, modules: list[str] | None, tmp_path: Path
) -> None:
    model = made(make, LoraConfig(r=4, target_modules=[], target_parameters=[target]), tmp_path)
    baked = baked_beside(*model[:2], dtype="float32")
    found = quantization_of(baked.path)
    if modules is None:
        assert found is None
    else:
        settings = quantization_of(model[0])
        key = "ignore" if "ignore" in settings else "modules_to_not_convert"
        assert found == {**settings, key: [*settings.get(key, []), *modules]}
    assert_baked(model, baked, tensors)


@pytest.mark.filterwarnings("ignore")
def test_adapted_packed_integers_become_plain(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = made(quantized_models.qwen3_int4, config, tmp_path)
    baked = baked_beside(*model[:2], dtype="float32")
    settings = quantization_of(model[0])
    names = ("mlp.down_proj", "self_attn.q_proj")
    modules = [f"model.layers.{i}.{name}" for i in (0, 1) for name in names]
    found = quantization_of(baked.path)
    assert set(found["ignore"]) == {"lm_head", *modules}
    assert {**found, "ignore": 0} == {**settings, "ignore": 0}
    live: Any = transformers.AutoModelForCausalLM.from_pretrained(baked.path, dtype=torch.float32)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = model[2](tokens).logits
        assert torch.allclose(live(tokens).logits, expected, atol=1e-4 * expected.abs().max())
    assert_baked(model, baked, 4)


@pytest.mark.filterwarnings("ignore")
def test_adapted_codes_of_bitsandbytes_become_plain(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain: Any = tiny_models.llama()
    plain.save_pretrained(tmp_path / "plain")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "base")
    adapter = saved_pair(plain, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "other")
    baked = baked_beside(tmp_path / "base", adapter[1], dtype="float32")
    skipped = quantization_of(baked.path)["llm_int8_skip_modules"]
    assert skipped == ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))]
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(baked.path, device_map="cpu")
    merged = adapter[2].merge_and_unload()
    for name in skipped[1:]:
        weight = found.get_submodule(name).weight
        # Codes of four bits are within 0.16 of the largest value of a block.
        largest = plain.get_submodule(name).weight.abs().max().item()
        assert (weight - merged.get_submodule(name).weight).abs().max() < 0.16 * largest
    assert type(found.model.layers[0].self_attn.k_proj).__name__ == "Linear4bit"
    assert lorank.verify(tmp_path / "base", adapter[1], baked.path, progress=False).status == "holds"


@pytest.mark.filterwarnings("ignore")
def test_model_without_packed_weights_declares_no_quantization(tmp_path: Path) -> None:
    model = made(quantized_models.qwen3, LoraConfig(r=4, target_modules="all-linear"), tmp_path)
    baked = baked_beside(*model[:2], dtype="float32")
    assert quantization_of(baked.path) is None
    assert_baked(model, baked, 14)


def test_adapted_codes_become_bfloat16(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), LoraConfig(r=4, target_modules=["up_proj"]), tmp_path)
    baked = baked_beside(packed_base(base), adapter)
    new = load_file(baked.path / "model.safetensors")
    assert new[f"{PACKED}.weight"].dtype == torch.bfloat16
    assert baked.unpacked == (f"{PACKED}.weight",)
    assert quantization_of(baked.path) is None
    assert lorank.verify(base, adapter, baked.path, progress=False).status == "holds"


def in_gptq(folder: Path, modules: list[str], **settings: Any) -> Path:
    """Replace weights by codes of GPTQ with random bits."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for module in modules:
        out, fan_in = tensors.pop(f"{module}.weight").shape
        generator = torch.Generator().manual_seed(1)
        tensors[f"{module}.qweight"] = torch.randint(
            -(2**31), 2**31 - 1, (fan_in // 8, out), generator=generator, dtype=torch.int32
        )
        tensors[f"{module}.qzeros"] = torch.full((1, out // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.full((1, out), 0.01, dtype=torch.float16)
        tensors[f"{module}.g_idx"] = torch.zeros(fan_in, dtype=torch.int32)
    save_file(tensors, file, {"format": "pt"})
    declare(folder, {"quant_method": "gptq", "bits": 4, "group_size": -1, **settings})
    return folder


def test_method_without_plain_modules_is_dequantized_as_a_whole(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["up_proj"])
    base, adapter, _ = saved_pair(tiny_models.llama(), config, tmp_path, max_shard_size="60KB")
    shards = sorted(base.glob("*.safetensors"))
    whole = {name: value for shard in shards for name, value in load_file(shard).items()}
    for shard in [*shards, base / "model.safetensors.index.json"]:
        shard.unlink()
    save_file(whole, base / "model.safetensors", {"format": "pt"})
    modules = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "down")]
    in_gptq(base, modules)
    (base / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": -1}))
    baked = baked_beside(base, adapter)
    assert quantization_of(baked.path) is None
    assert not (baked.path / "quantize_config.json").exists()
    assert baked.unpacked == tuple(sorted(f"{module}.weight" for module in modules))
    assert "gptq packs all modules or none" in baked.notes[-1]
    new = load_file(baked.path / "model.safetensors")
    assert not [name for name in new if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert transformers.AutoModelForCausalLM.from_pretrained(baked.path)
    assert lorank.verify(base, adapter, baked.path, progress=False).status == "holds"


def test_index_of_shards_names_the_plain_weights(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["up_proj"])
    base, adapter, _ = saved_pair(tiny_models.llama(), config, tmp_path)
    tensors = load_file(in_gptq(base, [PACKED]) / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, base / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1, "total_parameters": 1000}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    baked = baked_beside(base, adapter)
    found = json.loads((baked.path / "model.safetensors.index.json").read_text())
    new = {file: load_file(baked.path / file) for file in shards}
    assert found["weight_map"] == {name: file for file, held in new.items() for name in held}
    assert found["weight_map"][f"{PACKED}.weight"] == weight_map[f"{PACKED}.qweight"]
    assert found["metadata"]["total_size"] == sum(x.nbytes for held in new.values() for x in held.values())
    assert found["metadata"]["total_parameters"] == 1000


def test_codes_that_cannot_be_decoded_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), LoraConfig(r=4, target_modules=["up_proj"]), tmp_path)
    tensors = load_file(base / "model.safetensors")
    out, fan_in = tensors.pop(f"{PACKED}.weight").shape
    tensors[f"{PACKED}.W_q"] = torch.zeros(out, fan_in // 2, dtype=torch.uint8)
    for name in ("scale", "zero"):
        tensors[f"{PACKED}.{name}"] = torch.ones(out * fan_in // 64, 1, dtype=torch.float16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    declare(base, {"quant_method": "hqq", "weights": {"nbits": 4, "group_size": 64}})
    with pytest.raises(lorank.FormatError, match=r"up_proj.*packed"):
        baked_beside(base, adapter)
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("model_type", sorted(PLAIN_MODELS))
def test_plain_models_are_loaded_without_conversions(model_type: str) -> None:
    from transformers import conversion_mapping, core_model_loading

    rules = conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
    assert not [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
