"""The file format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors (of
earlier versions adapter_model.bin).

PEFT sees the published GPT-2, in which query, key and value are one matrix. Their adapters become
one there that computes the same: the As on top of each other, the Bs on a diagonal. A head that was
trained along is saved with them, under the name that it has in `transformers`.
"""

import re

from gpt2mini.checkpoints.names import BLOCK
from gpt2mini.checkpoints.stored import ADAPTER_FILES

CONFIG, WEIGHTS, WEIGHTS_BIN = ADAPTER_FILES
PREFIX = "base_model.model."
TENSOR_NAME = re.compile(r"(?:transformer\.)?h\.(\d+)\.(.+)\.lora_([AB])\.weight")

# Published linear layers and ours: `attn.c_attn` -> query, key and value.
PUBLISHED_LAYERS = {
    rule.published.removesuffix(".weight"): [name.removesuffix(".weight") for name in rule.ours]
    for rule in BLOCK
    if rule.transposed
}

CLASS_HEAD, TOKEN_HEAD = "score", "lm_head"
TASKS = {CLASS_HEAD: "SEQ_CLS", TOKEN_HEAD: "CAUSAL_LM"}

# Settings that PEFT's config may have, and their values for plain LoRA.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False}
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8  # where its config does not say
OBEYED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "init_lora_weights"),
}
# What says how an adapter came about, or where: its tensors say the rest. Every other setting, such
# as one of a later version of PEFT, is refused where it is set.
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
# Initializations that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change
# its weights too, and their A and B are wrong on the published ones.
PLAIN_INITS = ("none", "true", "false", "gaussian", "orthogonal", "eva")
