"""The files of a baked model: shards, index, untouched bytes, rounding, and files beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorank
from tests.baking.merged_models import assert_equal_models, baked_beside, merged, saved_pair
from tests.support import tiny_models
from tests.support.adapter_files import configured
from tests.support.command_line import outcome

CONFIG = LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"])


def test_shards_index_and_untouched_bytes_stay(tmp_path: Path) -> None:
    model = tiny_models.llama()
    base, adapter, adapted = saved_pair(model, CONFIG, tmp_path, max_shard_size="20KB")
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"weights in another format")
    baked = baked_beside(base, adapter)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert json.loads((baked.path / "model.safetensors.index.json").read_text()) == index
    assert index["metadata"]["total_size"] == baked.total_size
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "1_Pooling/config.json",
    ):
        assert (baked.path / name).read_bytes() == (base / name).read_bytes()
    assert {str(p.relative_to(baked.path)) for p in baked.path.rglob("*") if p.is_file()} == set(baked.files)
    assert not (baked.path / "pytorch_model.bin").exists()
    for shard in base.glob("*.safetensors"):
        with safe_open(shard, "pt") as old, safe_open(baked.path / shard.name, "pt") as new:
            assert old.metadata() == new.metadata()
            assert set(old.keys()) == set(new.keys())
            for name in old.keys():  # noqa: SIM118  # The handle is no mapping.
                same = torch.equal(old.get_tensor(name), new.get_tensor(name))
                assert same == (name not in baked.updated)
    assert_equal_models(type(model).from_pretrained(baked.path), merged(adapted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Baked values are the correctly rounded exact sums; PEFT's have larger errors in 16 bits."""
    model = tiny_models.llama().to(dtype)
    base, adapter, adapted = saved_pair(model, CONFIG, tmp_path)
    baked = baked_beside(base, adapter)
    loaded = lorank.LoraAdapter.load(adapter)
    found, before = load_file(baked.path / "model.safetensors"), model.state_dict()
    ours = theirs = 0.0
    state = merged(adapted).state_dict()
    for name, module in loaded.modules.items():
        delta = module.scaling * (module.B.astype(np.float64) @ module.A.astype(np.float64))
        exact = before[f"{name}.weight"].double() + torch.from_numpy(delta)
        value = found[f"{name}.weight"]
        assert value.dtype == dtype
        above = torch.nextafter(value, torch.full_like(value, torch.inf)).double()
        below = torch.nextafter(value, torch.full_like(value, -torch.inf)).double()
        # The value is nearest: the exact sum lies at most half of the way to either neighbour.
        assert torch.all(exact <= (value.double() + above) / 2 + 1e-15)
        assert torch.all(exact >= (value.double() + below) / 2 - 1e-15)
        ours += float((value.double() - exact).square().sum())
        theirs += float((state[f"{name}.weight"].double() - exact).square().sum())
    assert ours <= theirs


def test_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.mixtral(), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    contents = []
    for threads in (1, 2, 5):
        lorank.bake(base, adapter, tmp_path / str(threads), threads=threads, progress=False)
        contents.append((tmp_path / str(threads) / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_dtype_changes_updated_tensors_only(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    baked = baked_beside(base, adapter, dtype="bfloat16")
    for name, value in load_file(baked.path / "model.safetensors").items():
        assert value.dtype == (torch.bfloat16 if name in baked.updated else torch.float32)


def test_single_file_without_settings_is_baked_alone(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    file = tmp_path / "alone" / "weights.safetensors"
    file.parent.mkdir()
    shutil.copy(base / "model.safetensors", file)
    (file.parent / "other.txt").write_text("of another program")
    lorank.bake(file, adapter, tmp_path / "from-file", progress=False)
    lorank.bake(base, adapter, tmp_path / "from-folder", progress=False)
    assert [path.name for path in (tmp_path / "from-file").iterdir()] == ["weights.safetensors"]
    found = load_file(tmp_path / "from-file" / "weights.safetensors")
    expected = load_file(tmp_path / "from-folder" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_resized_vocabulary_changes_the_settings(tmp_path: Path) -> None:
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "base")
    grown = tiny_models.llama()
    grown.resize_token_embeddings(70)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    _, adapter, adapted = saved_pair(grown, config, tmp_path / "grown")
    baked = lorank.bake(tmp_path / "base", adapter, tmp_path / "baked", progress=False)
    assert json.loads((baked.path / "config.json").read_text())["vocab_size"] == 70
    assert any("grows from 64 to 70 rows" in note for note in baked.notes)
    assert_equal_models(type(model).from_pretrained(baked.path), merged(adapted))
    assert lorank.verify(tmp_path / "base", adapter, baked.path, progress=False).status == "holds"


def test_new_head_is_added(tmp_path: Path) -> None:
    """A classifier on a bare encoder: module names have a prefix that the stored names lack."""
    encoder, classifier = tiny_models.bert(), tiny_models.bert_classifier()
    encoder.save_pretrained(tmp_path / "base")
    classifier.bert.load_state_dict(encoder.state_dict())
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    _, adapter, adapted = saved_pair(classifier, config, tmp_path / "tuned")
    baked = lorank.bake(tmp_path / "base", adapter, tmp_path / "baked", progress=False)
    assert any("new to the model" in note for note in baked.notes)
    assert_equal_models(type(classifier).from_pretrained(baked.path), merged(adapted))


def test_trained_tokens_replace_rows(tmp_path: Path) -> None:
    model = tiny_models.llama()
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 60]})
    base, adapter, adapted = saved_pair(model, config, tmp_path)
    baked = baked_beside(base, adapter)
    assert_equal_models(type(model).from_pretrained(baked.path), merged(adapted))


def test_unknown_module_is_named_with_the_nearest(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = {name.replace("layers.1", "layers.7"): value for name, value in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(
        lorank.FormatError, match=r"no module 'model\.layers\.7.*nearest names are model\.layers"
    ):
        baked_beside(base, adapter)
    assert not (tmp_path / "baked").exists()


def test_other_shape_is_named(tmp_path: Path) -> None:
    _, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    base = tmp_path / "base" / "model.safetensors"
    tensors = load_file(base)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name][:, :40].contiguous()}, base, {"format": "pt"})
    with pytest.raises(lorank.FormatError, match=r"down_proj has shape \(32, 48\), but .*shape \(32, 40\)"):
        baked_beside(tmp_path / "base", adapter)


def test_targets_are_protected(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    with pytest.raises(FileExistsError, match="holds the base model"):
        lorank.bake(base, adapter, base, overwrite=True, progress=False)
    baked_beside(base, adapter)
    with pytest.raises(FileExistsError, match="is not empty"):
        baked_beside(base, adapter)
    (tmp_path / "baked" / "model-00001-of-00002.safetensors").write_bytes(b"of another model")
    (tmp_path / "baked" / "notes.md").write_text("mine")
    baked_beside(base, adapter, overwrite=True)
    assert not (tmp_path / "baked" / "model-00001-of-00002.safetensors").exists()
    assert (tmp_path / "baked" / "notes.md").read_text() == "mine"
    assert outcome("bake", base, adapter, "-o", tmp_path / "baked", "--quiet")[0] == 2


def test_adapters_that_are_no_change_of_weights_raise(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    configured(adapter, alora_invocation_tokens=[1, 2])
    with pytest.raises(ValueError, match="aLoRA acts from its invocation tokens on"):
        baked_beside(base, adapter)
    dora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    _, second, _ = saved_pair(tiny_models.llama(), dora, tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA magnitudes do not add up"):
        lorank.bake(base, [second], tmp_path / "baked", [0.5], progress=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_cannot_be_stored_raise(value: float, tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = {name: x.double() for name, x in load_file(file).items()}
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, file)
    with pytest.raises(lorank.NumericalError, match=r"down_proj|q_proj"):
        baked_beside(base, adapter)
    assert not (tmp_path / "baked").exists()


def test_command_prints_json(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), CONFIG, tmp_path)
    code, out, errors = outcome("bake", base, f"{adapter}:0.5", "-o", tmp_path / "baked", "--json", "--quiet")
    assert code == 0, errors
    assert len(json.loads(out)["updated"]) == 4
    code, _, errors = outcome("bake", base, f"{adapter}:half", "-o", tmp_path / "other", "--quiet")
    assert code == 2
    code, _, errors = outcome("bake", adapter, adapter, "-o", tmp_path / "other", "--quiet")
    assert code == 1
    assert "not a model" in errors


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (40, 5000), (2000, 520)])
def test_wide_matrices_are_updated_in_every_row(shape: tuple[int, int], tmp_path: Path) -> None:
    """Every element is computed, also where a matrix has several blocks of rows and strips of columns."""
    generator = torch.Generator().manual_seed(0)
    weight, b, a = (torch.randn(s, generator=generator) for s in (shape, (shape[0], 5), (5, shape[1])))
    save_file({"layer.proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    stem = "base_model.model.layer.proj"
    factors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 5, "target_modules": ["proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    model = tmp_path / "model.safetensors"
    baked = lorank.bake(model, tmp_path / "adapter", tmp_path / "baked", progress=False)
    found = load_file(baked.path / "model.safetensors")["layer.proj.weight"]
    expected = weight.double() + b.double() @ a.double()
    assert (found.double() - expected).abs().max() < 1e-5
