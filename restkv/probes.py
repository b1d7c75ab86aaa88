"""Whose queries the eviction after a prompt observes: the probe of a policy.

A score asks what an entry is worth to some queries. Those of a prompt's last tokens look for what these tokens need, which may
not be what an answer needs; a probe brings others. It names queries of the prompt itself, or reads more after the prompt: text
and drafts whose queries are observed and whose own entries are never kept.

    window            the last `window` queries of the prompt
    prompt[:N]        N of those of the prompt's second half, each for entries well before it
    draft[:N]         those of N tokens that the model itself goes on with, and of the prompt's newest as many as are missing
                      to `window` (as in LAQ, arXiv 2505.20334)
    replay            the prompt read once more, after a sentence that asks for it (KVzip, arXiv 2505.23416)
    questions[:N][:FILE]
                      questions about a text: general ones, or those of a file, one a line; each with N tokens of the answer that
                      the model gives
    ask[:N]           N questions that the model itself asks about the prompt, each with its answer

Several are joined by "+": an entry is worth the most that any of them says. What is read and observed then: restkv/seen.py.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from modeling.text.characters import brief
from restkv.errors import PolicyError
from restkv.files import reason
from restkv.phrases import Phrases
from restkv.plugins import PluginError, entry_points, load, origin, origins

WINDOW = "window"
GROUP = "restkv.probes"
PIECE = 2048  # tokens that are replayed at once, as in KVzip's code
QUOTED = 8  # tokens by which a request names where a later piece begins
MOST_DRAFTS, MOST_QUESTIONS, MOST_BYTES = 1 << 12, 1 << 10, 1 << 20
MOST_OWN = 1 << 24
ASKED, ANSWERED = 24, 12  # tokens of a question that the model asks, and of its answer, at most
QUESTIONS = (
    "What is this text about?",
    "Who are the people and groups in it, and what does each of them do?",
    "What happens, and in what order?",
    "When and where does it happen?",
    "Which numbers, amounts, dates and codes are given, and what do they stand for?",
    "Why do things happen as they do?",
    "How is it done, step by step?",
    "What are the conditions, exceptions and limits?",
    "What are the results, conclusions and recommendations?",
    "Which names and terms are defined, and what do they mean?",
)
# How questions of the model's own begin, so that greedily drafted ones differ.
BEGINNINGS = ("What", "Who", "When", "Where", "Why", "How", "Which", "How many", "What happens", "Whose")


class Drafted(NamedTuple):
    """What the model goes on with, greedily: `most` tokens, or fewer where it ends its turn; `then` is read after them."""

    most: int
    then: tuple[int, ...] = ()


@dataclass(frozen=True)
class Side:
    """Text to read after a prompt: it sees the prompt and itself, and nothing else that is read there.

    Attributes:
        ids: its tokens; none to go on with the prompt itself, whose newest queries are observed then, too.
        part: the [start, stop) of the prompt that its queries are asked about; None: all of it.
        drafts: what the model goes on with, part after part; its queries are observed like those of `ids`. The full cache is
            alive until all has been said.
        probe: the name of the probe that reads it, which need not be given.
    """

    ids: tuple[int, ...]
    part: tuple[int, int] | None = None
    drafts: tuple[Drafted, ...] = ()
    probe: str = ""


@dataclass(frozen=True)
class Probe(ABC):
    """Whose queries are observed. A new one is a frozen dataclass with a `name`; `of` makes it of what follows the colon."""

    name: ClassVar[str]

    @classmethod
    def of(cls, argument: str | None) -> Probe:
        """The probe of this name.

        Raises:
            PolicyError: it takes no such argument.
        """
        if argument is not None:
            raise PolicyError(
                f"probe {brief(f'{cls.name}:{argument}')}: {cls.name} takes nothing after a colon; leave it out"
            )
        return cls()

    def sides(self, ids: Sequence[int], phrases: Phrases) -> list[Side]:
        """What to read after the prompt `ids`."""
        return []

    def own(self, length: int) -> range:
        """The positions of the prompt whose queries count with the probe's `gap`."""
        return range(0)

    @property
    def gap(self) -> int:
        """See Seen."""
        return 0

    def tokens(self, length: int, phrases: Phrases) -> int:
        """How many it reads after a prompt of so many, without what is drafted."""
        return sum(len(side.ids) for side in self.sides(range(length), phrases))


@dataclass(frozen=True)
class Window(Probe):
    """The last queries of the prompt, as many as the policy's window."""

    name: ClassVar[str] = WINDOW


@dataclass(frozen=True)
class Own(Probe):
    """Queries of the prompt's second half, as many, each for entries more than 64 tokens before it: no further pass."""

    name: ClassVar[str] = "prompt"
    count: int = 512

    @classmethod
    def of(cls, argument: str | None) -> Probe:
        """prompt:N."""
        if argument is None:
            return cls()
        return cls(_count(f"prompt:{argument}", argument, "how many queries to observe", MOST_OWN))

    def own(self, length: int) -> range:
        """`count` at most, at equal distances, the last one among them."""
        half = length - length // 2
        step = -(-half // self.count)
        return range(length - 1 - (half - 1) // step * step, length, step)

    @property
    def gap(self) -> int:
        """As far as a text hardly speaks of what it has just said."""
        return 64


@dataclass(frozen=True)
class Draft(Probe):
    """What the model would say next, greedily. The full cache is alive until it has been said."""

    name: ClassVar[str] = "draft"
    count: int = 8

    @classmethod
    def of(cls, argument: str | None) -> Probe:
        """draft:N."""
        if argument is None:
            return cls()
        return cls(_count(f"draft:{argument}", argument, "the tokens to draft", MOST_DRAFTS))

    def sides(self, ids: Sequence[int], phrases: Phrases) -> list[Side]:
        """Nothing that is read before them."""
        return [Side((), drafts=(Drafted(self.count),))]


@dataclass(frozen=True)
class Replay(Probe):
    """The prompt once more, in pieces, each after a request to repeat it. As KVzip does, a piece is asked about the same piece of
    the prompt (and its first tokens) alone: the time of scoring grows with the length, not with its square.
    """

    name: ClassVar[str] = "replay"

    def sides(self, ids: Sequence[int], phrases: Phrases) -> list[Side]:
        """A side for every piece."""
        sides = []
        for start in range(0, len(ids), PIECE):
            stop = min(start + PIECE, len(ids))
            if start == 0:
                request = phrases.request("Repeat the text above, word for word.")
            else:
                quoted = ids[max(0, start - QUOTED) : start]
                request = phrases.request("Repeat the text above, word for word, from here on: ", quoted)
            sides.append(Side((*request, *ids[start:stop]), (start, stop) if len(ids) > PIECE else None))
        return sides

    def tokens(self, length: int, phrases: Phrases) -> int:
        """All of it again, and the requests: without making the sides of a prompt that nobody has."""
        first, two = (sum(len(side.ids) for side in self.sides(range(n), phrases)) - n for n in (1, PIECE + 1))
        return length + first + (two - first) * (-(-length // PIECE) - 1)


@dataclass(frozen=True)
class Questions(Probe):
    """Questions about the text, each asked on its own, and as much of the answer as the model is to give."""

    name: ClassVar[str] = "questions"
    path: str | None = None  # of a file with one question a line; None: general ones
    count: int = 0  # tokens of an answer

    @classmethod
    def of(cls, argument: str | None) -> Probe:
        """questions:FILE, questions:N or questions:N:FILE."""
        first, colon, rest = (argument or "").partition(":")
        counted = first.isascii() and first.isdigit()
        if argument == "" or (counted and colon and not rest):
            raise PolicyError(
                f"probe {brief(f'questions:{argument}')}: name a file after the colon, or leave it out for general questions"
            )
        if not counted:
            return cls(argument)
        said = f"questions:{argument}"
        return cls(rest or None, _count(said, first, "the tokens of an answer to draft", MOST_DRAFTS))

    def sides(self, ids: Sequence[int], phrases: Phrases) -> list[Side]:
        """A side for every question.

        Raises:
            PolicyError: the file cannot be read, there are none or too many in it, or there is no tokenizer to ask with.
        """
        texts = QUESTIONS if self.path is None else _lines(self.path)
        drafts = (Drafted(self.count),) if self.count else ()
        return [Side(_asked(self.name, phrases.request(f"Question: {text}")), drafts=drafts) for text in texts]


@dataclass(frozen=True)
class Ask(Probe):
    """Questions that the model itself asks about the text, each with the answer that it gives: two turns of a chat."""

    name: ClassVar[str] = "ask"
    count: int = len(BEGINNINGS)

    @classmethod
    def of(cls, argument: str | None) -> Probe:
        """ask:N."""
        if argument is None:
            return cls()
        return cls(_count(f"ask:{argument}", argument, "how many questions the model is to ask", len(BEGINNINGS)))

    def sides(self, ids: Sequence[int], phrases: Phrases) -> list[Side]:
        """A side for every question, with its first word.

        Raises:
            PolicyError: there is no tokenizer to ask with.
        """
        request = _asked(self.name, phrases.request("Write a question about the text above."))
        drafts = Drafted(ASKED, phrases.reply("Answer it shortly.")), Drafted(ANSWERED)
        return [Side((*request, *phrases.begin(text)), drafts=drafts) for text in BEGINNINGS[: self.count]]


def _count(said: str, text: str, what: str, most: int) -> int:
    """A whole number of an argument: 1 to `most`."""
    whole = text.isascii() and text.isdigit() and len(text) < 10  # longer ones may be too long for int()
    if not whole or not 1 <= int(text) <= most:
        raise PolicyError(f"probe {brief(said)}: give {what}, 1 to {most}")
    return int(text)


def _asked(name: str, request: tuple[int, ...]) -> tuple[int, ...]:
    if not request:
        raise PolicyError(f"probe {name}: this model has no tokenizer to ask with; choose another probe")
    return request


def _lines(path: str) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeError:
        raise PolicyError(f"probe questions: {brief(path)} cannot be read (it is not UTF-8)") from None
    except (OSError, ValueError) as error:  # a ValueError: a zero in the name
        said = reason(error) if isinstance(error, OSError) else "there can be no such name"
        raise PolicyError(f"probe questions: {brief(path)} cannot be read ({said})") from None
    questions = [line.strip() for line in lines if line.strip()]
    if len(data) > MOST_BYTES:
        raise PolicyError(f"probe questions: {brief(path)} is too large; give at most {MOST_BYTES} bytes")
    if not 1 <= len(questions) <= MOST_QUESTIONS:
        raise PolicyError(
            f"probe questions: {brief(path)} has {len(questions) or 'no'} questions; give 1 to {MOST_QUESTIONS} lines"
        )
    return questions


PROBES: dict[str, type[Probe]] = {cls.name: cls for cls in (Window, Own, Draft, Replay, Questions, Ask)}


@cache
def parse_probe(text: str) -> tuple[Probe, ...]:
    """What an option `probe` says: probes joined by "+", each a name and what it takes after a colon.

    Raises:
        PolicyError: an unknown name (the message lists the known ones), one given twice, or an argument that it does not take.

    >>> [probe.name for probe in parse_probe("prompt+draft:8")]
    ['prompt', 'draft']
    """
    probes = []
    for part in text.split("+"):
        name, colon, argument = part.partition(":")
        cls = PROBES.get(name) or _plugin(name)
        if cls is None:
            known = ", ".join([*PROBES, *sorted({point.name for point in entry_points(group=GROUP)} - set(PROBES))])
            raise PolicyError(f"probe {brief(text)}: {brief(name)} is unknown; choose from {known}, joined by +")
        probes.append(cls.of(argument if colon else None))
    if len({probe.name for probe in probes}) < len(probes):
        raise PolicyError(f"probe {brief(text)}: one of them is given twice")
    return tuple(probes)


def _plugin(name: str) -> type[Probe] | None:
    """The probe that an installed package registers under a name."""
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        return None
    if len(points) > 1:
        raise PolicyError(f"probe {name!r}: registered by {origins(points)}; uninstall all but one")
    try:
        cls: Any = load(points[0])
    except PluginError as error:
        raise PolicyError(f"probe {name!r}: {origin(points[0])} cannot be imported ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, Probe) and getattr(cls, "name", None) == name):
        raise PolicyError(f"probe {name!r}: {origin(points[0])} is no restkv.probes.Probe of that name")
    return cls
