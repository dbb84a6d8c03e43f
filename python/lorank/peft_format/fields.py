"""Fields of PEFT's `LoraConfig`: defaults of the fields that decide ranks, and fields for training only."""

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8

DEFAULT_INITIAL_RANK = 12
"""The default of AdaLoRA's `init_r`."""

ONLY_FOR_TRAINING = (
    "arrow_config",
    "beta1",
    "beta2",
    "corda_config",
    "deltaT",
    "eva_config",
    "init_r",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "monteclora_config",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
)
"""Fields that would be meaningless or wrong in a trained adapter that is written again."""
