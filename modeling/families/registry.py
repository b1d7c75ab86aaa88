"""From a folder's config.json to a ModelConfig: the one place where families are looked up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modeling.config import ModelConfig, read_json
from modeling.errors import ConfigError
from modeling.families import gemma, llama, mistral, qwen2
from modeling.fields import Fields, shown
from modeling.text.classes import SHARED_CLASSES, BuiltClass, UsualClass

# model_type -> (architecture, translation)
FAMILIES: dict[str, tuple[str, Callable[[Fields], ModelConfig]]] = {
    model_type: entry for module in (llama, mistral, gemma, qwen2) for model_type, entry in module.MODEL_TYPES.items()
}
TOKENIZERS: dict[str, BuiltClass] = {
    built.name: built
    for classes in (llama.TOKENIZERS, mistral.TOKENIZERS, gemma.TOKENIZERS, qwen2.TOKENIZERS, SHARED_CLASSES)
    for built in classes
}
# model_type -> class
USUAL_TOKENIZERS: dict[str, UsualClass] = {
    model_type: usual
    for module in (llama, mistral, gemma, qwen2)
    for model_type, usual in module.USUAL_TOKENIZERS.items()
}
# Keys of tokenizer_config.json that have transformers change the pre-tokenizer of large vocabularies.
PRE_TOKENIZER_MENDS: tuple[str, ...] = (mistral.PRE_TOKENIZER_MEND,)


def config_from_dict(raw: Mapping[str, Any], place: str = "config.json") -> ModelConfig:
    """Translate a parsed config.json. The family is its `model_type`, or its `architectures` where that is absent.

    Raises ConfigError, naming `place`, for an unknown family, an architecture that is no causal language model, an
    unknown rope type, activation or layer type, and for missing or contradictory values.
    """
    fields = Fields(raw, place)
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise fields.refuse(f"'architectures' is {shown(architectures)}; it must be a list")
    model_type = fields.text("model_type")
    if model_type is None:
        model_type = next((name for name, (arch, _) in FAMILIES.items() if arch in architectures), None)
    if model_type not in FAMILIES:
        what = (
            f"model_type {shown(model_type)}"
            if model_type
            else f"no model_type, and architectures {shown(architectures)}"
        )
        raise fields.refuse(f"{what} is not a known family; known are {', '.join(FAMILIES)}")
    architecture, translate = FAMILIES[model_type]
    if architectures and architecture not in architectures:
        raise fields.refuse(
            f"architecture {shown(architectures[0])} is not supported for {model_type!r}; need {architecture}"
        )
    return translate(fields)


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig of a checkpoint folder. EOS ids of generation_config.json, where given, override config.json's.

    A null there means that nothing ends an answer; where the key is absent, config.json's ids hold (transformers' generate
    would know no end at all).

    Raises ConfigError as config_from_dict does, and when there is no readable config.json.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no config.json; give the folder of a Hugging Face checkpoint")
    config = config_from_dict(read_json(path), str(path))
    generation = folder / "generation_config.json"
    if generation.is_file():
        fields = Fields(read_json(generation), str(generation))
        config = dataclasses.replace(config, eos_token_ids=fields.token_ids("eos_token_id", config.eos_token_ids))
    return config
