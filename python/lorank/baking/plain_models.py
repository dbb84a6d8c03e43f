"""Architectures whose checkpoints transformers loads without changes of names or values of linear layers."""

PLAIN_MODELS = frozenset(
    {
        "bert",
        "bloom",
        "codegen",
        "cohere",
        "distilbert",
        "electra",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mpt",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "roberta",
        "smollm3",
        "stablelm",
        "starcoder2",
        "t5",
        "xlm-roberta",
    }
)
"""Values of `model_type`. A stored weight with the name of a module in the loaded model is that module's."""
