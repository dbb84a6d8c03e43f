"""Every runtime's rules: its formula for the scale, what it refuses, and what it loses in silence.

Read from their sources, as of October 2026.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lorank.adapters.module import LoraModule
from lorank.adapters.peft_format import without_magnitude
from lorank.runtimes.found import BASE_COPY, Found

# Below this LoRAX pads ranks, and forgets the true one after the first type of modules.
_LORAX_LEAST_RANK = 8

# Copies of base weights that vLLM expects beside the factors of embeddings and heads.
_VLLM_PASSES_OVER = tuple(f".{name}{BASE_COPY}" for name in ("embed_tokens", "lm_head"))

# Where TensorRT-LLM looks for factors, and what it passes over elsewhere.
_IN_A_BLOCK = re.compile(r".+\.\d+\.\w+(?:\.\w+){1,3}")
_ENDS_OF_MODELS = ("lm_head", "embed_tokens")


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime's rules.

    Attributes
    ----------
    name
        Its name and version.
    scale
        What it multiplies a module's update by; 0 if it leaves the module out.
    refuses
        Why it does not load the adapter, or nothing.
    loses
        What it silently leaves out of what it loads.
    remark
        What to know although all is right.
    """

    name: str
    scale: Callable[[Found, LoraModule], float]
    refuses: Callable[[Found], str]
    loses: Callable[[Found], Iterable[str]]
    remark: Callable[[Found], str] = lambda _: ""


def _global_scale(a: Found, module: LoraModule) -> float:
    del module
    return a.alpha / a.rank


def _global_or_stabilized(a: Found, module: LoraModule) -> float:
    del module
    return a.alpha / (math.sqrt(a.rank) if a.rank_stabilized else a.rank)


def _peft_scale(a: Found, module: LoraModule) -> float:
    return 0.0 if module.name in a.unselected else module.scaling


def _module_scale(a: Found, module: LoraModule) -> float:
    del a
    return module.scaling


def _llama_cpp_scale(a: Found, module: LoraModule) -> float:
    return a.alpha / module.rank


def _tensorrt_scale(a: Found, module: LoraModule) -> float:
    if not _IN_A_BLOCK.fullmatch(module.name):
        return 0.0
    return a.alpha / (math.sqrt(module.rank) if a.rank_stabilized else module.rank)


def _lorax_scale(a: Found, module: LoraModule) -> float:
    # AdaLoRA's factors have other names than it looks for.
    return 0.0 if a.adalora else _global_or_stabilized(a, module)


def _peft_refuses(a: Found) -> str:
    if misfits := a.misfits():
        module, rank = misfits[0]
        return f"sizes do not match: {module.name} has rank {module.rank}, but the settings say {rank}"
    return ""


def _peft_loses(a: Found) -> Iterable[str]:
    if unselected := a.unselected:
        yield (
            f"adapts {len(a.modules) - len(unselected)} of {len(a.modules)} modules: target_modules leaves "
            f"out {unselected[0]}"
        )
    if without := without_magnitude(a.config, a.adapter.carried, a.adapter.modules):
        yield f"starts the DoRA magnitudes of {len(without)} modules anew, as the file lacks them"


def _hotswap_refuses(a: Found) -> str:
    if a.adalora:
        return "AdaLoRA cannot be swapped in"
    if a.config.get("alpha_pattern"):
        return "alpha_pattern must equal that of the adapter it replaces: only the portable profile is safe"
    if embeddings := a.of_kinds("embedding"):
        return f"{embeddings[0].name} is an embedding"
    if a.dora:
        return "DoRA magnitudes are not swapped"
    return _no_others(a)


def _hotswap_remark(a: Found) -> str:
    return (
        "if the adapter that it replaces adapts the same modules with "
        f"use_rslora={a.rank_stabilized}, use_dora=False and lora_dropout="
        f"{a.config.get('lora_dropout') or 0.0}"
    )


def _vllm_refuses(a: Found) -> str:
    if a.adalora:
        return "AdaLoRA's tensors (lora_E) have no names that it knows"
    if a.dora:
        return "DoRA is not supported"
    if a.config.get("modules_to_save"):
        return f"modules_to_save is not supported: {', '.join(a.config['modules_to_save'])}"
    if (bias := a.config.get("bias") or "none") != "none":
        return f"bias={bias!r} is not supported"
    return _no_lora_biases(a) or _no_others(a, but=lambda key: key.endswith(_VLLM_PASSES_OVER))


def _sglang_refuses(a: Found) -> str:
    if a.adalora:
        return "AdaLoRA is not supported"
    if isinstance(a.config.get("target_modules"), str):
        return "target_modules is a regular expression: it wants a list"
    if mixed := a.of_another_rank():
        return f"{len(mixed)} modules have another rank than r = {a.rank:g}, the first is {mixed[0].name}"
    if incomplete := a.incomplete_attention():
        return f"wants q_proj, k_proj and v_proj together: {incomplete} lacks one"
    return _plain_only(a)


def _lorax_refuses(a: Found) -> str:
    ranks = sorted({module.rank for module in a.modules})
    if len(ranks) > 1:
        return f"stacks layers, which need one rank: ranks go from {ranks[0]} to {ranks[-1]}"
    return _plain_only(a)


def _lorax_loses(a: Found) -> Iterable[str]:
    if a.adalora:
        yield "adapts nothing, as AdaLoRA's tensors have other names than it looks for"
        return
    if missing := a.incomplete_types():
        yield f"drops {missing[0]} everywhere, as some layers have no adapter there"
    yield from _leaves_out([*a.others, *a.lora_biases])


def _lorax_remark(a: Found) -> str:
    counts = {len(numbers) for kinds in a.blocks().values() for numbers in kinds.values()}
    remarks = [f"if the model has {max(counts)} blocks and no more"] if counts else []
    if a.rank < _LORAX_LEAST_RANK:
        remarks.append(
            f"on GPUs it pads ranks to {_LORAX_LEAST_RANK}, and then divides by that in all but the first "
            "type of modules"
        )
    return "; ".join(remarks)


def _llama_cpp_refuses(a: Found) -> str:
    if a.adalora:
        return "its converter stops at AdaLoRA's tensors (lora_E)"
    if a.dora:
        return "DoRA is not supported"
    if other := a.of_kinds("conv", "expert"):
        return f"{other[0].name} is no plain linear layer ({other[0].kind})"
    return _no_lora_biases(a) or _no_others(a, but=_norms_and_bases)


def _llama_cpp_loses(a: Found) -> Iterable[str]:
    return _leaves_out(a.others)


def _norms_and_bases(key: str) -> bool:
    """Tensors that the converter passes on, and the program does not apply; or that it leaves alone."""
    return "_layernorm" in key or ".norm" in key or BASE_COPY in key


def _tensorrt_refuses(a: Found) -> str:
    if a.adalora:
        return "AdaLoRA's tensors (lora_E) have no names that it knows"
    if a.dora:
        return "DoRA is not supported"
    if other := a.of_kinds("conv", "expert"):
        return f"{other[0].name} is no plain linear layer ({other[0].kind})"
    outside = [m.name for m in a.modules if not _IN_A_BLOCK.fullmatch(m.name) and not _at_an_end(m.name)]
    if outside:
        return f"{outside[0]} is in no numbered block"
    return _no_lora_biases(a) or _no_others(a, but=_at_an_end)


def _tensorrt_loses(a: Found) -> Iterable[str]:
    passed_over = [m.name for m in a.modules if not _IN_A_BLOCK.fullmatch(m.name)]
    return _leaves_out([*passed_over, *a.others])


def _at_an_end(key: str) -> bool:
    return any(end in key for end in _ENDS_OF_MODELS)


def _plain_only(a: Found) -> str:
    if other := a.of_kinds("conv", "embedding", "expert"):
        return f"{other[0].name} is no plain linear layer ({other[0].kind})"
    return "DoRA is not supported" if a.dora else ""


def _no_lora_biases(a: Found) -> str:
    return f"lora_bias is not supported: {a.lora_biases[0]}" if a.lora_biases else ""


def _no_others(a: Found, but: Callable[[str], bool] = lambda _: False) -> str:
    others = [key for key in (*a.others, *a.base_copies) if not but(key)]
    return f"takes nothing but factors, and there are {len(others)} others: {others[0]}" if others else ""


def _others_lost(a: Found) -> Iterable[str]:
    return _leaves_out([*a.others, *a.lora_biases])


def _leaves_out(keys: Iterable[str]) -> Iterable[str]:
    if left := list(keys):
        yield f"leaves out {len(left)} trained tensors, such as {left[0]}"


def _nothing(a: Found) -> Iterable[str]:
    del a
    return ()


RUNTIMES: dict[str, Runtime] = {
    "peft": Runtime("PEFT 0.21", _peft_scale, _peft_refuses, _peft_loses),
    "peft-hotswap": Runtime(
        "PEFT hotswap_adapter", _global_or_stabilized, _hotswap_refuses, _nothing, _hotswap_remark
    ),
    "vllm": Runtime("vLLM 0.32 and later", _module_scale, _vllm_refuses, _nothing),
    "vllm-old": Runtime("vLLM up to 0.31", _global_or_stabilized, _vllm_refuses, _nothing),
    "sglang": Runtime("SGLang 0.5", _global_scale, _sglang_refuses, _others_lost),
    "lorax": Runtime("LoRAX", _lorax_scale, _lorax_refuses, _lorax_loses, _lorax_remark),
    "llama.cpp": Runtime("llama.cpp", _llama_cpp_scale, _llama_cpp_refuses, _llama_cpp_loses),
    "tensorrt-llm": Runtime("TensorRT-LLM", _tensorrt_scale, _tensorrt_refuses, _tensorrt_loses),
}
