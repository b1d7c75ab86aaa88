"""Special and added tokens: what the files beside tokenizer.json say of them, with the precedence that transformers 5 gives each.

- tokenizer_config.json names special tokens. Its `added_tokens_decoder`, where it has one, says all about added tokens; else
- special_tokens_map.json names them anew, added_tokens.json lists more, and tokenizer.json's own `added_tokens` come last.
- A token that is named but in no vocabulary is added at its end; one that is named is special, whatever its flag says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from modeling.config import read_json
from modeling.errors import TokenizerError
from modeling.families.registry import PRE_TOKENIZER_MENDS, TOKENIZERS, USUAL_TOKENIZERS
from modeling.text.classes import class_of, rebuilt
from modeling.text.file import TokenizerFile, before_texts

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLD_EXTRA, SPECIFIC = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"
TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
MENDED_VOCABULARY = 100_000  # above it transformers obeys PRE_TOKENIZER_MENDS


@dataclass(frozen=True)
class SideFiles:
    """What lies beside tokenizer.json.

    Attributes:
        settings: tokenizer_config.json.
        special_map, added: special_tokens_map.json and added_tokens.json; None where there is none, or where it is not read.
        config: config.json.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    special_map: Mapping[str, Any] | None = None
    added: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path) -> SideFiles:
        """Those of a folder; TokenizerError names one that is broken."""

        def read(name: str) -> dict[str, Any] | None:
            return read_json(folder / name, TokenizerError) if (folder / name).is_file() else None

        settings = read("tokenizer_config.json") or {}
        legacy = "added_tokens_decoder" not in settings
        return cls(
            settings,
            read("special_tokens_map.json") if legacy else None,
            read("added_tokens.json") if legacy else None,
            read("config.json") or {},
        )


@dataclass(frozen=True)
class Completed:
    """A tokenizer with all its tokens.

    Attributes:
        names: special tokens by name, those that only this model has among them: the variables of a chat template.
        before: the ids that precede every text.
    """

    tokenizer: Tokenizer
    names: dict[str, str]
    before: list[int]


def complete(file: TokenizerFile, side: SideFiles, place: str) -> Completed:
    """The tokenizer that AutoTokenizer makes of a folder's files.

    Call it under a guard: what the library refuses is not caught here.

    Raises:
        TokenizerError: a file says something that is impossible, or that we do not know.
    """
    reader = _Reader(place)
    settings, listed = reader.merged(side, _of_tokenizer(file))
    name = class_of(
        side.settings.get("tokenizer_class"),
        side.config,
        file.byte_level,
        _has_code(side.settings),
        place,
        TOKENIZERS,
        USUAL_TOKENIZERS,
    )
    built, tokenizer = TOKENIZERS.get(name), file.tokenizer
    padding = tokenizer.padding
    if built is None:
        _forbid_dropout(tokenizer)
    else:
        settings = {**built.tokens, **settings}
        given = settings.get(OLD_EXTRA) or []
        if built.extra and isinstance(given, list):
            settings[OLD_EXTRA] = [*given, *built.extra]
        tokenizer = rebuilt(tokenizer, built, settings, place)
    if padding is not None:
        settings.setdefault("pad_token", padding["pad_token"])
    # Some files ask for truncation or padding as their training did; a prompt must arrive whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    splits = settings.get("split_special_tokens", False)
    if not isinstance(splits, bool):
        raise reader.refusal("split_special_tokens", splits, "must be true or false")
    tokenizer.encode_special_tokens = splits

    named, extra = reader.named(settings)
    tokens: list[str | AddedToken] = [listed[i] for i in sorted(listed)]
    known = {*(token.content for token in tokenizer.get_added_tokens_decoder().values()), *map(str, tokens)}
    for token in (*(token for token in named.values() if token is not None), *extra):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    important = {str(token) for token in named.values() if token is not None}
    for at, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[at] = AddedToken(token, special=True)
        elif not token.special and str(token) in important:
            token.special = True
    tokenizer.add_tokens(tokens)
    if built is not None and built.plain_special:
        tokenizer.add_tokens([AddedToken(str(token), special=True) for token in (*sorted(important), *extra)])
    for key in PRE_TOKENIZER_MENDS:
        if settings.get(key) and tokenizer.get_vocab_size() > MENDED_VOCABULARY:
            raise TokenizerError(
                f"{place}: {key!r} is not known; save the folder with transformers, which writes the mended pre-tokenizer "
                "into tokenizer.json, and drop the key"
            )

    names = {key: str(token) for key, token in named.items() if token is not None}
    has_bos = built is not None and built.bos
    if "add_bos_token" in settings or "add_eos_token" in settings or has_bos:
        bos = id_of(tokenizer, names, "bos_token") if settings.get("add_bos_token", has_bos) else None
        return Completed(tokenizer, names, [] if bos is None else [bos])
    return Completed(tokenizer, names, before_texts(tokenizer, place))


def _forbid_dropout(tokenizer: Tokenizer) -> None:
    """Merges that are dropped at random are for training."""
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None


def id_of(tokenizer: Tokenizer, names: Mapping[str, str], name: str) -> int | None:
    """The id of a special token; as in transformers that of the unknown token where the vocabulary lacks it."""
    if name not in names:
        return None
    found = tokenizer.token_to_id(names[name])
    return tokenizer.token_to_id(names["unk_token"]) if found is None and "unk_token" in names else found


def _of_tokenizer(file: TokenizerFile) -> list[tuple[int, Any]]:
    """tokenizer.json's added tokens with their ids."""
    if file.added_tokens is None:
        return list(file.tokenizer.get_added_tokens_decoder().items())
    return [(token["id"], token) for token in file.added_tokens]


def _has_code(settings: Mapping[str, Any]) -> bool:
    given = settings.get("auto_map")
    return bool(given.get("AutoTokenizer") if isinstance(given, dict) else given)


class _Reader:
    """Reads side files; what it finds impossible is refused with the folder's name."""

    def __init__(self, place: str) -> None:
        self.place = place

    def refusal(self, key: str, value: Any, must: str) -> TokenizerError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return TokenizerError(f"{self.place}: {key!r} of the tokenizer's files is {shown}; it {must}")

    def merged(
        self, side: SideFiles, of_tokenizer: Iterable[tuple[int, Any]]
    ) -> tuple[dict[str, Any], dict[int, AddedToken]]:
        """The settings of all side files, special tokens as strings or AddedTokens; and the added tokens by id."""
        # Where there is a tokenizer.json, its post-processor says what precedes a text, and not these two.
        ignored = ("add_bos_token", "add_eos_token")
        settings = {key: value for key, value in side.settings.items() if key not in ignored}
        if OLD_EXTRA in settings and not settings.get(EXTRA):
            settings[EXTRA] = settings.pop(OLD_EXTRA)
        specific = {
            key: settings.pop(key)
            for key in list(settings)
            if key.endswith("_token") and key not in NAMES and isinstance(settings[key], str)
        }
        self._take_specific(settings, specific)

        listed: dict[int, AddedToken] = {}
        by_text: dict[str, Any] = {}  # also what another token of the same id replaces in `listed`

        def add(index: int, token: Any, place: str) -> None:
            if not isinstance(token, AddedToken):
                raise self.refusal(place, token, "must be an object with its 'content'")
            listed[index] = by_text[token.content] = token

        if "added_tokens_decoder" in settings:
            given = settings["added_tokens_decoder"]
            for key, value in self._items("added_tokens_decoder", given):
                if not key.strip().isdecimal():
                    raise self.refusal("added_tokens_decoder", key, "must name tokens by their ids")
                place = f"added_tokens_decoder {key}"
                add(int(key), self._token(place, value), place)
        else:
            self._take_map(settings, side.special_map or {})
            special = {str(settings[name]) for name in NAMES if settings.get(name)}
            special |= {str(token) for token in settings.get(EXTRA) or []}
            for text, index in (side.added or {}).items():
                if not isinstance(index, int):
                    raise self.refusal("added_tokens.json", {text: index}, "must map tokens to ids")
                token = AddedToken(text, normalized=text not in special, special=text in special)
                add(index, token, "added_tokens.json")
            for index, token in of_tokenizer:
                add(index, self._token("added_tokens", token), "added_tokens")
        for name in NAMES:
            if settings.get(name) is not None:
                token = self._token(name, settings[name])
                settings[name] = by_text.get(str(token), token)
        return settings, listed

    def _take_map(self, settings: dict[str, Any], special_map: Mapping[str, Any]) -> None:
        """special_tokens_map.json over tokenizer_config.json."""
        for key, value in special_map.items():
            if key == EXTRA and isinstance(value, list):
                tokens = list(settings.get(EXTRA) or [])
                for one in value:
                    token = self._token(key, one, special=True)
                    if token not in tokens:
                        tokens.append(token)
                settings[EXTRA] = tokens
            elif key == EXTRA or not isinstance(value, dict):
                settings[key] = value
            else:
                settings[key] = self._token(key, value, special=True)
        self._take_specific(settings, {})

    def _take_specific(self, settings: dict[str, Any], specific: dict[str, Any]) -> None:
        """Tokens that only this model names, also those of an object of extra tokens, go to one place."""
        if isinstance(settings.get(EXTRA), dict):
            specific |= settings.pop(EXTRA)
        if specific:
            settings[SPECIFIC] = {**(settings.get(SPECIFIC) or {}), **specific}

    def named(self, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Special tokens by name, None for one without, and those that have none."""
        named: dict[str, Any] = dict.fromkeys(NAMES)
        extra = settings.get(EXTRA, settings.get(OLD_EXTRA)) or []
        if not isinstance(extra, list):
            raise self.refusal(EXTRA, extra, "must be a list of tokens, or an object of named ones")
        named.update({name: settings[name] for name in NAMES if settings.get(name) is not None})
        for key, value in settings.items():
            is_token = isinstance(value, str | AddedToken) or (isinstance(value, dict) and "__type" in value)
            if key.endswith("_token") and key not in NAMES and is_token:
                named[key] = self._token(key, value)
        for key, value in self._items(SPECIFIC, settings.get(SPECIFIC) or {}):
            named[key] = self._token(key, value)
        return named, [self._token(EXTRA, one) for one in extra]

    def _items(self, key: str, value: Any) -> Iterable[tuple[str, Any]]:
        if not isinstance(value, dict):
            raise self.refusal(key, value, "must be an object")
        return value.items()

    def _token(self, key: str, value: Any, special: bool | None = None) -> Any:
        """A string as it is, an object as an AddedToken."""
        if isinstance(value, str | AddedToken):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise self.refusal(key, value, "must be a token: a string, or an object with its 'content'")
        given = {name: value[name] for name in TOKEN_FIELDS if value.get(name) is not None}
        if special is not None:
            given["special"] = special
        try:
            return AddedToken(**given)
        except TypeError:
            raise self.refusal(key, value, "must have true or false for all but its 'content'") from None
