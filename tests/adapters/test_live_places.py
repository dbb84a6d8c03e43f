"""Adapters in live models: injected, wrapped, beside others, in any mode; the rest stays unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import loaded
from tests.support.live_models import IDS, MODELS, Perceptron, assert_same, randomised
from tests.support.outputs import outputs

QV = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def live(model: Any = None, **settings: Any) -> Any:
    """Return a PEFT model of a tiny Llama with random factors."""
    base = tiny_models.llama() if model is None else model
    return randomised(get_peft_model(base, LoraConfig(**{**QV, **settings})).eval())


def halved(adapter: lorank.LoraAdapter) -> lorank.LoraAdapter:
    return lorank.compress(adapter, rank_ratio=0.5, progress=False)


def check_both_ways(model: Any, inputs: torch.Tensor, base: Any, folder: Path) -> None:
    """Insert half of an adapter's ranks, then all, in place and under another name; compare outputs."""
    before = outputs(model, inputs)
    adapter = lorank.LoraAdapter.from_model(model)
    small = halved(adapter)
    small.save(folder)
    expected = outputs(loaded(base, folder), inputs)
    small.into_model(model)
    assert_same(outputs(model, inputs), expected)
    adapter.into_model(model)
    assert_same(outputs(model, inputs), before)
    small.into_model(model, "small")
    assert_same(outputs(model, inputs), before)
    again = lorank.LoraAdapter.from_model(model, "small")
    assert {name: rank for name, rank in small.ranks.items() if rank} == again.ranks


def test_adapter_injected_into_a_plain_module_is_replaced(tmp_path: Path) -> None:
    inputs = MODELS["perceptron"][1]
    base = Perceptron().eval()
    config = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    model = inject_adapter_in_model(config, copy.deepcopy(base)).eval()
    check_both_ways(model, inputs, base, tmp_path / "a")


def test_adapter_injected_by_transformers_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transformers may require another release of PEFT; the tested behaviour is equal in both.
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    model = tiny_models.llama()
    model.add_adapter(LoraConfig(**QV, init_lora_weights=False))
    check_both_ways(model.eval(), IDS, tiny_models.llama(), tmp_path / "a")
    expected = outputs(model, IDS)
    model.save_pretrained(tmp_path / "saved")
    again = tiny_models.llama()
    again.load_adapter(tmp_path / "saved")
    assert_same(outputs(again.eval(), IDS), expected)


def test_adapter_injected_by_diffusers_is_replaced() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    targets = ["to_q", "to_v", "conv1", "proj_in"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))

    def computed() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 2, 8)).sample

    before = computed()
    adapter = lorank.LoraAdapter.from_model(model)
    assert {module.kind for module in adapter.modules.values()} == {"linear", "conv"}
    halved(adapter).into_model(model)
    assert (computed() - before).abs().max() > 1e-3
    adapter.into_model(model)
    assert_same(computed(), before)


def test_adapter_without_config_is_replaced() -> None:
    inputs = MODELS["perceptron"][1]
    config = LoraConfig(r=4, target_modules=["first"], init_lora_weights=False, use_rslora=True)
    model = inject_adapter_in_model(config, Perceptron()).eval()
    before = outputs(model, inputs)
    del model.peft_config
    adapter = lorank.LoraAdapter.from_model(model)
    assert adapter.ranks == {"first": 4}
    lorank.compress(adapter, rank_ratio=1.0, progress=False).into_model(model)
    assert_same(outputs(model, inputs), before)


@pytest.mark.parametrize("wrapped", ["outside", "inside", "method", "data_parallel"])
def test_adapter_under_wrappers_of_torch_is_replaced(wrapped: str, tmp_path: Path) -> None:
    base = tiny_models.llama()
    inner = torch.compile(tiny_models.llama(), backend="eager") if wrapped == "inside" else None
    model = live(inner)
    if wrapped == "outside":
        model = torch.compile(model, backend="eager")
    elif wrapped == "method":
        model.compile(backend="eager")
    elif wrapped == "data_parallel":
        model = nn.DataParallel(model)
    assert "model.layers.0.self_attn.q_proj" in lorank.LoraAdapter.from_model(model).ranks
    before = outputs(model, IDS)
    adapter = lorank.LoraAdapter.from_model(model)
    small = halved(adapter)
    small.save(tmp_path / "a")
    small.into_model(model)
    assert_same(outputs(model, IDS), outputs(loaded(base, tmp_path / "a"), IDS))
    adapter.into_model(model)
    assert_same(outputs(model, IDS), before)


def test_adapter_names_may_equal_parts_of_the_model() -> None:
    model = live(bias="lora_only")
    for name in ("q_proj", "weight", "lora_A", "layers"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    randomised(model)
    for name in ("default", "q_proj", "weight", "lora_A", "layers"):
        model.set_adapter(name)
        expected = outputs(model.eval(), IDS)
        adapter = lorank.LoraAdapter.from_model(model, name)
        assert len(adapter.modules) == 4
        lorank.compress(adapter, rank_ratio=1.0, progress=False).into_model(model, name)
        assert_same(outputs(model, IDS), expected)


def test_other_adapters_and_modes_stay_unchanged() -> None:
    model = live(tiny_models.llama().to(torch.bfloat16), lora_dropout=0.1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model.train()
    model.base_model.set_adapter(["default", "other"])

    def state() -> Any:
        parameters = dict(model.named_parameters())
        return (
            {name: (p.requires_grad, p.dtype, p.device, id(p)) for name, p in parameters.items()},
            [(path, module.training) for path, module in model.named_modules()],
            model.active_adapters,
        )

    before = state()
    values = {name: p.clone() for name, p in model.named_parameters() if "default" not in name}
    adapter = lorank.LoraAdapter.from_model(model)
    small = lorank.compress(adapter, rank_ratio=0.5, scope="module", progress=False)
    small.into_model(model)
    assert state() == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters() if name in values)

    small.into_model(model, "new")
    assert {name: x for name, x in state()[0].items() if ".new." not in name} == before[0]
    assert model.active_adapters == ["default", "other"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".new." in name)
    assert all(module.training for module in model.modules())
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_modules_missing_from_the_live_adapter_are_added(tmp_path: Path) -> None:
    wide = live(target_modules=["q_proj", "up_proj", "lm_head"], r=3)
    expected = outputs(wide, IDS)
    model = live(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    lorank.LoraAdapter.from_model(wide).into_model(model)
    assert_same(outputs(model, IDS), expected)
    assert all(
        p.requires_grad == (".default." in name) for name, p in model.named_parameters() if "lora_" in name
    )
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert_same(outputs(loaded(tiny_models.llama(), tmp_path), IDS), expected)


SAVED_BESIDE = [
    {"trainable_token_indices": [1, 3]},
    {"trainable_token_indices": {"embed_tokens": [1, 3]}, "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"]},
    {"alora_invocation_tokens": [1, 2]},
]


@pytest.mark.parametrize("settings", SAVED_BESIDE, ids=str)
def test_carried_tensors_are_replaced(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_models.llama_tied()
    model = live(copy.deepcopy(base), task_type="CAUSAL_LM", **copy.deepcopy(settings))
    before = outputs(model, IDS)
    adapter = lorank.LoraAdapter.from_model(model)
    small = lorank.compress(adapter, rank_ratio=0.5, scope="module", progress=False)
    small.save(tmp_path / "a")
    expected = outputs(loaded(base, tmp_path / "a"), IDS)
    small.into_model(model)
    assert_same(outputs(model, IDS), expected)
    model.save_pretrained(tmp_path / "b")
    assert_same(outputs(loaded(base, tmp_path / "b"), IDS), expected)
    adapter.into_model(model)
    assert_same(outputs(model, IDS), before)

    other = live(copy.deepcopy(base), task_type="CAUSAL_LM")
    unchanged = outputs(other, IDS)
    small.into_model(other, "other")
    assert_same(outputs(other, IDS), unchanged)
    other.set_adapter("other")
    assert_same(outputs(other.eval(), IDS), expected)
    if "modules_to_save" not in settings:
        with pytest.raises(
            ValueError, match=r"adapter 'default' of the model has .*: give the adapter a name"
        ):
            small.into_model(live(copy.deepcopy(base)))


def test_saved_module_never_overwrites_the_base_model() -> None:
    adapter = lorank.LoraAdapter.from_model(live(modules_to_save=["lm_head"]))
    model = live()
    with pytest.raises(
        ValueError, match=r"no tensor for 'base_model.model.lm_head.weight': give the adapter a name"
    ):
        adapter.into_model(model)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.conv(x).mean((2, 3)))


def test_adalora_of_a_convolution_becomes_lora(tmp_path: Path) -> None:
    base, inputs = Convolved().eval(), torch.randn(2, 3, 6, 6)
    config = AdaLoraConfig(init_r=4, target_modules=["conv", "dense"], total_step=10)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    adapter = lorank.LoraAdapter.from_model(model)
    lorank.compress(adapter, rank_ratio=1.0, progress=False).save(tmp_path / "a")
    assert_same(outputs(loaded(base, tmp_path / "a"), inputs), outputs(model, inputs))
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(lorank.FormatError, match=r"'conv': AdaLoRA of a convolution .* kernel's shape"):
        lorank.LoraAdapter.load(tmp_path / "b")
    with pytest.raises(ValueError, match=r"'default' of the model is AdaLoRA"):
        adapter.into_model(model)


def test_models_without_a_readable_adapter_raise() -> None:
    adapter = lorank.LoraAdapter.from_model(live())
    with pytest.raises(TypeError, match="Module, not a str"):
        lorank.LoraAdapter.from_model("model")
    for config, kind in (
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
    ):
        model = get_peft_model(tiny_models.llama(), config)
        with pytest.raises(ValueError, match=f"{kind} adapter: only LoRA"):
            lorank.LoraAdapter.from_model(model)
        with pytest.raises(ValueError, match=f"is {kind}, not LoRA"):
            adapter.into_model(model)
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            adapter.into_model(model, "other")
        assert list(model.peft_config) == ["default"]
    changed = get_peft_model(tiny_models.llama(), LoraConfig(**QV, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="'pissa', which changes the base model"):
        lorank.LoraAdapter.from_model(changed)
    with pytest.raises(ValueError, match="'pissa', which changes the base model"):
        adapter.into_model(changed)
    with torch.device("meta"):
        empty = tiny_models.llama()
    with pytest.raises(ValueError, match="on the meta device"):
        lorank.LoraAdapter.from_model(get_peft_model(empty, LoraConfig(**QV), low_cpu_mem_usage=True))


def test_unfitting_adapter_changes_nothing() -> None:
    adapter = lorank.LoraAdapter.from_model(live())
    wide = tiny_models.llama()
    wide.model.layers[0].self_attn.q_proj = nn.Linear(32, 40, bias=False)
    dora = live(use_dora=True)
    merged = live()
    merged.merge_adapter()
    gpt2 = get_peft_model(tiny_models.gpt2(), LoraConfig(target_modules=["c_attn"]))
    for model, name, words in (
        (get_peft_model(wide, LoraConfig(**QV)), "default", "the adapter belongs to another model"),
        (get_peft_model(wide, LoraConfig(**QV)), "other", "the adapter belongs to another model"),
        (
            dora,
            "default",
            "use_dora=true, but the adapter to load has use_dora=null: give the adapter a name",
        ),
        (merged, "default", "is merged into module"),
        (gpt2, "default", "fits no module that adapter 'default' of the model could adapt"),
        (gpt2, "other", "not found in the base model"),
    ):
        before = {key: (id(p), p.clone()) for key, p in model.named_parameters()}
        config = copy.deepcopy(model.peft_config)
        with pytest.raises(ValueError, match=words):
            adapter.into_model(model, name)
        assert {k: id(p) for k, p in model.named_parameters()} == {k: x for k, (x, _) in before.items()}
        assert all(torch.equal(p, before[k][1]) for k, p in model.named_parameters())
        assert model.peft_config == config


def test_model_of_mixed_adapters_is_read() -> None:
    model = randomised(PeftMixedModel(tiny_models.llama(), LoraConfig(**QV), "default").eval())
    before = outputs(model, IDS)
    adapter = lorank.LoraAdapter.from_model(model)
    halved(adapter).into_model(model)
    adapter.into_model(model)
    assert_same(outputs(model, IDS), before)


def test_adapter_of_a_classifier_is_replaced(tmp_path: Path) -> None:
    base = tiny_models.bert_classifier()
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = randomised(get_peft_model(copy.deepcopy(base), config).eval())
    assert isinstance(model, PeftModel)
    check_both_ways(model, IDS, base, tmp_path / "a")


def test_data_parallel_processes_raise(tmp_path: Path) -> None:
    model = live()
    adapter = lorank.LoraAdapter.from_model(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert lorank.LoraAdapter.from_model(wrapped).ranks == adapter.ranks
        with pytest.raises(ValueError, match="put the adapter into the model before it is wrapped"):
            adapter.into_model(wrapped)
    finally:
        torch.distributed.destroy_process_group()
