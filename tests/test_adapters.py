"""Adapters of PEFT: read, compressed, written in every profile, and loaded by PEFT itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
import tiny_models
from adapter_files import configured, dense, distance, edited, loaded, norm, saved, trained
from lorank.adapters.writing import write_adapter

PROFILES = ("compact", "portable", "tensor-rank")
IDS = torch.arange(1, 9)[None]


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if (
            "vit"
            in type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__.lower()
        ):
            pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            return model(pixel_values=pixels).logits
        result = model(input_ids=IDS)
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


def config_of(model: Any, **kwargs: Any) -> LoraConfig:
    return lorank.allocate(model, "uniform", r_max=6).to_lora_config(model, lora_alpha=9, **kwargs)


def case(name: str) -> tuple[Any, LoraConfig]:
    llama, bert = tiny_models.llama(), tiny_models.bert_classifier()
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    cases: dict[str, Callable[[], tuple[Any, LoraConfig]]] = {
        "llama": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear)),
        "rslora": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear, use_rslora=True)),
        "patterns": lambda: (
            llama,
            LoraConfig(
                r=6,
                lora_alpha=9,
                target_modules=linear,
                rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 8},
                alpha_pattern={"v_proj": 20, r"layers\.0\.mlp\..*": 2},
            ),
        ),
        "regex": lambda: (llama, LoraConfig(r=6, target_modules=r".*layers\.1\..*_proj")),
        "gpt2": lambda: (gpt2 := tiny_models.gpt2(), config_of(gpt2)),
        "mixtral": lambda: (mixtral := tiny_models.mixtral(), config_of(mixtral)),
        "gpt_oss": lambda: (oss := tiny_models.gpt_oss(), config_of(oss)),
        "embedding": lambda: (bert, LoraConfig(r=6, target_modules=["query", "word_embeddings"])),
        "conv": lambda: (tiny_models.vit(), LoraConfig(r=6, target_modules=["projection", "q_proj"])),
        "dora": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear, use_dora=True)),
        "lora_bias": lambda: (llama, LoraConfig(r=6, lora_alpha=9, target_modules=linear, lora_bias=True)),
        "head": lambda: (bert, LoraConfig(r=6, target_modules=["query"], task_type="SEQ_CLS")),
        "biases": lambda: (bert, LoraConfig(r=6, target_modules=["query"], bias="all")),
    }
    return cases[name]()


CASES = [
    "llama",
    "rslora",
    "patterns",
    "regex",
    "gpt2",
    "mixtral",
    "gpt_oss",
    "embedding",
    "conv",
    "dora",
    "lora_bias",
    "head",
    "biases",
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_where_nothing_is_dropped(name: str, profile: Any, tmp_path: Path) -> None:
    model, config = case(name)
    peft_model = trained(model, config)
    folder = saved(peft_model, tmp_path / "before")
    adapter = lorank.LoraAdapter.load(folder)
    assert adapter.num_parameters == sum(
        p.numel()
        for n, p in peft_model.named_parameters()
        if "lora_" in n and "magnitude" not in n and "lora_B.default.bias" not in n
    )
    whole = lorank.compress(adapter, rank_ratio=1.0, progress=False)
    assert distance(dense(adapter), dense(whole)) <= 1e-6 * norm(dense(adapter))
    assert whole.certificate is not None
    assert whole.certificate.error <= 1e-12 * whole.certificate.norm
    whole.save(tmp_path / "after", profile)
    expected, got = output(peft_model), output(loaded(model, tmp_path / "after"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dora", "lora_bias")])
def test_the_compressed_model_computes_what_the_certificate_says(
    name: str, profile: Any, tmp_path: Path
) -> None:
    model, config = case(name)
    folder = saved(trained(model, config), tmp_path / "before")
    adapter = lorank.LoraAdapter.load(folder)
    small = lorank.compress(adapter, rank_ratio=0.4, progress=False)
    assert sum(small.ranks.values()) == int(0.4 * sum(adapter.ranks.values()) + 0.5)
    before, after, certificate = dense(adapter), dense(small), small.certificate
    assert certificate is not None
    assert certificate.norm == pytest.approx(norm(before), rel=4e-7)
    assert certificate.error == pytest.approx(distance(before, after), abs=1e-6 * norm(before))
    for entry in certificate.modules:
        difference = before[entry.name] - after[entry.name]
        assert entry.error == pytest.approx(np.sqrt(np.square(difference).sum()), abs=1e-6 * norm(before))
        spectral = np.linalg.norm(difference, 2, axis=(-2, -1)).max()
        assert entry.spectral_error == pytest.approx(spectral, abs=1e-6 * norm(before))
    small.save(tmp_path / "after", profile)
    reread = lorank.LoraAdapter.load(tmp_path / "after")
    assert distance({n: after[n] for n in reread.modules}, dense(reread)) <= 1e-6 * norm(before)
    # The live model: base weights plus the truncated update, added densely.
    peft_model = loaded(model, tmp_path / "after")
    merged = peft_model.merge_and_unload()
    target = dict(model.named_parameters())
    for parameter_name, parameter in merged.named_parameters():
        module = parameter_name.removesuffix(".weight")
        change = (parameter - target[parameter_name]).detach().double().numpy()
        if module in after:
            delta = after[module]
            modules = dict(model.named_modules())
            kind = type(modules[module]).__name__ if module in modules else ""
            flipped = kind in ("Conv1D", "Embedding") or (not kind and name == "gpt_oss")
            delta = np.swapaxes(delta, -1, -2) if flipped else delta
            scale = max(float(parameter.abs().max()), 1.0)
            np.testing.assert_allclose(change, delta.reshape(change.shape), atol=3e-6 * scale)
        elif "classifier" not in module:
            assert not change.any(), module


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_what_rounding_adds_is_told_apart(dtype: Any, tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):
        model, config = case(name)
        adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / name))
        small = lorank.compress(adapter, avg_rank=3, progress=False)
        for profile in PROFILES:
            folder = tmp_path / f"{name}-{profile}-{dtype}"
            small.save(folder, profile, dtype)
            reread = lorank.LoraAdapter.load(folder)
            assert {module.dtype for module in reread.modules.values()} == {dtype}
            report = json.loads((folder / "lorank.json").read_text())
            assert small.certificate is not None
            assert report["error"] == pytest.approx(small.certificate.error, rel=1e-12)
            after = {n: x for n, x in dense(small).items() if n in reread.modules}
            added = distance(after, dense(reread))
            if dtype == "float64":
                assert report["rounding_error"] is None
            else:
                assert report["rounding_error"] == pytest.approx(added, rel=1e-5)
                assert added > 0


def test_narrow_adapters_stay_narrow(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config).to(torch.bfloat16), tmp_path / "a")
    adapter = lorank.LoraAdapter.load(folder)
    lorank.compress(adapter, avg_rank=2, progress=False).save(tmp_path / "b")
    assert {m.dtype for m in lorank.LoraAdapter.load(tmp_path / "b").modules.values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["llama", "mixtral", "conv"])
def test_an_elastic_parent_is_cut_without_a_decomposition(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = case(name)
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    children = lorank.family(adapter, [1, 2, 4], progress=False)
    for profile in PROFILES:
        lorank.elastic(adapter, progress=False).save(tmp_path / profile, profile)
    from lorank import _core

    def refuse(updates: Any, *_: Any) -> None:
        assert not updates, "an elastic parent needs no decomposition"

    monkeypatch.setattr(_core, "decompose", refuse)
    for profile in PROFILES:
        for rank, child in children.items():
            cut = lorank.LoraAdapter.load(tmp_path / profile, avg_rank=rank)
            assert cut.ranks == child.ranks
            assert distance(dense(cut), dense(child)) <= 2e-6 * norm(dense(child))
            assert cut.certificate is not None
            assert child.certificate is not None
            assert cut.certificate.error == pytest.approx(child.certificate.error, rel=1e-5)


def test_portable_pads_to_one_rank_and_other_profiles_do_not(tmp_path: Path) -> None:
    model, config = case("patterns")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    small = lorank.compress(adapter, avg_rank=1, progress=False)
    assert 0 in small.ranks.values(), "the hard case: a module without any rank"
    largest = max(small.ranks.values())
    for profile in PROFILES:
        small.save(tmp_path / profile, profile)
        settings = json.loads((tmp_path / profile / "adapter_config.json").read_text())
        assert (settings["use_rslora"], settings["bias"], settings["init_lora_weights"]) == (
            False,
            "none",
            True,
        )
        assert isinstance(settings["target_modules"], list)
        assert settings["r"] == settings["lora_alpha"] == largest
        shapes = {
            key: x.shape for key, x in load_file(tmp_path / profile / "adapter_model.safetensors").items()
        }
        ranks = {key.split(".lora_A")[0]: shape[0] for key, shape in shapes.items() if ".lora_A." in key}
        if profile == "portable":
            assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
            assert len(ranks) == len(small.modules)
            assert set(ranks.values()) == {largest}
        else:
            assert len(ranks) == len(small.adapted)
            assert sorted(ranks.values()) == sorted(r for r in small.ranks.values() if r)
            expected = settings["rank_pattern"] if profile == "compact" else {}
            assert settings["alpha_pattern"] == expected


def test_adalora_becomes_plain_lora(tmp_path: Path) -> None:
    model = tiny_models.llama()
    config = AdaLoraConfig(target_modules=["q_proj", "up_proj"], init_r=6, total_step=10, lora_alpha=5)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = saved(peft_model.eval(), tmp_path / "a")
    adapter = lorank.LoraAdapter.load(folder)
    assert any("AdaLoRA" in note for note in adapter.notes)
    lorank.compress(adapter, rank_ratio=1.0, progress=False).save(tmp_path / "b")
    torch.testing.assert_close(
        output(loaded(model, tmp_path / "b")), output(peft_model), rtol=1e-4, atol=1e-5
    )


def test_pickled_adapters(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({key: torch.from_numpy(x) for key, x in tensors.items()}, folder / "adapter_model.bin")
    from_safetensors = dense(lorank.LoraAdapter.load(folder))
    (folder / "adapter_model.safetensors").unlink()
    assert distance(dense(lorank.LoraAdapter.load(folder)), from_safetensors) == 0


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ],
)
def test_other_methods_are_refused_by_name(config: Any, method: str, tmp_path: Path) -> None:
    folder = saved(get_peft_model(tiny_models.llama(), config), tmp_path / "a")
    with pytest.raises(lorank.FormatError, match=f"is a {method} adapter"):
        lorank.LoraAdapter.load(folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_initialisations_that_change_the_base_are_refused_by_name(init: str, tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    configured(folder, init_lora_weights=init)
    with pytest.raises(lorank.FormatError, match=f"initialised by '{init}', which changes the base model"):
        lorank.LoraAdapter.load(folder)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop(KEY), "has no lora_A"),
        (lambda t: t.update({KEY: t[KEY][:5]}), "do not fit each other"),
        (lambda t: t.update({KEY: np.zeros((0, 32), np.float32)}), "are not matrices"),
        (lambda t: t.update({KEY: np.zeros(32, np.float32)}), "are not matrices"),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
)
def test_damaged_factors(edit: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path) -> None:
    model, config = case("llama")
    folder = edited(saved(trained(model, config), tmp_path / "a"), edit)
    with pytest.raises(lorank.FormatError, match=reason):
        lorank.LoraAdapter.load(folder)


def test_ranks_that_contradict_the_settings(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    configured(folder, r=7)
    with pytest.raises(lorank.FormatError, match="has rank 6, but the settings say 7"):
        lorank.LoraAdapter.load(folder)


def test_nan_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = edited(
        saved(trained(model, config), tmp_path / "a"), lambda t: t[KEY].__setitem__((0, 0), np.nan)
    )
    with pytest.raises(lorank.NumericalError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        lorank.compress(lorank.LoraAdapter.load(folder), avg_rank=1, progress=False)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_factors(size: float, tmp_path: Path) -> None:
    model, config = case("llama")
    plain = saved(trained(model, config), tmp_path / "a")
    before = dense(lorank.LoraAdapter.load(plain))

    def resize(tensors: dict[str, Any]) -> None:
        for key in tensors:
            factor = size if "lora_A" in key else 1 / size
            tensors[key] = (tensors[key] * np.float64(factor)).astype(np.float32)

    folder = edited(saved(trained(model, config), tmp_path / "b"), resize)
    whole = lorank.compress(lorank.LoraAdapter.load(folder), rank_ratio=1.0, progress=False)
    assert distance(before, dense(whole)) <= 1e-6 * norm(before)
    for module in whole.modules.values():
        assert np.abs(module.A).max() < 100 * np.abs(module.B).max() < 1e4 * np.abs(module.A).max()


def test_untrained_adapters_hold_nothing(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(get_peft_model(copy.deepcopy(model), config), tmp_path / "a")
    small = lorank.compress(lorank.LoraAdapter.load(folder), rank_ratio=0.5, progress=False)
    assert small.num_parameters == 0
    assert small.certificate is not None
    assert (small.certificate.error, small.certificate.retained_energy) == (0.0, 1.0)
    with pytest.raises(ValueError, match="every update is zero: the adapter is untrained"):
        small.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert any("ranks were zero before" in note for note in small.notes)


def small_one(folder: Path, **knobs: Any) -> lorank.LoraAdapter:
    """A compressed adapter of mixed ranks, one of them 0."""
    model, config = case("patterns")
    small = lorank.compress(
        saved(trained(model, config), folder), progress=False, **(knobs or {"avg_rank": 1})
    )
    assert len(set(small.ranks.values())) > 2
    assert 0 in small.ranks.values()
    return small


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_certificate_is_read_again_and_survives_another_profile(
    profile: Any, dtype: Any, tmp_path: Path
) -> None:
    small = replace(small_one(tmp_path / "a"), notes=["the eldest note"])
    written = write_adapter(small, tmp_path / "b", profile, dtype, overwrite=False)
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert again.certificate == written.certificate
    assert again.certificate is not None
    assert "the eldest note" in again.notes
    for other in PROFILES:
        again.save(tmp_path / other, other)
        certificate = lorank.LoraAdapter.load(tmp_path / other).certificate
        assert certificate is not None
        assert certificate.modules == again.certificate.modules
        card = (tmp_path / other / "README.md").read_text()
        assert "compress, avg_rank=1" in card
        assert "- the eldest note" in card
        assert "It holds more than factors" not in card
        # Whatever is rounded a second time is added to the first.
        assert (certificate.rounding_error or 0) >= (again.certificate.rounding_error or 0)
        assert (certificate.rounding_error is None) == (dtype is None)
    fresh = lorank.compress(again, rank_ratio=1.0, progress=False).certificate
    assert fresh is not None
    assert fresh.error == 0
    assert fresh.action != again.certificate.action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "damaged"),
        ("[]", "damaged: no action"),
        ('{"action": "x"}', "no list of modules"),
        ('{"action": "x", "modules": [{}]}', "a module without a name"),
        ('{"action": "x", "modules": [{"name": "m", "rank_before": "8"}]}', "m: rank_before is '8'"),
        ('{"action": "x", "modules": [], "rounding_error": NaN}', "rounding_error is nan"),
        ('{"action": "x", "modules": []}', "has other ranks"),
    ],
)
def test_a_certificate_that_does_not_fit_is_ignored(text: str, reason: str, tmp_path: Path) -> None:
    small_one(tmp_path / "a").save(tmp_path / "b")
    (tmp_path / "b" / "lorank.json").write_text(text)
    adapter = lorank.LoraAdapter.load(tmp_path / "b")
    assert adapter.certificate is None
    assert any("lorank.json was ignored" in note and reason in note for note in adapter.notes)


def test_who_trains_on_loses_the_certificate(tmp_path: Path) -> None:
    small_one(tmp_path / "a").save(tmp_path / "b")
    saved(loaded(tiny_models.llama(), tmp_path / "b"), tmp_path / "b")
    assert (tmp_path / "b" / "lorank.json").exists()
    assert lorank.LoraAdapter.load(tmp_path / "b").certificate is None


def test_padding_is_no_rank(tmp_path: Path) -> None:
    small = small_one(tmp_path / "a")
    small.save(tmp_path / "b", "portable")
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert again.ranks == small.ranks
    assert again.num_parameters == small.num_parameters
    assert any("zeros that padded the ranks of" in note for note in again.notes)
    half = [lorank.compress(x, rank_ratio=0.5, progress=False).ranks for x in (small, again)]
    assert half[0] == half[1]
    assert sum(half[0].values()) == round(0.5 * sum(small.ranks.values()) + 1e-9)
    assert f"{small.num_parameters:,} parameters" in (tmp_path / "b" / "README.md").read_text()


def retold(folder: Path, ranks: str) -> lorank.LoraAdapter:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "lorank.ranks": ranks})
    return lorank.LoraAdapter.load(folder)


def test_ranks_that_a_file_tells_wrongly(tmp_path: Path) -> None:
    small = small_one(tmp_path / "a")
    small.save(tmp_path / "b", "portable")
    largest = max(small.ranks.values())
    for ranks in (
        "{",
        "[]",
        "{}",
        json.dumps(dict.fromkeys(small.ranks, 99)),
        json.dumps(dict.fromkeys(small.ranks, "1")),
    ):
        again = retold(tmp_path / "b", ranks)
        assert set(again.ranks.values()) == {largest}
        assert any("do not fit and were ignored" in note for note in again.notes)
    fewer = retold(tmp_path / "b", json.dumps(dict.fromkeys(small.ranks, 1)))
    with pytest.raises(lorank.FormatError, match="state rank 1, but its factors have more"):
        lorank.compress(fewer, rank_ratio=1.0, progress=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", None),
        ("r", "8"),
        ("r", True),
        ("r", -6),
        ("r", 0),
        pytest.param("r", 10**400, id="r-huge"),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", False),
        ("lora_alpha", float("nan")),
        pytest.param("lora_alpha", 10**400, id="lora_alpha-huge"),
        ("rank_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": [1]}),
        ("rank_pattern", ["q_proj"]),
    ],
)
def test_settings_that_are_no_numbers_are_named(key: str, value: Any, tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    configured(folder, **{key: value})
    with pytest.raises(lorank.FormatError) as error:
        lorank.LoraAdapter.load(folder)
    named = (
        repr(value["q_proj"])
        if isinstance(value, dict)
        else "list"
        if isinstance(value, list)
        else repr(value)
    )
    for word in (str(folder), key, named[:70]):
        assert word in str(error.value)
    with pytest.raises(lorank.FormatError, match=key):
        lorank.check(folder)


def test_missing_magnitudes_are_noted(tmp_path: Path) -> None:
    model, config = case("dora")
    folder = saved(trained(model, config), tmp_path / "a")
    assert not any("no magnitude" in note for note in lorank.LoraAdapter.load(folder).notes)
    edited(folder, lambda tensors: tensors.pop(KEY.replace("lora_A.weight", "lora_magnitude_vector")))
    notes = lorank.LoraAdapter.load(folder).notes
    assert any(
        "1 modules have no magnitude vector, the first is model.layers.0.self_attn.q_proj" in n for n in notes
    )
    (verdict,) = lorank.check(folder, ["peft"])
    assert (verdict.status, "magnitudes of 1 modules anew" in verdict.reason) == ("wrong", True)


def test_only_files_are_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "something.safetensors").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, "."):
        with pytest.raises(lorank.FormatError, match=r"holds neither adapter_config\.json nor"):
            lorank.LoraAdapter.load(path)
    with pytest.raises(FileNotFoundError, match="an empty path"):
        lorank.LoraAdapter.load("")


def test_failed_writes_leave_no_empty_folders(tmp_path: Path) -> None:
    small = small_one(tmp_path / "a")
    name = small.adapted[0].name
    huge = replace(small.modules[name], scaling=1e9)
    adapter = replace(small, modules={**small.modules, name: huge})
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "b" / "c", tmp_path / "mine" / "c", tmp_path / "mine"):
        with pytest.raises(lorank.NumericalError):
            adapter.save(target, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]
    assert not any((tmp_path / "mine").iterdir())


def test_nothing_of_an_earlier_adapter_contradicts(tmp_path: Path) -> None:
    model, config = case("llama")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    folder = tmp_path / "b"
    small.save(folder)
    (folder / "adapter_model.bin").write_bytes(b"old")
    (folder / "precious").write_text("")
    adapter.save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "precious",
    }
    assert "energy retained" not in (folder / "README.md").read_text()
    (folder / "README.md").write_text("Mine")
    small.save(folder, overwrite=True)
    assert (folder / "README.md").read_text() == "Mine"


def test_types_of_torch_and_short_names(tmp_path: Path) -> None:
    small = small_one(tmp_path / "a")
    small.save(tmp_path / "b", dtype=torch.bfloat16)
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert {module.dtype for module in again.modules.values()} == {"bfloat16"}
    assert repr(again) == (
        f"LoraAdapter('{tmp_path / 'b'}', peft, {len(again.modules)} modules, ranks 1 to "
        f"{max(again.ranks.values())}, {again.num_parameters:,} parameters)"
    )
    assert repr(again.certificate).startswith(
        "Certificate('compress, avg_rank=1, global scope', 12 modules, "
    )
    assert len(repr(again.certificate)) < 200


def test_paths_and_slips_of_the_pen(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config), tmp_path / "a")
    adapter = lorank.LoraAdapter.load(folder)
    knobs: dict[str, Any] = {"avg_rank": 2, "progress": False}
    expected = lorank.compress(adapter, **knobs).ranks
    for path in (folder, str(folder)):
        assert lorank.compress(path, **knobs).ranks == expected
        assert lorank.family(path, [2], progress=False)[2].ranks == expected
        assert lorank.elastic(path, progress=False).ranks == adapter.ranks
        assert lorank.merge([path, adapter], **knobs).ranks == expected
        with pytest.raises(TypeError, match="merge takes a list of adapters, not one"):
            lorank.merge(path, **knobs)
    with pytest.raises(TypeError, match="a LoraAdapter or a path, not a dict"):
        lorank.compress({}, **knobs)  # type: ignore[arg-type]
    for call in (lorank.compress, lorank.extract, lorank.merge, lorank.LoraAdapter.load):
        two = (folder, folder) if call is lorank.extract else (folder,)
        with pytest.raises(TypeError, match="no knob 'rank': choose among rank_ratio"):
            call(*two, rank=2)  # type: ignore[operator]


def test_existing_folders_are_kept(tmp_path: Path) -> None:
    model, config = case("llama")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        adapter.save(tmp_path / "b")
    adapter.save(tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "precious").exists()
    with pytest.raises(ValueError, match="profile must be one of"):
        adapter.save(tmp_path / "c", "tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be"):
        adapter.save(tmp_path / "c", dtype="int8")  # type: ignore[arg-type]


def test_singular_values_of_a_module(tmp_path: Path) -> None:
    model, config = case("patterns")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    for name, update in dense(adapter).items():
        module = adapter.modules[name]
        expected = np.linalg.svd(update, compute_uv=False)[: module.rank]
        np.testing.assert_allclose(module.singular_values, expected, atol=1e-6 * expected[0])
