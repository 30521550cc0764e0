"""The file format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

PEFT sees the published GPT-2, in which query, key and value are one matrix. Their adapters become
one there that computes the same: the As on top of each other, the Bs on a diagonal. A head that was
trained along is saved with them.
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

# Settings that PEFT's config may have, and their values for plain LoRA.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False}
# Settings of later versions of PEFT. Not written: earlier versions do not know them.
UNSET = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initializations that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change
# its weights too, and their A and B are wrong on the published ones.
PLAIN_INITS = ("none", "true", "false", "gaussian", "orthogonal", "eva")
