"""Mistral 7B v0.1 (every layer slides), v0.3 (none does) and Nemo (head_dim of its own)."""

from __future__ import annotations

from modeling.config import Fields, ModelConfig, decoder_config
from modeling.tokenizer_classes import PLAIN, BuiltClass, UsualClass


def mistral(fields: Fields) -> ModelConfig:
    """config.json of model_type "mistral". An absent `sliding_window` means 4096, a null one means none."""
    layers = fields.integer("num_hidden_layers")
    return decoder_config(
        fields,
        family="mistral",
        bos_token_id=1,
        eos_token_ids=(2,),
        windows=(fields.window(default=4096),) * layers,
    )


MODEL_TYPES = {"mistral": ("MistralForCausalLM", mistral)}
TOKENIZERS: tuple[BuiltClass, ...] = ()
USUAL_TOKENIZERS = {"mistral": UsualClass(PLAIN, always=True)}
PRE_TOKENIZER_MEND = "fix_mistral_regex"  # of tokenizer_config.json: transformers is to change the pre-tokenizer
