"""Names, kinds, orientations and ties that follow from a model's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorank
from lorank.modules.building import Unknown, build
from lorank.modules.model_config import ModelConfig
from lorank.modules.skeleton import Skeleton
from lorank.sources import open_source
from tests.support.architectures import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()


class ShiftedEmbedding(nn.Embedding):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows + 2)


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) * self.embed_scale


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))


class Experts(nn.Module):
    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.num_experts = 3
        self.is_transposed = is_transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 16))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.conv1d = Conv1D(6, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.back = nn.ConvTranspose1d(4, 6, 3)
        self.table = nn.Embedding(20, 8)
        self.shifted = ShiftedEmbedding(20, 8)
        self.scaled = ScaledEmbedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.router = Router()
        self.plain = Experts(is_transposed=False)
        self.turned = Experts(is_transposed=True)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight


def test_classes_determine_kind_orientation_and_adaptability() -> None:
    weights = Skeleton.of_model(Net()).weights
    kinds = {name: weight.kind for name, weight in weights.items() if weight.kind}
    assert kinds == {
        "linear.weight": "linear",
        "conv1d.weight": "linear",
        "conv.weight": "conv",
        "depthwise.weight": "conv",
        "back.weight": "conv",
        "table.weight": "embedding",
        "shifted.weight": "embedding",
        "scaled.weight": "embedding",
        "attention.out_proj.weight": "linear",
        "router.weight": "linear",
        "plain.gate_up_proj": "expert",
        "turned.gate_up_proj": "expert",
        "head.weight": "linear",
    }
    assert {name for name, weight in weights.items() if weight.transposed} == {
        "conv1d.weight",
        "turned.gate_up_proj",
    }
    refused = {name.removesuffix(".weight") for name, weight in weights.items() if weight.refused}
    assert refused == {"depthwise", "back", "shifted", "attention.out_proj"}


def test_matrix_of_an_unknown_class_is_adapted_by_its_parameter() -> None:
    weights = Skeleton.of_model(Net()).weights
    assert weights["router.weight"].module == "router.weight"
    assert weights["linear.weight"].module == "linear"
    row = lorank.analyze(Net(), include=["router"], progress=False).modules[0]
    assert (row.name, row.module) == ("router", "router.weight")


def test_tied_parameters_count_once_and_have_one_row() -> None:
    source = open_source(Net())
    assert source.facts.ties == {"table": ("head",)}
    assert source.num_parameters == sum(p.numel() for p in Net().parameters())
    assert "head" not in {matrix.info.module for matrix in source.matrices}


def saved(name: str, folder: Path) -> Any:
    model = tiny(name, layers=1)
    assert model is not None
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).float()


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "DeepseekV3ForCausalLM",
        "GptOssForCausalLM",
        "Llama4ForCausalLM",
        "JetMoeForCausalLM",
        "LlavaForConditionalGeneration",
        "T5ForConditionalGeneration",
        "Wav2Vec2ForCTC",
        "DecisionTransformerModel",
    ],
)
def test_folder_has_the_rows_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    live = lorank.analyze(saved(name, tmp_path), progress=False)
    stored = lorank.analyze(tmp_path, progress=False)
    assert stored.facts.class_name == live.facts.class_name
    assert stored.facts.ties == live.facts.ties
    assert stored.num_parameters == live.num_parameters
    rows = {row.name: row for row in stored.modules}
    assert rows.keys() == {row.name for row in live.modules}
    for row in live.modules:
        other = rows[row.name]
        assert (other.module, other.kind, other.shape) == (row.module, row.kind, row.shape)
        assert other.frobenius_norm == pytest.approx(row.frobenius_norm, rel=1e-12)
        assert other.alpha_hill == pytest.approx(row.alpha_hill, rel=1e-9, nan_ok=True)


def test_experts_stored_separately_are_rows_of_the_stack(tmp_path: Path) -> None:
    saved("Qwen2MoeForCausalLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    at = "model.layers.0.mlp.experts"
    assert f"{at}.3.gate_proj.weight" in tensors
    matrices = {matrix.info.name: matrix for matrix in open_source(tmp_path).matrices}
    found = matrices[f"{at}.gate_up_proj[3]"].load().to_array()
    wanted = torch.cat([tensors[f"{at}.3.{part}_proj.weight"] for part in ("gate", "up")])
    np.testing.assert_array_equal(found, wanted.numpy())
    assert matrices[f"{at}.gate_up_proj[3]"].info.module == f"{at}.gate_up_proj"


def test_incomplete_stack_of_experts_is_skipped_with_a_reason(tmp_path: Path) -> None:
    saved("Qwen2MoeForCausalLM", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if ".experts.3." not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    source = open_source(tmp_path)
    reasons = {s.name: s.reason for s in source.skipped}
    assert "does not fit" in reasons["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert not any(matrix.info.kind == "expert" for matrix in source.matrices)


def tied_llama(folder: Path) -> dict[str, torch.Tensor]:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_tied_tables_stored_twice_are_one_row(tmp_path: Path) -> None:
    tensors = tied_llama(tmp_path)
    alone = open_source(tmp_path)
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copy, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with_copy = open_source(tmp_path)
    assert with_copy.num_parameters == alone.num_parameters
    assert with_copy.facts.ties == alone.facts.ties == {"model.embed_tokens": ("lm_head",)}
    assert [m.info.name for m in with_copy.matrices] == [m.info.name for m in alone.matrices]


def test_stored_tables_that_differ_are_not_tied(tmp_path: Path) -> None:
    tensors = tied_llama(tmp_path)
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    source = open_source(tmp_path)
    assert source.facts.ties == {}
    assert "lm_head" in {matrix.info.module for matrix in source.matrices}


def test_config_with_more_layers_than_the_files_is_not_built() -> None:
    found = build(ModelConfig({"model_type": "llama", "num_hidden_layers": 10**9}), ["a"] * 12)
    assert isinstance(found, Unknown)
    assert found.is_foreign
    assert "num_hidden_layers=1000000000" in found.reason


def test_remote_code_is_not_executed(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (tmp_path / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = {
        "model_type": "trap",
        "architectures": ["Trap"],
        "auto_map": {"AutoConfig": "modeling_trap.Trap", "AutoModel": "modeling_trap.Trap"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    report = lorank.analyze(tmp_path, progress=False)
    assert not trap.exists()
    assert report.facts.are_guessed
    assert "'trap'" in report.facts.remark


def test_config_of_another_model_is_ignored(tmp_path: Path) -> None:
    tied_llama(tmp_path)
    save_file({f"other.{i}.weight": torch.randn(4, 4) for i in range(5)}, tmp_path / "model.safetensors")
    facts = open_source(tmp_path).facts
    assert facts.are_guessed
    assert "LlamaForCausalLM" in facts.doubts[0]


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from lorank.cli import main
sys.argv = ["lorank", *sys.argv[1:]]
main()
"""


def run_without_transformers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_folder_without_transformers_gives_a_report_marked_guessed(tmp_path: Path) -> None:
    tied_llama(tmp_path)
    done = run_without_transformers("analyze", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("guessed from names (transformers is not installed)") == 1


def test_warnings_of_libraries_do_not_reach_the_terminal(tmp_path: Path) -> None:
    tied_llama(tmp_path)
    command = [sys.executable, "-c", "from lorank.cli import main; main()", "analyze", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "guessed" not in done.stdout


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({f"layers.0.experts.{e}.up_proj.weight": (8, 6) for e in range(2)}, "one by one"),
        ({"layers.0.input_linear.weight": (4, 8, 6)}, "3-D"),
        ({"layers.0.experts.up_proj": (4, 8, 8)}, "square"),
    ],
)
def test_writing_from_uncertain_guesses_needs_guess(
    tensors: dict[str, tuple[int, ...]], word: str, tmp_path: Path
) -> None:
    every = {name: torch.randn(shape) for name, shape in tensors.items()}
    every["layers.0.q_proj.weight"] = torch.randn(8, 8)
    save_file(every, tmp_path / "base.safetensors")
    save_file({name: value + 1 for name, value in every.items()}, tmp_path / "tuned.safetensors")
    sources = str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")
    out = str(tmp_path / "adapter")
    command = [sys.executable, "-c", "from lorank.cli import main; main()"]
    allocate = [*command, "allocate", sources[0], "--avg-rank", "4", "-o", out]
    refused = subprocess.run(allocate, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert word in refused.stderr
    assert "--guess" in refused.stderr
    assert not Path(out).exists()
    done = subprocess.run([*allocate, "--guess"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=word):
        lorank.extract(*sources, avg_rank=1, progress=False)
    assert lorank.extract(*sources, avg_rank=1, guess=True, progress=False).adapted


def test_facts_survive_saving_reports_and_allocations(tmp_path: Path) -> None:
    report = lorank.analyze(Net(), progress=False)
    for name in ("report.json", "report.parquet"):
        report.save(tmp_path / name)
        assert lorank.SpectralReport.load(tmp_path / name).facts == report.facts
    allocation = lorank.allocate(report, "uniform", r_min=1, avg_rank=2)
    allocation.save(tmp_path / "allocation.json")
    assert lorank.RankAllocation.load(tmp_path / "allocation.json").facts == report.facts


def test_allocation_excludes_and_flags_modules_refused_by_peft() -> None:
    allocation = lorank.allocate(Net(), "uniform", r_min=1, avg_rank=2, targets=".*", progress=False)
    assert "depthwise" not in allocation.ranks
    assert "8 groups" in allocation.flags["depthwise"]
    with pytest.raises(ValueError, match="8 groups"):
        lorank.allocate(Net(), "uniform", r_min=1, avg_rank=2, targets=["depthwise"], progress=False)


def test_layers_whose_settings_or_weight_are_read_are_refused() -> None:
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    refused = Skeleton.of_model(model).facts(()).refused
    assert {name for name in refused if "itself" in refused[name]} == {
        "model.encoder.conv1",
        "model.encoder.conv2",
        "model.encoder.embed_positions",
    }
    config = peft.LoraConfig(r=2, target_modules=["model.encoder.conv1"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(AttributeError, match="stride"):
        adapted(input_features=torch.randn(1, 8, 40), decoder_input_ids=torch.arange(5)[None])


class SamePadding(nn.Conv2d):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(image, (1, 1, 1, 1)))


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.typed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        # Not a read of the weight: self.typed.weight
        assert isinstance(self.typed.weight, nn.Parameter)
        return self.table.weight[rows].to(self.typed.weight.dtype) + self.typed(rows)


def test_only_convolutions_with_another_forward_are_refused() -> None:
    net = nn.Sequential(SamePadding(4, 6, 3), Reading())
    refused = {name for name, weight in Skeleton.of_model(net).weights.items() if weight.refused}
    assert refused == {"0.weight", "1.table.weight"}


def test_vocabulary_resized_without_its_config_has_its_stored_size(tmp_path: Path) -> None:
    model = saved("LlamaForCausalLM", tmp_path)
    model.resize_token_embeddings(model.config.vocab_size + 6)
    settings = (tmp_path / "config.json").read_text()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(settings)
    source = open_source(str(tmp_path))
    assert not source.facts.are_guessed
    assert source.num_parameters == sum(p.numel() for p in model.parameters())


def test_model_with_many_buffers_is_recognised(tmp_path: Path) -> None:
    saved("IBertForMaskedLM", tmp_path)
    assert open_source(str(tmp_path)).facts.class_name == "IBertForMaskedLM"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"num_labels": 10**9}, "num_labels=1000000000"),
        ({"num_attention_heads": 10**8}, "num_attention_heads=100000000"),
    ],
)
def test_settings_without_a_model_lead_to_guessed_names(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    saved("LlamaForCausalLM", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    assert reason in open_source(str(tmp_path)).facts.remark


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.inner = nn.Linear(8, 8, bias=False)

    def slow_forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.inner(self.table(rows)) @ self.head.weight.T

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.slow_forward(rows)


def test_extraction_excludes_tables_tied_to_a_directly_read_head() -> None:
    base, tuned = nn.Sequential(Decoder()), nn.Sequential(Decoder())
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.randn_like(parameter)
    adapter = lorank.extract(base, tuned, energy=1.0, progress=False)
    assert set(adapter.modules) == {"0.inner"}
    assert any("reads the weight of head itself" in note for note in adapter.notes)


def test_router_with_several_outputs_is_adapted_by_its_weight(tmp_path: Path) -> None:
    model = saved("Llama4ForCausalLM", tmp_path)
    allocation = lorank.allocate(
        str(tmp_path), "uniform", r_min=1, r_max=2, targets=["router"], progress=False
    )
    assert all(name.endswith("router.weight") for name in allocation.ranks)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**allocation.lora_settings()))
    ids = torch.arange(10, 22)[None]
    before = adapted(ids).logits
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert not torch.equal(adapted(ids).logits, before)
