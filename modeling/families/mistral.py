"""Mistral 7B v0.1 (every layer slides), v0.3 (none does), Nemo (head_dim of its own), and layers of both types."""

from __future__ import annotations

from modeling.config import ModelConfig, Sizes, decoder_config, read_shape
from modeling.fields import Fields
from modeling.text.classes import PLAIN, BuiltClass, UsualClass

SIZES = Sizes(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_positions=131_072,
)


def mistral(fields: Fields) -> ModelConfig:
    """config.json of model_type "mistral". An absent `sliding_window` means 4096, a null one means none.

    With `layer_types` transformers runs the file as Ministral: only the layers that are named sliding slide.
    """
    shape = read_shape(fields, SIZES)
    window = fields.window(default=4096)
    return decoder_config(
        fields,
        shape,
        family="mistral",
        bos_token_id=1,
        eos_token_ids=(2,),
        windows=fields.layer_windows(shape.num_layers, window, lambda layer: window is not None),
    )


MODEL_TYPES = {"mistral": ("MistralForCausalLM", mistral)}
TOKENIZERS: tuple[BuiltClass, ...] = ()
USUAL_TOKENIZERS = {"mistral": UsualClass(PLAIN, always=True)}
PRE_TOKENIZER_MEND = "fix_mistral_regex"  # of tokenizer_config.json: transformers is to change the pre-tokenizer
