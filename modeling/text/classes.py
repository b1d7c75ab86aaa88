"""The tokenizer classes that transformers 5 puts together itself, taking of tokenizer.json's model only vocabulary and merges.

AutoTokenizer chooses the class by `tokenizer_class` and the model's type (here as of transformers 5.24). Most folders get the
plain one, which follows tokenizer.json. Families say in their files which others theirs have; the rest are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modeling.errors import TokenizerError

PLAIN = "TokenizersBackend"
PLAIN_NAMES = (PLAIN, "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer")  # each also with "Fast" behind
TO_FOLLOW = f'to have tokenizer.json followed as it is, write "tokenizer_class": "{PLAIN}" into tokenizer_config.json'
SPACE = "▁"  # SentencePiece's
# Settings of a BPE model.
BY_BYTES = {"fuse_unk": True, "byte_fallback": True}
BY_LETTERS = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}

Settings = Mapping[str, Any]
Pipeline = tuple[Any, Any, Any]  # normalizer, pre-tokenizer, decoder


@dataclass(frozen=True)
class BuiltClass:
    """How a class builds its tokenizer.

    Attributes:
        name: without "Fast" behind.
        pipeline: from settings to normalizer, pre-tokenizer and decoder.
        model: settings of the BPE model.
        tokens: special tokens where no file names them, by name; with None there is none, whatever tokenizer.json pads with.
        extra: more special tokens, without a name.
        knows_unk: the model itself knows the unknown token.
        bos: a BOS precedes every text, whatever tokenizer.json's post-processor says.
        not_for_bytes: where tokenizer.json mentions ByteLevel it is followed as it is.
        plain_special: special tokens lose what tokenizer.json says of the spaces around them.
    """

    name: str
    pipeline: Callable[[Settings], Pipeline]
    model: Settings
    tokens: Mapping[str, str | None]
    extra: tuple[str, ...] = ()
    knows_unk: bool = False
    bos: bool = False
    not_for_bytes: bool = False
    plain_special: bool = False


@dataclass(frozen=True)
class UsualClass:
    """The class of a type of model where its folder names none; with `always`, whatever it names."""

    name: str
    always: bool = False


def class_of(
    declared: Any,
    config: Settings,
    byte_level: bool,
    remote: bool,
    place: str,
    built: Mapping[str, BuiltClass],
    usual_classes: Mapping[str, UsualClass],
) -> str:
    """The name of the class that AutoTokenizer takes: PLAIN, or one of `built`.

    Args:
        declared: `tokenizer_class` of tokenizer_config.json, None where it has none.
        config: config.json.
        byte_level: tokenizer.json mentions ByteLevel.
        remote: the folder brings code of its own, which is never run.
        usual_classes: by `model_type`.
    Raises:
        TokenizerError: the class is one that we do not know.
    """
    of_config, kind = config.get("tokenizer_class"), config.get("model_type")
    for name in (declared, of_config):
        if name is not None and not isinstance(name, str):
            raise TokenizerError(f"{place}: 'tokenizer_class' is {name!r}; it must be a string")
    usual = usual_classes.get(kind) if isinstance(kind, str) else None
    hinted = (declared or of_config or "").removesuffix("Fast")
    if hinted and not remote:
        always = usual is not None and usual.always
        if byte_level and not always and hinted in built and built[hinted].not_for_bytes:
            return PLAIN
        if usual is not None and hinted != usual.name:
            return usual.name if always else _known(hinted, place, built)
    if hinted and declared != "":
        return _known(hinted, place, built)
    return PLAIN if usual is None or declared == "" else usual.name


def _known(name: str, place: str, built: Mapping[str, BuiltClass]) -> str:
    if name in PLAIN_NAMES:
        return PLAIN
    if name not in built:
        raise TokenizerError(f"{place}: tokenizer_class {name!r} is not known (known: {', '.join(built)}); {TO_FOLLOW}")
    return name


def rebuilt(tokenizer: Tokenizer, built: BuiltClass, settings: Settings, place: str) -> Tokenizer:
    """A tokenizer of that class with the vocabulary and the post-processor of another; it has no added tokens yet.

    Args:
        settings: what the side files say, with the class's own special tokens where they say nothing.
    """
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        raise TokenizerError(
            f"{place}: tokenizer_class {built.name!r} needs a BPE model, and tokenizer.json has {type(model).__name__}; "
            f"{TO_FOLLOW}"
        )
    unk = str(settings["unk_token"]) if built.knows_unk else None
    made = Tokenizer(_with_settings(model, {**built.model, "unk_token": unk}))
    normalizer, pre_tokenizer, decoder = built.pipeline(settings)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoder
    if tokenizer.post_processor is not None:
        made.post_processor = tokenizer.post_processor
    return made


def _with_settings(model: models.BPE, changes: Settings) -> models.BPE:
    """The same vocabulary and merges under other settings; as not all of them can be set, the model's JSON is changed."""
    wanted = {
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **changes,
    }
    if all(getattr(model, name) == value for name, value in wanted.items()):
        return model  # without its JSON, which takes seconds for a large vocabulary
    state = model.__getstate__()
    at = state.index(b'"vocab":')
    wanted = {**json.loads(state[:at].rstrip(b", ") + b"}"), **wanted}
    other = models.BPE()
    other.__setstate__(json.dumps(wanted).encode()[:-1] + b", " + state[at:])
    return other


def spaced(settings: Settings, default: bool) -> bool:
    """Whether a text gets a space before it."""
    given = settings.get("add_prefix_space")
    return default if given is None else bool(given)


def sentencepiece_words(scheme: str) -> Any:
    """No words but a text as a whole, its spaces spelled as SentencePiece does. `scheme`: when one is put before it."""
    return pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)


def sentencepiece_decoder(strips: bool) -> Any:
    """`strips`: a first space is dropped."""
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)] if strips else parts)


def _byte_level(settings: Settings) -> Pipeline:
    return None, pre_tokenizers.ByteLevel(add_prefix_space=spaced(settings, False)), decoders.ByteLevel()


END_OF_TEXT = "<|endoftext|>"
SHARED_CLASSES = (
    BuiltClass(
        "GPT2Tokenizer",
        _byte_level,
        BY_LETTERS,
        {**dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT), "pad_token": None},
    ),
)
