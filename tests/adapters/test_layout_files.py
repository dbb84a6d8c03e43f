"""Files of other programs: their readers' rules, shared factors of experts, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, saved, trained
from tests.support.layouts import expert_adapter, llama_adapter

QUERY = "model.layers.0.self_attn.q_proj"


def mlx_updates(folder: Path) -> dict[str, Any]:
    """Return the updates of an MLX adapter as `mlx_lm.tuner.lora` computes them when it fuses."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    tensors = load_file(folder / "adapters.safetensors")
    scale, keys = config["lora_parameters"]["scale"], set(config["lora_parameters"]["keys"])
    updates = {}
    for key in [key for key in tensors if key.endswith(".lora_a")]:
        path = key.removesuffix(".lora_a")
        # mlx_lm adapts the modules of each block whose names within the block are keys.
        assert path.split(".", 3)[3] in keys or path in keys, path
        a, b = (tensors[f"{path}.lora_{x}"].astype(np.float64) for x in "ab")
        updates[path] = scale * b @ a if b.ndim == 3 else scale * b.T @ a.T
    return updates


def test_mlx_fuses_the_same_updates(tmp_path: Path) -> None:
    for name, folder in {
        "llama": llama_adapter(tmp_path / "a"),
        "experts": expert_adapter(tiny_models.qwen3_moe(), tmp_path / "b"),
    }.items():
        lorank.convert(folder, "mlx").save(tmp_path / f"mlx {name}", "exact")
        updates = mlx_updates(tmp_path / f"mlx {name}")
        right = [v.runtime for v in lorank.check(tmp_path / f"mlx {name}") if v.status == "right"]
        assert right == ["MLX-LM"]
        expected = dense(lorank.LoraAdapter.load(folder))
        for path in [path for path in expected if path.endswith("gate_up_proj")]:
            stem, both = path.removesuffix("gate_up_proj"), expected.pop(path)
            expected |= {f"{stem}gate_proj": both[:, :24], f"{stem}up_proj": both[:, 24:]}
        expected = {path.replace(".experts.", ".switch_mlp."): x for path, x in expected.items()}
        assert set(updates) == set(expected)
        for path, update in expected.items():
            np.testing.assert_allclose(updates[path], update, rtol=1e-12, atol=1e-15)


def test_gguf_has_the_fields_and_rows_of_llama_cpp(tmp_path: Path) -> None:
    import gguf

    folder = llama_adapter(tmp_path / "a")
    lorank.convert(folder, "gguf", base=tiny_models.llama()).save(tmp_path / "a.gguf", "exact")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["general.type"]) == ("llama", "adapter")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 9.0)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    b, v = tensors["blk.0.attn_q.weight.lora_b"].data, tensors["blk.0.attn_v.weight.lora_b"].data
    source = lorank.LoraAdapter.load(folder).modules
    # llama.cpp's converter: LlamaModel.permute.
    rows = source[QUERY].B
    permuted = rows.reshape(4, 2, rows.shape[0] // 4 // 2, -1).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(b, permuted)
    np.testing.assert_array_equal(v, source["model.layers.0.self_attn.v_proj"].B)
    assert list(tensors["blk.0.attn_q.weight.lora_a"].shape) == [32, 6]


def test_gguf_without_its_base_shows_ranks_and_refuses_factors(tmp_path: Path) -> None:
    lorank.convert(llama_adapter(tmp_path / "a"), "gguf", base=tiny_models.llama()).save(
        tmp_path / "a.gguf", "exact"
    )
    adapter = lorank.LoraAdapter.load(tmp_path / "a.gguf")
    assert set(adapter.ranks.values()) == {6}
    with pytest.raises(lorank.FormatError, match="rows are permuted within heads"):
        lorank.compress(adapter, avg_rank=2, progress=False)
    (verdict,) = lorank.check(tmp_path / "a.gguf", ["vllm"])
    assert (verdict.status, verdict.reads_format) == ("refuses", False)


@pytest.mark.parametrize("kind", ["shared outer", "one tensor for each"])
def test_experts_of_three_dimensions_are_read(kind: str, tmp_path: Path) -> None:
    rng, (experts, rank, hidden, inner) = np.random.default_rng(0), (4, 2, 32, 24)
    shared = 1 if kind == "shared outer" else experts
    names = ("w1", "w3", "w2") if shared == 1 else ("gate_proj", "up_proj", "down_proj")
    stem = "base_model.model.model.layers.0.mlp.experts."
    tensors, updates = {}, {}
    for name, out, fan_in in zip(names, (inner, inner, hidden), (hidden, hidden, inner), strict=True):
        outer_a, outer_b = (shared, experts) if fan_in == hidden else (experts, shared)
        a = rng.standard_normal((outer_a, rank, fan_in)).astype(np.float32)
        b = rng.standard_normal((outer_b, out, rank)).astype(np.float32)
        tensors |= {f"{stem}{name}.lora_A.weight": a, f"{stem}{name}.lora_B.weight": b}
        updates[name] = 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    found = dense(lorank.LoraAdapter.load(tmp_path / "a"))
    both = np.concatenate([updates[names[0]], updates[names[1]]], axis=1)
    np.testing.assert_allclose(found["model.layers.0.mlp.experts.gate_up_proj"], both, rtol=1e-12)
    np.testing.assert_allclose(found["model.layers.0.mlp.experts.down_proj"], updates[names[2]], rtol=1e-12)
    lorank.convert(tmp_path / "a", "peft").save(tmp_path / "b", "exact")
    again = dense(lorank.LoraAdapter.load(tmp_path / "b"))
    for name, update in found.items():
        np.testing.assert_array_equal(again[name], update)
    del tensors[f"{stem}{names[0]}.lora_B.weight"]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(lorank.FormatError, match=rf"{names[0]}': has no lora_B"):
        lorank.LoraAdapter.load(tmp_path / "a")


def edited(file: Path, **changes: Any) -> None:
    tensors = load_file(file)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, file)


MLX_DAMAGE = {
    "A without B": ({f"{QUERY}.lora_b": None}, {}, "has no lora_b"),
    "ranks": ({f"{QUERY}.lora_a": np.ones((32, 5), np.float32)}, {}, "do not fit each other"),
    "norm": ({"model.norm.weight": np.ones(32, np.float32)}, {}, "'model.norm.weight': is no factor"),
    "no scale": ({}, {"lora_parameters": {"rank": 6}}, "scale is None"),
    "text as scale": ({}, {"lora_parameters": {"scale": "x"}}, "the scale of an adapter is a number"),
    "full": ({}, {"fine_tune_type": "full"}, "only lora and dora are adapters"),
}


@pytest.mark.parametrize("name", MLX_DAMAGE)
def test_damaged_mlx_adapters_raise(name: str, tmp_path: Path) -> None:
    tensors, settings, reason = MLX_DAMAGE[name]
    lorank.convert(llama_adapter(tmp_path / "a"), "mlx").save(tmp_path / "b", "exact")
    edited(tmp_path / "b" / "adapters.safetensors", **tensors)
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(lorank.FormatError, match=reason) as error:
        lorank.LoraAdapter.load(tmp_path / "b")
    assert str(tmp_path / "b") in str(error.value)


TUNE = "layers.0.attn.q_proj"
TUNE_DAMAGE = {
    "B without A": ({f"{TUNE}.lora_a.weight": None}, {}, "has no lora_a.weight"),
    "ranks": ({f"{TUNE}.lora_a.weight": np.ones((5, 32), np.float32)}, {}, "do not fit each other"),
    "other rank": ({}, {"r": 3}, "has rank 6, but the settings state 3"),
    "name": (
        {"layers.0.attn.other.lora_a.weight": np.ones((6, 32), np.float32)},
        {},
        "is no module of torchtune",
    ),
}


@pytest.mark.parametrize("name", TUNE_DAMAGE)
def test_damaged_torchtune_adapters_raise(name: str, tmp_path: Path) -> None:
    tensors, settings, reason = TUNE_DAMAGE[name]
    base = tiny_models.llama()
    lorank.convert(llama_adapter(tmp_path / "a"), "torchtune", base=base).save(tmp_path / "b", "exact")
    edited(tmp_path / "b" / "adapter_model.safetensors", **tensors)
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(lorank.FormatError, match=reason):
        lorank.LoraAdapter.load(tmp_path / "b")


def gguf_file(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, fields.pop("arch", "llama"))
    for name, value in fields.items():
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_string(name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FIELDS = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
B, A = "blk.0.attn_v.weight.lora_b", "blk.0.attn_v.weight.lora_a"
FACTORS = {B: np.ones((6, 2), np.float32), A: np.ones((2, 5), np.float32)}
GGUF_DAMAGE = {
    "model": ({"general.type": "model"}, {}, "the file is no adapter"),
    "kind": ({"adapter.type": "vera"}, {}, "only lora can be read"),
    "no alpha": ({"adapter.lora.alpha": None}, {}, "adapter.lora.alpha is None"),
    "A without B": ({}, {B: None}, "has no lora_b"),
    "ranks": ({}, {B: np.ones((6, 3), np.float32)}, "do not fit each other"),
    "experts": (
        {},
        {B: np.ones((3, 6, 2), np.float32), A: np.ones((2, 2, 5), np.float32)},
        "do not fit each other",
    ),
    "norm": ({}, {"blk.0.attn_norm.weight": np.ones(5, np.float32)}, "is no factor"),
    "unknown name": (
        {},
        {"blk.0.ssm_x.weight.lora_a": FACTORS[A], "blk.0.ssm_x.weight.lora_b": FACTORS[B]},
        "base",
    ),
    "nothing": ({}, {A: None, B: None}, "holds no LoRA factors"),
}


@pytest.mark.parametrize("name", GGUF_DAMAGE)
def test_damaged_gguf_adapters_raise(name: str, tmp_path: Path) -> None:
    fields, tensors, reason = GGUF_DAMAGE[name]
    kept = {key: value for key, value in {**FIELDS, **fields}.items() if value is not None}
    held = {key: value for key, value in {**FACTORS, **tensors}.items() if value is not None}
    file = gguf_file(tmp_path / "a.gguf", kept, held)
    with pytest.raises(lorank.FormatError, match=reason) as error:
        lorank.LoraAdapter.load(file)
    assert str(file) in str(error.value)


def test_alpha_of_0_is_scale_1_in_gguf(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "a.gguf", {**FIELDS, "adapter.lora.alpha": 0.0}, FACTORS)
    (module,) = lorank.LoraAdapter.load(file).modules.values()
    assert (module.name, module.scaling) == ("model.layers.0.self_attn.v_proj", 1.0)


def test_cut_gguf_files_raise(tmp_path: Path) -> None:
    whole = gguf_file(tmp_path / "a.gguf", dict(FIELDS), FACTORS).read_bytes()
    for length in range(4, len(whole) - 32, 7):  # The last bytes are padding.
        (tmp_path / "b.gguf").write_bytes(whole[:length])
        with pytest.raises(lorank.FormatError, match=r"b\.gguf"):
            lorank.LoraAdapter.load(tmp_path / "b.gguf")


def test_layouts_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    base = tiny_models.llama()
    folder = llama_adapter(tmp_path / "a", modules_to_save=["lm_head"])
    for to in ("mlx", "gguf", "torchtune"):
        with pytest.raises(ValueError, match=r"lm_head.*holds factors only"):
            lorank.convert(folder, to, base=base)  # type: ignore[arg-type]
    plain = llama_adapter(tmp_path / "b")
    for to in ("gguf", "torchtune"):
        with pytest.raises(ValueError, match="name the"):
            lorank.convert(plain, to)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="to must be one of 'peft'"):
        lorank.convert(plain, "none")  # type: ignore[arg-type]
    vit = saved(trained(tiny_models.vit(), LoraConfig(r=2, target_modules=["projection"])), tmp_path / "c")
    with pytest.raises(ValueError, match=r"MLX-LM has no adapters of its kind \(conv\)"):
        lorank.convert(vit, "mlx")
    with pytest.raises(ValueError, match=r"name a file that ends with \.gguf"):
        lorank.convert(plain, "gguf", base=base).save(tmp_path / "d", "exact")
