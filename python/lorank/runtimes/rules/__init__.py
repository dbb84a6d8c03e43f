"""The rules of every runtime, read from its source or found by running it: one file per runtime or family."""

from lorank.runtimes.rules.exllamav3 import EXLLAMAV3
from lorank.runtimes.rules.image import COMFYUI, DIFFUSERS
from lorank.runtimes.rules.llama_cpp import LLAMA_CPP, OLLAMA
from lorank.runtimes.rules.lmdeploy import LMDEPLOY
from lorank.runtimes.rules.lorax import LORAX, TGI
from lorank.runtimes.rules.mlx_lm import MLX_LM
from lorank.runtimes.rules.peft import HOTSWAP, PEFT, TRANSFORMERS, UNSLOTH
from lorank.runtimes.rules.runtime import Runtime
from lorank.runtimes.rules.sglang import SGLANG
from lorank.runtimes.rules.tensorrt_llm import TENSORRT_LLM
from lorank.runtimes.rules.vllm import APHRODITE, VLLM, VLLM_OLD

__all__ = ["RUNTIMES", "Runtime"]

RUNTIMES: dict[str, Runtime] = {
    "peft": PEFT,
    "peft-hotswap": HOTSWAP,
    "transformers": TRANSFORMERS,
    "unsloth": UNSLOTH,
    "vllm": VLLM,
    "vllm-old": VLLM_OLD,
    "aphrodite": APHRODITE,
    "sglang": SGLANG,
    "lorax": LORAX,
    "tgi": TGI,
    "llama.cpp": LLAMA_CPP,
    "ollama": OLLAMA,
    "tensorrt-llm": TENSORRT_LLM,
    "lmdeploy": LMDEPLOY,
    "exllamav3": EXLLAMAV3,
    "mlx-lm": MLX_LM,
    "diffusers": DIFFUSERS,
    "comfyui": COMFYUI,
}
