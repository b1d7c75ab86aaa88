"""Needle in a haystack as the ReST-KV paper's runner does it (docs/sources.md §4.2): essays from a folder, a needle in them.

Departures: files are taken in the order of their names (there in whatever order the system lists them), and a full stop is the
token that the tokenizer makes of "." within a text (there a number that for one model is not a full stop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.published import wording
from bench.published.data import DataError
from bench.published.metrics import needle_rouge, rouge_version, words_found
from bench.published.suite import OFFICIAL, Item, Source, Suite, Task, check_protocol, end_ids
from bench.published.templates import NEEDLE, OWN, RECOGNISED, UNKNOWN, Template, find_templates
from bench.runs.folder import digest
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import read_text
from restkv.errors import PromptError
from restkv.lm import LM

KIND = "needle-official"
TASK = "needle"
BUFFER = 200  # tokens of each length that are left for question and answer
NEW_TOKENS = 30


def haystack(lm: LM, folder: Path, lengths: Sequence[int], depths: int, protocol: str, templates: Path | None) -> Suite:
    """The needle at `depths` depths, in whole percent evenly from 0 to 100, of every length.

    Args:
        lengths: tokens, BUFFER included.
        templates: the clone or its run_needle_in_haystack.py; None takes our own needle and wording.
    Raises:
        DataError: no essays, or templates that are not there. PromptError: a length without room; rouge-score is missing
            (official protocol, which scores by ROUGE-1; the paper's figures are of the words found).
    """
    check_protocol(protocol)
    rouge = rouge_version() if protocol == OFFICIAL else {}
    if depths < 2:
        raise PromptError(f"depths {depths}: from the beginning of the context to its end there are at least 2")
    texts, templates_digest = find_templates(KIND, templates, NEEDLE, wording.NEEDLE)
    words, essays = lm.tokenizer, _essays(folder)
    needle = words.encode(texts["needle"].text, bos=False)
    if min(lengths) <= BUFFER + len(needle):
        raise PromptError(f"length {min(lengths)}: {BUFFER} tokens are left free and the needle has {len(needle)}")
    hay = _repeat(words, essays, max(lengths))
    metric = needle_rouge if protocol == OFFICIAL else words_found
    task = Task(TASK, metric, NEW_TOKENS, newline_ends=True)
    answers = [texts["needle"].text, _expected(texts["needle"].text)]
    sources = []
    for length in lengths:
        for percent in (round(100 * step / (depths - 1)) for step in range(depths)):

            def item(index: int, length: int = length, percent: int = percent) -> Item:
                context = insert(words, hay, needle, length, percent)
                fields = {"context": context, "retrieval_question": texts["retrieval_question"].text}
                return Item(
                    texts["prompt"].fill(fields), answers, f"{folder}: needle at {percent} % of {length} tokens"
                )

            sources.append(Source(task, 1, item, _wording(texts), length, percent / 100))
    facts = {"essays": digest("\0".join(essays)), "templates": templates_digest, **rouge}
    return Suite(KIND, protocol, tuple(sources), None, end_ids(lm, protocol), facts)


def insert(words: Tokenizer, hay: Sequence[int], needle: Sequence[int], length: int, percent: int) -> str:
    """The first tokens of the hay with the needle after the last full stop before `percent`, length - BUFFER tokens in all."""
    context = words.encode(words.decode(hay[:length]), bos=False)
    context = context[: length - BUFFER - len(needle)]
    at = len(context)
    if percent != 100:
        at = int(len(context) * (percent / 100))
        stop = words.encode("a.", bos=False)[-1]
        while at and context[at - 1] != stop:
            at -= 1
    return words.decode([*context[:at], *needle, *context[at:]])


def _repeat(words: Tokenizer, essays: Sequence[str], length: int) -> list[int]:
    """At least `length` tokens of all essays, again and again if need be."""
    once = "".join(essays)
    text = once
    while len(ids := words.encode(text, bos=False)) < length:
        text += once
    return ids


def _essays(folder: Path) -> list[str]:
    essays = []
    for path in sorted(folder.glob("*.txt")):
        try:
            essays.append(read_text(path))
        except PromptError as error:
            why = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read ")
            raise DataError(f"{path}: cannot be read ({why}); give UTF-8 text files") from None
    if not "".join(essays).strip():
        raise DataError(f"{folder}: no *.txt with text; give a folder of essays")
    return essays


def _expected(needle: str) -> str:
    """What the response is compared with: the needle after its "is"."""
    before, found, after = needle.strip().partition(" is ")
    return after if found else before


def _wording(texts: Mapping[str, Template]) -> str:
    """RECOGNISED where all of it is."""
    sources = {template.source for template in texts.values()}
    return next(source for source in (OWN, UNKNOWN, RECOGNISED) if source in sources)
