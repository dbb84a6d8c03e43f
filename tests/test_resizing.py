"""Live PEFT models change their ranks: dense float64 oracles, optimizers, files and resumed training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

import lorank
import tiny_models
from adapter_files import trained
from lorank.training import resize_lora, restore_ranks

IDS = torch.arange(8)[None]
LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mixed(torch.nn.Module):
    """An embedding, a convolution and linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(20, 12)
        self.kernel = torch.nn.Conv2d(3, 8, 2)
        self.first = torch.nn.Linear(7, 5)
        self.last = torch.nn.Linear(5, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.kernel(self.table(ids).reshape(-1, 3, 2, 2))
        return self.last(torch.tanh(self.first(x.reshape(-1, 8)[:, :7])))


MIXED = ["table", "kernel", "first", "last"]
MIXED_IDS = torch.arange(20)


def mixed(r: int = 4, **settings: Any) -> Any:
    config = LoraConfig(r=r, lora_alpha=6, target_modules=MIXED, **settings)
    return trained(Mixed(), config)


def layers(model: Any) -> dict[str, Any]:
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if hasattr(m, "lora_A") and "default" in m.r}


def factors(layer: Any) -> tuple[Any, Any]:
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def dense(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Every update in float64, from the factors alone."""
    return {
        name: layer.scaling["default"]
        * (b.detach().double().flatten(1).numpy() @ a.detach().double().flatten(1).numpy())
        for name, layer in layers(model).items()
        for a, b in [factors(layer)]
    }


def scalings(model: Any) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in layers(model).items()}


def ranks(model: Any) -> dict[str, int]:
    """The rank of every module, which all places that hold it must agree on."""
    result = {}
    for name, layer in layers(model).items():
        a, b = factors(layer)
        assert layer.r["default"] == a.shape[0] == b.shape[1]
        if "default" not in layer.lora_embedding_A:
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            sizes = (
                ("out_features", "in_features")
                if hasattr(down, "out_features")
                else ("out_channels", "in_channels")
            )
            assert getattr(down, sizes[0]) == getattr(up, sizes[1]) == a.shape[0]
        divisor = a.shape[0] ** 0.5 if layer.use_rslora["default"] else a.shape[0]
        assert layer.lora_alpha["default"] / divisor == pytest.approx(layer.scaling["default"], rel=1e-15)
        result[name] = a.shape[0]
    return result


def output(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return getattr(result, "logits", result)


def truncated(update: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    U, s, Vt = np.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_every_kind_of_layer_grows_and_shrinks_back(rank_stabilized: bool) -> None:
    model = mixed(use_rslora=rank_stabilized)
    before, updates, scales = output(model, MIXED_IDS), dense(model), scalings(model)
    changes = resize_lora(model, {"table": 7, "kernel": 5, "first": 6, "last": 9})
    assert ranks(model) == {"table": 7, "kernel": 5, "first": 6, "last": 9}
    assert [(c.old_rank, c.error, c.spectral_error) for c in changes.values()] == [(4, 0.0, 0.0)] * 4
    torch.testing.assert_close(output(model, MIXED_IDS), before, rtol=0, atol=1e-6)
    for name, update in dense(model).items():
        np.testing.assert_array_equal(update, updates[name])
    changes = resize_lora(model, dict.fromkeys(MIXED, 4))
    assert set(ranks(model).values()) == {4}
    assert all(change.error < 1e-6 for change in changes.values())
    torch.testing.assert_close(output(model, MIXED_IDS), before, rtol=0, atol=1e-6)
    assert scalings(model) == scales


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_shrinking_is_the_best_approximation_and_says_what_it_lost(rank_stabilized: bool) -> None:
    model = mixed(use_rslora=rank_stabilized)
    updates, scales = dense(model), scalings(model)
    wanted = {"table": 1, "kernel": 2, "first": 3, "last": 2}
    changes = resize_lora(model, wanted)
    assert ranks(model) == wanted
    assert scalings(model) == scales
    for name, update in dense(model).items():
        size = np.linalg.norm(updates[name])
        np.testing.assert_allclose(update, truncated(updates[name], wanted[name]), atol=1e-6 * size)
        assert changes[name].error == pytest.approx(np.linalg.norm(update - updates[name]), rel=1e-5)
        expected = np.linalg.svd(updates[name], compute_uv=False)[wanted[name] : 4]
        np.testing.assert_allclose(changes[name].dropped, expected, rtol=1e-6, atol=1e-6 * size)
        assert changes[name].spectral_error == changes[name].dropped[0]


def test_gpt2_conv1d_layers() -> None:
    model = trained(
        tiny_models.gpt2(), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )
    before, updates = output(model), dense(model)
    resize_lora(model, {"h.0.attn.c_attn": 6, "h.1.mlp.c_fc": 5})
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-6)
    change = resize_lora(model, {"h.0.attn.c_attn": 2})["transformer.h.0.attn.c_attn"]
    name = change.name
    np.testing.assert_allclose(dense(model)[name], truncated(updates[name], 2), atol=1e-6)


def saved_and_loaded(model: Any, base: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_resized_model_is_saved_and_loaded(tmp_path: Path, rank_stabilized: bool) -> None:
    base = tiny_models.llama()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA, use_rslora=rank_stabilized)
    model = trained(base, config)
    wanted = {"0.self_attn.q_proj": 7, "0.mlp.up_proj": 1, "1.mlp.up_proj": 7, "1.self_attn.v_proj": 2}
    resize_lora(model, wanted)
    again = saved_and_loaded(model, base, tmp_path)
    assert ranks(again) == ranks(model)
    assert scalings(again) == pytest.approx(scalings(model), rel=1e-15)
    torch.testing.assert_close(output(again), output(model))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 4  # (4 * 4 + 7 + 7 + 1 + 2) / 8 is 4.125
    assert written["lora_alpha"] == 6
    assert len(written["rank_pattern"]) == 3
    assert written["use_rslora"] is rank_stabilized
    # What lorank's own reader makes of the files.
    adapter = lorank.LoraAdapter.load(tmp_path)
    assert adapter.ranks == ranks(model)
    for name, module in adapter.modules.items():
        assert module.scaling == pytest.approx(scalings(model)[name], rel=1e-15)


def test_one_rank_for_all_needs_no_patterns() -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA))
    resize_lora(model, dict.fromkeys(ranks(model), 8))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (8, 12, {}, {})


def test_names_that_end_with_other_names_keep_their_own_rank(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.proj = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["proj"](self.proj(x))

    base, x = Nested(), torch.randn(3, 4)
    model = trained(base, LoraConfig(r=4, target_modules=["proj"]))
    resize_lora(model, {"proj": 2, "inner.proj": 3})
    assert ranks(model) == {"proj": 2, "inner.proj": 3}
    again = saved_and_loaded(model, base, tmp_path)
    assert ranks(again) == ranks(model)
    torch.testing.assert_close(output(again, x), output(model, x))


def test_mixtral_stacks_keep_their_rank_beside_resized_modules(tmp_path: Path) -> None:
    base = tiny_models.mixtral()
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = trained(base, config)
    before = output(model)
    resize_lora(model, {"layers.0.self_attn.q_proj": 12, "layers.1.self_attn.q_proj": 12})
    torch.testing.assert_close(output(model), before)
    again = saved_and_loaded(model, base, tmp_path)
    torch.testing.assert_close(output(again), output(model))
    with pytest.raises(
        NotImplementedError, match=r"'model.layers.0.mlp.experts.down_proj' is a stack of experts"
    ):
        resize_lora(model, {"0.mlp.experts.down_proj": 2})


def test_adapters_without_a_wrapper() -> None:
    bare = inject_adapter_in_model(LoraConfig(r=4, target_modules=["query"]), tiny_models.bert())
    changes = resize_lora(bare, {"encoder.layer.0.attention.self.query": 2})
    assert [c.new_rank for c in changes.values()] == [2]
    assert list(bare.peft_config["default"].rank_pattern.values()) == [2, 4]


def test_growth_is_random_as_in_peft_and_the_same_for_a_seed() -> None:
    def grown(seed: int, names: list[str], rank: int = 200) -> dict[str, torch.Tensor]:
        model = mixed()
        resize_lora(model, dict.fromkeys(names, rank), seed=seed)
        return {name: factors(layer)[0].detach() for name, layer in layers(model).items()}

    first, again, other = grown(1, MIXED), grown(1, MIXED[::-1]), grown(2, MIXED)
    assert all(torch.equal(first[name], again[name]) for name in MIXED)
    assert not any(torch.equal(first[name], other[name]) for name in MIXED[1:])
    for name, fan_in in (("kernel", 12), ("first", 7), ("last", 5)):
        rows = first[name][4:]
        assert rows.abs().max() <= fan_in**-0.5
        assert rows.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    assert not first["table"][4:].any()
    # Ranks that are appended in two calls with one seed must not be copies of each other.
    model = mixed()
    for rank in (5, 6):
        resize_lora(model, {"first": rank})
    rows = factors(layers(model)["first"])[0][4:]
    assert not torch.equal(rows[0], rows[1])


def test_new_columns_are_zero_and_given_directions_are_taken() -> None:
    model = mixed()
    directions = {
        "first": np.arange(21.0).reshape(3, 7),
        "table": torch.ones(2, 20),
        "kernel": np.ones((1, 12)),
    }
    resize_lora(model, {"first": 6, "table": 6, "kernel": 5}, directions=directions)
    for name, rows in directions.items():
        a, b = factors(layers(model)[name])
        np.testing.assert_array_equal(a[4:].detach().flatten(1), np.asarray(rows)[: len(a) - 4])
        assert not b[:, 4:].any()
    for bad in (np.ones((1, 7)), np.ones((2, 6)), np.ones(7)):
        with pytest.raises(ValueError, match="'first' needs an array of 2 or more rows of 7"):
            resize_lora(model, {"first": 8}, directions={"first": bad})
    with pytest.raises(lorank.NumericalError, match="'first': NaN"):
        resize_lora(model, {"first": 8}, directions={"first": np.full((2, 7), np.nan)})
    assert ranks(model)["first"] == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_keep_their_type_and_whether_they_are_trained(dtype: torch.dtype) -> None:
    model = mixed().to(dtype)
    layer = layers(model)["first"]
    layer.lora_A["default"].weight.requires_grad = False
    before = dense(model)["first"]
    objects = factors(layer)
    changes = resize_lora(model, {"first": 2, "last": 6})
    assert all(new is old for new, old in zip(factors(layer), objects, strict=True))
    assert [p.requires_grad for p in objects] == [False, True]
    assert all(p.dtype == dtype for other in layers(model).values() for p in factors(other))
    precision = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        dense(model)["first"], truncated(before, 2), atol=precision * np.linalg.norm(before)
    )
    assert changes["first"].dropped.dtype == np.float64


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_any_shape_and_any_deficiency(out: int, fan_in: int, old: int, new: int, seed: int) -> None:
    """Also more ranks than dimensions, zero factors and equal rows; what is kept stays trainable."""
    rng = np.random.default_rng(seed)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(fan_in, out).double()), LoraConfig(r=old, target_modules=["0"])
    )
    a, b = factors(layers(model)["0"])
    a.data = torch.from_numpy(rng.standard_normal((old, fan_in)) * rng.choice([0, 1, 1e-4, 1e4], (old, 1)))
    b.data = torch.from_numpy(rng.standard_normal((out, old)) * rng.choice([0, 1, 1e-3], (1, old)))
    if seed % 3 == 0:
        b.data.zero_()
    before = dense(model)["0"]
    change = resize_lora(model, {"0": new})["0"]
    after = dense(model)["0"]
    size = np.linalg.norm(before) + 1e-300
    np.testing.assert_allclose(after, truncated(before, new), atol=1e-12 * size)
    assert change.error == pytest.approx(np.linalg.norm(after - before), abs=1e-12 * size)
    if new != old and a.data.any() and len(change.dropped) == 0:
        # Every rank can learn: no row of A is zero where the column of B is.
        alive = (a.data.abs().sum(1) > 0) | (b.data.abs().sum(0) > 0)
        assert alive[old:].all() if new > old else alive.any()


OPTIMIZERS = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True, "foreach": False}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
]
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
MEANS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta"}


def step(model: Any, optimizer: Any, seed: int) -> None:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def linear() -> Any:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))
    return trained(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"])).double().train()


def basis(old: list[torch.Tensor], new: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By least squares: coefficients of values and of gradients, for A and for B with the rank first."""
    T_a = torch.linalg.lstsq(old[0].T, new[0].T).solution.T
    T_b = torch.linalg.lstsq(old[1], new[1]).solution
    return [(T_a, T_b.T), (T_b.T, T_a)]


def extended(key: str, value: torch.Tensor, axis: int, options: dict[str, Any]) -> torch.Tensor:
    """With two new ranks: averages of squares are as those of the others, Adagrad's sums at their start."""
    new = torch.zeros_like(value.narrow(axis, 0, 2))
    if key in MEANS:
        new += value.mean(axis, keepdim=True)
    elif key == "sum":
        new += options["initial_accumulator_value"]
    return torch.cat([value, new], axis)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_optimizer_goes_on_as_one_with_the_carried_state(kind: Any, options: dict[str, Any]) -> None:
    model = linear()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    grown, shrunk = factors(layers(model)["0"]), factors(layers(model)["2"])
    old = {p: (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in (*grown, *shrunk)}
    resize_lora(model, {"0": 6, "2": 2}, optimizer=optimizer)

    expected: dict[Any, dict[str, Any]] = {}
    for axis, p in enumerate(grown):
        expected[p] = {
            key: extended(key, value, axis, options) if getattr(value, "ndim", 0) else value
            for key, value in old[p][1].items()
        }
    maps = basis([old[p][0] for p in shrunk], [p.detach() for p in shrunk])
    for axis, (p, (of_values, of_gradients)) in enumerate(zip(shrunk, maps, strict=True)):
        expected[p] = {}
        for key, value in old[p][1].items():
            if not getattr(value, "ndim", 0):
                expected[p][key] = value
                continue
            T = of_gradients
            if key in SQUARES:
                T = T.square()
            elif key == "exp_inf":
                T = T.abs()
            elif key == "acc_delta":
                T = of_values.square()
            expected[p][key] = T @ value if axis == 0 else value @ T.T
    for p, state in expected.items():
        assert optimizer.state[p].keys() == state.keys()
        for key, value in state.items():
            if getattr(value, "ndim", 0):
                torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-8, atol=1e-12)
            else:
                assert optimizer.state[p][key] == value

    twin = copy.deepcopy(model)
    reference = kind([p for p in twin.parameters() if p.requires_grad], lr=0.01, **options)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(twin, reference, seed)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def steps_of_new_ranks(model: Any, optimizer: Any, old: int, count: int) -> tuple[list[float], list[float]]:
    """Root mean squares of the steps of B's new columns, and of its old ones."""
    found: tuple[list[float], list[float]] = ([], [])
    Bs = [factors(layer)[1] for layer in layers(model).values()]
    for seed in range(1000, 1000 + count):
        before = [b.detach().clone() for b in Bs]
        step(model, optimizer, seed)
        moves = [b.detach() - was for b, was in zip(Bs, before, strict=True)]
        for part, kept in zip(found, (slice(old, None), slice(old)), strict=True):
            part.append(float(torch.cat([move[:, kept].flatten() for move in moves]).square().mean().sqrt()))
    return found


@pytest.mark.parametrize(
    ("kind", "options", "rates"), [(torch.optim.AdamW, {}, 1.1), (torch.optim.RMSprop, {"alpha": 0.999}, 3)]
)
def test_new_ranks_step_as_far_as_old_ones(kind: Any, options: dict[str, Any], rates: float) -> None:
    """Adam counts on with the steps of the old ones, which makes up for no second moment any more."""
    model = linear()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)
    for seed in range(200):
        step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    reference = kind([p for p in twin.parameters() if p.requires_grad], lr=1e-3, **options)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resize_lora(model, {"0": 6, "2": 6}, optimizer=optimizer)
    for layer in layers(model).values():
        for axis, p in enumerate(factors(layer)):
            means = optimizer.state[p]["exp_avg_sq" if "exp_avg_sq" in optimizer.state[p] else "square_avg"]
            assert means.narrow(axis, 4, 2).min() > 0
    new, old = steps_of_new_ranks(model, optimizer, 4, 50)
    _, alone = steps_of_new_ranks(twin, reference, 4, 50)
    assert 1e-5 < max(new) <= rates * 1e-3
    assert max(new) < 1.5 * max(old)
    # The old ranks see what the new ones do to the loss, and nothing else.
    assert old[0] == pytest.approx(alone[0], rel=1e-9)
    assert old == pytest.approx(alone, rel=0.5)


def test_ranks_that_begin_anew_while_a_module_shrinks_are_new_ranks() -> None:
    """A module with more ranks than inputs has no more directions to keep."""
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 7).double()), LoraConfig(r=6, target_modules=["0"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(3):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)).double()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    resize_lora(model, {"0": 4}, optimizer=optimizer)
    for axis, p in enumerate(factors(layers(model)["0"])):
        first, second = (optimizer.state[p][key].movedim(axis, 0) for key in ("exp_avg", "exp_avg_sq"))
        assert not first[2:].any()
        torch.testing.assert_close(second[2:], second[:2].mean(0).expand(2, -1))


def test_first_moments_follow_gradients_exactly() -> None:
    """Without truncation error, a gradient taken before shrinking is the gradient after it."""
    model = linear()
    resize_lora(model, {"0": 6})
    x = torch.randn(6, 7).double()
    model(x).square().mean().backward()
    resize_lora(model, {"0": 4})
    carried = [p.grad.clone() for p in factors(layers(model)["0"])]
    model.zero_grad()
    model(x).square().mean().backward()
    for gradient, p in zip(carried, factors(layers(model)["0"]), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_passes_after_a_resize_with_the_last_loss_alive(checkpointing: bool) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=LLAMA)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen: list[torch.Size] = []
    p = factors(layers(model)["model.layers.0.self_attn.q_proj"])[0]
    p.register_post_accumulate_grad_hook(lambda q: seen.append(q.shape))
    shapes = []
    kept = []
    for rank in (4, 7, 2, 2, 5):
        resize_lora(model, {"0.self_attn.q_proj": rank, "1.mlp.down_proj": 9 - rank})
        shapes.append((rank, 32))
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()  # gradients accumulate over all ranks
        kept.append(loss)
        assert all(q.grad.shape == q.shape for q in model.parameters() if q.requires_grad)
    assert seen == [torch.Size(shape) for shape in shapes]
    # The last pass alone, against a model that never had another rank.
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(input_ids=IDS, labels=IDS).loss.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_gradient_scaler_goes_on() -> None:
    model = linear().float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for seed in range(6):
        if seed in (2, 4):
            resize_lora(model, {"0": 9 - seed, "2": seed - 1}, optimizer=optimizer)
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8192.0
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}


def test_scheduler_clipping_and_accelerates_wrapper_go_on() -> None:
    model = linear()
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # Of a Trainer on a GPU.
    optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(inner)
    assert optimizer is not inner
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
    before = [p.detach().clone() for p in factors(layers(model)["2"])]
    for seed in range(4):
        if seed == 2:
            resize_lora(model, {"0": 2, "2": 5}, optimizer=optimizer)
        step(model, optimizer, seed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.01 / 16)
    for old, p in zip(before, factors(layers(model)["2"]), strict=True):
        assert inner.state[p]["exp_avg"].shape == p.shape
        assert not torch.equal(p.flatten()[: old.numel()], old.flatten())
    inner.load_state_dict(inner.state_dict())


def snapshot(model: Any, optimizer: Any = None) -> tuple[Any, ...]:
    state = copy.deepcopy(optimizer.state_dict()["state"]) if optimizer else None
    config = model.peft_config["default"].to_dict()
    return {k: v.clone() for k, v in model.state_dict().items()}, repr(config), repr(state), ranks(model)


def assert_untouched(model: Any, before: tuple[Any, ...], optimizer: Any = None) -> None:
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert before[1:] == after[1:]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"q_proj": 3}, "ranks: 'q_proj' matches several adapted modules"),
        ({"0.self_attn.k_proj": 3}, "'0.self_attn.k_proj' matches no adapted module"),
        ({"0.self_attn.q_proj": 3, "model.layers.0.self_attn.q_proj": 3}, "two names match"),
        ({"0.self_attn.q_proj": 0}, "rank 0 is below 1, the smallest rank in PEFT"),
        ({"0.self_attn.q_proj": -1}, "rank -1"),
        ({"0.self_attn.q_proj": 2.5}, "must be an integer, not 2.5"),
        ({"0.self_attn.q_proj": True}, "must be an integer, not True"),
    ],
)
def test_what_is_wrong_with_ranks(wanted: dict[str, Any], message: str) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=LLAMA))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        resize_lora(model, {"1.mlp.up_proj": 2, **wanted})
    assert_untouched(model, before)


def test_names_of_checkpoints_and_of_peft_are_understood() -> None:
    model = trained(tiny_models.bert(), LoraConfig(r=4, target_modules=["query"]))
    changes = resize_lora(
        model,
        {
            "bert.encoder.layer.0.attention.self.query": 2,
            "base_model.model.encoder.layer.1.attention.self.query": np.int64(4),
        },
    )
    assert {name.split(".")[2]: (c.old_rank, c.new_rank) for name, c in changes.items()} == {
        "0": (4, 2),
        "1": (4, 4),
    }


def test_what_cannot_be_resized_is_refused_by_name_and_left_alone() -> None:
    def refused(
        model: Any, error: type[Exception], message: str, name: str = "first", **options: Any
    ) -> None:
        before = snapshot(model) if not hasattr(model, "_orig_mod") else None
        with pytest.raises(error, match=message):
            resize_lora(model, {"last": 3, name: 2}, **options)
        if before:
            assert_untouched(model, before)

    dora = get_peft_model(Mixed(), LoraConfig(r=4, target_modules=["first", "last"], use_dora=True))
    refused(dora, NotImplementedError, "'last' is a Dora.*, not plain LoRA")
    merged = mixed()
    merged.merge_adapter()
    refused(merged, ValueError, "'last': adapter 'default' is merged")
    refused(mixed(), ValueError, "no adapter 'other' in the model: it has default", adapter_name="other")
    pissa = get_peft_model(
        Mixed(), LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights="pissa")
    )
    refused(pissa, NotImplementedError, "initialised by 'pissa', which derives the base model")
    odd = get_peft_model(
        Mixed(), LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights="orthogonal")
    )
    refused(odd, ValueError, "PEFT loads even ranks only")
    broken = mixed()
    factors(layers(broken)["first"])[0].data[0, 0] = torch.nan
    with pytest.raises(lorank.NumericalError, match="'first': its factors hold NaN"):
        resize_lora(broken, {"last": 6, "first": 2})
    assert set(ranks(broken).values()) == {4}
    refused(torch.compile(mixed()), NotImplementedError, "wrapped in OptimizedModule")
    with pytest.raises(ValueError, match=r"pass model\.module"):
        resize_lora(torch.nn.DataParallel(mixed()), {"first": 2})
    with pytest.raises(ValueError, match="it has none"):
        resize_lora(Mixed(), {"first": 2})
    empty = mixed()
    factors(layers(empty)["first"])[0].data = torch.empty(0)
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        resize_lora(empty, {"first": 2})

    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1, groups=2))
    grouped = get_peft_model(grouped, LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="'0' is a convolution in 2 groups"):
        resize_lora(grouped, {"0": 2})
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    attention = get_peft_model(attention, LoraConfig(r=4, target_modules=["0"]))
    for name in ("0", "out_proj"):
        with pytest.raises(NotImplementedError, match=r"belongs to a torch\.nn\.MultiheadAttention"):
            resize_lora(attention, {name: 2})
    ada = get_peft_model(Mixed(), AdaLoraConfig(target_modules=["first"], total_step=10))
    with pytest.raises(NotImplementedError, match="adapter 'default' is ADALORA"):
        resize_lora(ada, {"first": 2})


def test_tied_adapters_are_refused() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(tiny_models.llama_tied(), config)
    with pytest.raises(NotImplementedError, match=r"embed_tokens and lm_head share their factors"):
        resize_lora(model, {"embed_tokens": 2})


class Strange(torch.optim.SGD):
    """Remembers something of the parameter's shape whose meaning is its own."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["curvature"] = torch.ones_like(p)
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: transformers.Adafactor(ps), r"'exp_avg_sq_row' of Adafactor cannot be carried over"),
        (lambda ps: torch.optim.Adafactor(ps), r"'row_var' of Adafactor cannot be carried over"),
        (lambda ps: Strange(ps, lr=0.1), r"module '0': the state 'curvature' of Strange"),
    ],
)
def test_state_that_cannot_be_carried_over_is_refused(make: Any, message: str) -> None:
    model = linear()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    resize_lora(model, {"0": 5}, optimizer=optimizer)  # before the first step there is nothing to carry
    step(model, optimizer, 0)
    before = snapshot(model, optimizer)
    with pytest.raises(NotImplementedError, match=message):
        resize_lora(model, {"0": 3}, optimizer=optimizer)
    assert_untouched(model, before, optimizer)


def test_8_bit_state_is_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = linear().float()
    optimizer = bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad])
    for p in factors(layers(model)["0"]):
        optimizer.state[p] = {"step": 1, "state1": torch.zeros(p.shape, dtype=torch.uint8)}
    with pytest.raises(NotImplementedError, match="'state1' of AdamW8bit"):
        resize_lora(model, {"0": 3}, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "fp8"])
def test_state_of_fewer_bits_is_refused_before_anything_changes(kind: str) -> None:
    """It has the shape of the factors, and a known name, but cannot be cut along an axis."""
    states = pytest.importorskip("torchao.optim.subclass_" + kind)
    zeros = getattr(states, f"OptimState{kind.capitalize()}").zeros
    model = trained(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=4, target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in factors(layers(model)["0"]):
        optimizer.state[p] = {"step": torch.tensor(1.0)} | {
            key: zeros(p.shape, *((key == "exp_avg",) if kind != "fp8" else ()), 64)
            for key in ("exp_avg", "exp_avg_sq")
        }
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="the state 'exp_avg' of AdamW cannot be carried over"):
        resize_lora(model, {"0": 6}, optimizer=optimizer)
    assert_untouched(model, before)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = linear()
    optimizer = torch.optim.SGD([p for p in linear().parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="module '2': SGD does not hold its factors"):
        resize_lora(model, {"2": 2}, optimizer=optimizer)
    lbfgs = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(NotImplementedError, match="LBFGS keeps all parameters in one vector"):
        resize_lora(model, {"2": 2}, optimizer=lbfgs)


def test_four_bit_layers() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    model = trained(base, LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(3, 64)
    before, update = output(model, x), dense(model)["0"]
    resize_lora(model, {"0": 6})
    torch.testing.assert_close(output(model, x), before, rtol=0, atol=1e-6)
    resize_lora(model, {"0": 2})
    np.testing.assert_allclose(dense(model)["0"], truncated(update, 2), atol=1e-6)
    model(x).sum().backward()


def test_a_scaling_that_was_changed_for_a_while_stays_and_is_not_saved() -> None:
    model = mixed()
    layer = layers(model)["first"]
    layer.set_scale("default", 0.5)
    resize_lora(model, {"first": 2})
    assert layer.scaling["default"] == 0.75
    assert layer.lora_alpha["default"] == 3
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.5


def test_other_adapters_stay_as_they_are() -> None:
    model = mixed()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    other = copy.deepcopy(layers(model)["first"].lora_A["other"].state_dict())
    resize_lora(model, {"first": 2})
    assert layers(model)["first"].r == {"default": 2, "other": 3}
    assert torch.equal(layers(model)["first"].lora_A["other"].weight, other["weight"])
    assert model.peft_config["other"].rank_pattern == {}
    resize_lora(model, {"first": 5}, adapter_name="other")
    assert layers(model)["first"].r == {"default": 2, "other": 5}
    assert model.peft_config["other"].r == 5


class Dataset(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(i, i + 8) % 64
        return {"input_ids": ids, "labels": ids}


RESIZED = {"0.self_attn.q_proj": 7, "0.mlp.up_proj": 1, "1.mlp.up_proj": 2}


class Resizing(transformers.TrainerCallback):
    """Changes ranks after the third step."""

    def on_step_end(self, _: Any, state: Any, *__: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            resize_lora(kwargs["model"], RESIZED, optimizer=kwargs["optimizer"])


def adapted_llama(**settings: Any) -> Any:
    torch.manual_seed(1)
    base = tiny_models.llama()
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA, **settings))


def trainer(model: Any, folder: Path, callbacks: list[Any]) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return transformers.Trainer(model, arguments, train_dataset=Dataset(), callbacks=callbacks)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_resumed_training_ends_with_the_weights_of_one_that_never_stopped(
    tmp_path: Path, rank_stabilized: bool
) -> None:
    model = adapted_llama(use_rslora=rank_stabilized)
    trainer(model, tmp_path / "whole", [Resizing()]).train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"

    resumed = adapted_llama(use_rslora=rank_stabilized)
    changes = restore_ranks(resumed, checkpoint)
    assert {c.new_rank for c in changes.values()} == {1, 2, 4, 7}
    assert ranks(resumed) == ranks(model)
    assert scalings(resumed) == pytest.approx(scalings(model), rel=1e-15)
    config, expected = (m.peft_config["default"].to_dict() for m in (resumed, model))
    assert {k: v for k, v in config.items() if "target" not in k} == {
        k: v for k, v in expected.items() if "target" not in k
    }
    trainer(resumed, tmp_path / "resumed", []).train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = adapted_llama()
    assert not torch.equal(output(fresh), output(model))


def test_scalings_of_another_kind_of_config_are_restored(tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=2, lora_alpha=3, target_modules=LLAMA, use_rslora=True))
    resize_lora(model, RESIZED)
    model.save_pretrained(tmp_path)
    other = adapted_llama()
    restore_ranks(other, tmp_path)
    other.load_adapter(tmp_path, "default")
    assert scalings(other) == pytest.approx(scalings(model), rel=1e-14)
    assert other.peft_config["default"].use_rslora is False
    torch.testing.assert_close(output(other), output(model))
    again = saved_and_loaded(other, tiny_models.llama(), tmp_path / "again")
    torch.testing.assert_close(output(again), output(model))


def test_an_adapter_in_a_subfolder_of_its_name(tmp_path: Path) -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=LLAMA))
    model.add_adapter("second", LoraConfig(r=3, target_modules=LLAMA))
    resize_lora(model, {"0.mlp.up_proj": 6}, adapter_name="second")
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(tiny_models.llama(), LoraConfig(r=3, target_modules=LLAMA), adapter_name="second")
    changes = restore_ranks(fresh, tmp_path, adapter_name="second")
    assert changes["model.layers.0.mlp.up_proj"].new_rank == 6


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = adapted_llama()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        restore_ranks(model, tmp_path / "none")
    with pytest.raises(lorank.FormatError, match=r"holds no adapter_config\.json"):
        restore_ranks(model, tmp_path)
    trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["k_proj"])).save_pretrained(tmp_path / "k")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"module 'model.layers.0.self_attn.k_proj' of the checkpoint is not adapted"
    ):
        restore_ranks(model, tmp_path / "k")
    trained(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="holds no factors of 6 adapted modules, such as 'model"):
        restore_ranks(model, tmp_path / "q")
    assert_untouched(model, before)


def train_together(process: int, folder: str) -> None:
    """One of two processes; each sees half of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=process, world_size=2)
    model = linear()
    static = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
    with pytest.raises(NotImplementedError, match="or a static graph, which depend on the shapes"):
        resize_lora(model, {"0": 6})
    del static
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel: pass model\.module"):
        resize_lora(wrapped, {"0": 6})
    train_with_resizes(model, lambda x: wrapped(x[process::2]))
    torch.save(model.state_dict(), f"{folder}/{process}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_with_resizes(model: Any, forward: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for i in range(6):
        if i in (2, 4):
            wanted = {"0": 6, "2": 2} if i == 2 else {"0": 3}
            resize_lora(model, wanted, optimizer=optimizer)
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(i)).double()
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()


def test_processes_that_train_together_go_on_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_together, (str(tmp_path),), nprocs=2)
    alone = linear()
    train_with_resizes(alone, alone)
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    for name, expected in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-7, atol=1e-9)
