"""tokenizer.json: read by the library `tokenizers`, after a look at what it could cost."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from modeling.errors import TokenizerError
from modeling.files import read_bytes
from modeling.text.guard import guarded, reason

MB = 1 << 20
MOST_VALUES = 3_000_000  # twice Gemma 3's; a merge of 12 bytes takes 500 in memory
LONGEST_TOKEN = 10_000  # characters; text of a few tokens must not exhaust memory
MOST_GROWTH = 256  # bytes that rules of replacement may make of one
# serde's words for what is no JSON at all; anything else that tokenizers refuses, another version of it may know.
NO_JSON = re.compile(
    r"EOF while|expected (value at|ident|`[,:]`)|trailing c|key must be a string|control character|invalid (escape|number)|"
    r"recursion limit|valid UTF-8|lone leading surrogate"
)
# Merges under such a prefix can end the process within tokenizers: it cuts letters in two.
PREFIXED = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


@dataclass
class TokenizerFile:
    """What tokenizer.json says.

    Attributes:
        tokenizer: as the library has read it.
        added_tokens: the file's list of them, with the ids it gives; None for a tokenizer of no file.
        byte_level: it mentions ByteLevel.
    """

    tokenizer: tokenizers.Tokenizer
    added_tokens: list[dict[str, Any]] | None = None
    byte_level: bool = False


def read_tokenizer(path: Path) -> TokenizerFile:
    """Read tokenizer.json.

    Raises:
        TokenizerError: it is too large, no JSON, unknown to this version of `tokenizers`, or could exhaust memory.
    """
    content = read_bytes(path, TokenizerError)
    if content.count(b",") > MOST_VALUES:
        raise TokenizerError(f"{path}: holds over {MOST_VALUES:,} values, more than are read; download it again")
    if b'"merges"' in content and PREFIXED.search(content):
        raise TokenizerError(f"{path}: its merges have a 'continuing_subword_prefix', which is not supported")
    with guarded(str(path), "reading"):
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            mend = "copy or download the file again"
            if not NO_JSON.search(str(error)):
                mend = (
                    f"it may need a newer one than tokenizers {tokenizers.__version__}: pip install -U tokenizers; "
                    "else download the file again"
                )
            raise TokenizerError(f"{path}: unreadable ({reason(error)}); {mend}") from None
        longest = 0
        if _longest_text(content) > LONGEST_TOKEN:  # else no token is, and listing a large vocabulary takes seconds
            longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0)
        growth = {
            part: _growth(_state(getattr(tokenizer, part))) for part in ("normalizer", "pre_tokenizer", "decoder")
        }
    if longest > LONGEST_TOKEN:
        raise TokenizerError(f"{path}: holds a token of {longest:,} characters, more than {LONGEST_TOKEN:,}")
    for part, factor in growth.items():
        if factor > MOST_GROWTH:
            raise TokenizerError(f"{path}: its {part} may make {factor:,.0f} bytes of one, more than {MOST_GROWTH}")
    return TokenizerFile(tokenizer, _added_tokens(content), b'"ByteLevel"' in content)


def before_texts(tokenizer: tokenizers.Tokenizer, place: str) -> list[int]:
    """The ids that a post-processor puts before every text (a BOS, or nothing).

    Raises:
        TokenizerError: it is of an unknown type, or names tokens without ids.
    """
    state = _state(tokenizer.post_processor)
    try:
        return _before(state) if state else []
    except (KeyError, TypeError, IndexError) as error:
        raise TokenizerError(f"{place}: the post_processor of tokenizer.json cannot be used ({error!r})") from None


def joins_bytes(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether its decoder makes characters of SentencePiece's byte tokens."""
    return any(rule["type"] == "ByteFallback" for rule in rules_of(tokenizer.decoder))


def rules_of(part: Any) -> list[Mapping[str, Any]]:
    """The rules of a normalizer, pre-tokenizer or decoder as tokenizer.json spells them, in their order."""
    return list(_rules(_state(part)))


def _before(state: Mapping[str, Any]) -> list[int]:
    kind = state["type"]
    if kind == "TemplateProcessing":
        ids: list[int] = []
        for piece in state["single"]:
            if "SpecialToken" not in piece:
                break
            ids += state["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        return ids
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [state["cls"][1]]
    if kind == "Sequence":
        return [i for inner in reversed(state["processors"]) for i in _before(inner)]
    if kind == "ByteLevel":
        return []
    raise KeyError(kind)


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json spells it; {} for none."""
    return {} if part is None else json.loads(part.__getstate__())


def _growth(state: Mapping[str, Any]) -> float:
    """How many bytes the rules of a normalizer, pre-tokenizer or decoder can make of one, Unicode's own left out."""
    factor = 1.0
    for rule in _rules(state):
        if rule["type"] == "Replace":
            pattern = rule["pattern"].get("String", "")  # a Regex may match nothing
            content = len(rule["content"].encode())
            factor *= max(1.0, content / len(pattern.encode())) if pattern else 1 + content
        elif rule["type"] == "Prepend":
            factor *= 1 + len(rule["prepend"].encode())
        elif rule["type"] == "Precompiled":
            charsmap = base64.b64decode(rule["precompiled_charsmap"] or "")
            texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
            factor *= max(map(len, texts.split(b"\0")), default=1) or 1
    return factor


def _rules(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if state.get("type") == "Sequence":
        for inner in (rule for name in ("normalizers", "pretokenizers", "decoders") for rule in state.get(name, ())):
            yield from _rules(inner)
    elif state:
        yield state


def _longest_text(content: bytes) -> int:
    """Bytes between two quotation marks, at most; no string in the file is longer than that."""
    marks = np.flatnonzero(np.frombuffer(content, np.uint8) == ord('"'))
    return int(np.diff(marks).max(initial=0))


def _added_tokens(content: bytes) -> list[dict[str, Any]] | None:
    """The list `added_tokens`, found without parsing the vocabulary behind it; None where there is none."""
    at = -1
    while (at := content.find(b'"added_tokens"', at + 1)) >= 0:
        start = at + len(b'"added_tokens"')
        for length in (MB, 8 * MB, len(content)):
            text = content[start : start + length].decode(errors="ignore").lstrip().removeprefix(":").lstrip()
            try:
                listed = json.JSONDecoder().raw_decode(text)[0] if text.startswith("[") else None
            except ValueError:  # cut off
                continue
            if isinstance(listed, list) and all(isinstance(one, dict) and "content" in one for one in listed):
                return listed
            break
    return None
