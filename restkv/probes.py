"""Whose queries the eviction after a prompt observes: the probe of a policy.

A score asks what an entry is worth to some queries. Those of a prompt's last tokens look for what these tokens need, which may
not be what an answer needs; a probe brings others. It names queries of the prompt itself, or reads more after the prompt: text
and drafts whose queries are observed and whose own entries are never kept.

    window            the last `window` queries of the prompt
    prompt            those of the prompt's second half, each for entries well before it
    draft[:N]         those of N tokens that the model itself goes on with, and of the prompt's newest as many as are missing
                      to `window` (as in LAQ, arXiv 2505.20334)
    replay            the prompt read once more, after a sentence that asks for it (KVzip, arXiv 2505.23416)
    questions[:FILE]  questions about a text: general ones, or those of a file, one a line

Several are joined by "+": an entry is worth the most that any of them says.

Letters: H query heads, K KV heads, Q queries, L tokens of the prompt, T tokens read after it, D head dim, S kinds of sizes.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from modeling.text.characters import brief
from modeling.text.tokenizer import Tokenizer
from restkv.errors import PolicyError
from restkv.files import reason
from restkv.observe import Look, Observation
from restkv.plugins import PluginError, entry_points, load, origin, origins

WINDOW = "window"
GROUP = "restkv.probes"
PIECE = 2048  # tokens that are replayed at once, as in KVzip's code
FIRST = 4  # entries of the prompt's begin that every piece attends to, as there
QUOTED = 8  # tokens by which a request names where a later piece begins
MOST_DRAFTS, MOST_QUESTIONS, MOST_BYTES = 1 << 12, 1 << 10, 1 << 20
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
_MARK = "restkv-content"


@dataclass(frozen=True)
class Side:
    """Text to read after a prompt: it sees the prompt and itself, and nothing else that is read there.

    Attributes:
        ids: its tokens.
        part: the [start, stop) of the prompt that its queries are asked about; None: all of it.
    """

    ids: tuple[int, ...]
    part: tuple[int, int] | None = None


class Seen(NamedTuple):
    """Queries of one layer that the eviction after a prompt observes, after RoPE.

    q_HQD: consecutive ones; `first` is the position of the first. k_KTD, v_KTD: entries that they see after the prompt's, or
    None. part: see Side. gap: a query counts for entries more than so many positions before it. newest: the prompt's newest
    queries are observed with them, as many as the policy's window has room for. sizes_SQ: see Observation.
    """

    q_HQD: Tensor
    first: int
    k_KTD: Tensor | None = None
    v_KTD: Tensor | None = None
    part: tuple[int, int] | None = None
    gap: int = 0
    newest: bool = False
    sizes_SQ: Tensor | None = None


class Phrases:
    """Requests to a model as token ids that follow a text. Where there is a chat template, a request ends the user's turn and
    opens the assistant's; without a tokenizer nothing is said.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def request(self, text: str, quoted: Sequence[int] = ()) -> tuple[int, ...]:
        """Ask for something; `quoted`: tokens that the request ends with."""
        if self._tokenizer is None:
            return tuple(quoted)
        return (*self._tokenizer.encode_more(f"\n\n{text}"), *quoted, *self._closing)

    @cached_property
    def _closing(self) -> tuple[int, ...]:
        assert self._tokenizer is not None
        if not self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode_more("\n"))
        _, _, after = self._tokenizer.render([{"role": "user", "content": _MARK}]).rpartition(_MARK)
        return tuple(self._tokenizer.encode(after, bos=False))


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

    def own(self, length: int) -> int:
        """How many of the prompt's last queries count with the probe's `gap`."""
        return 0

    @property
    def gap(self) -> int:
        """See Seen."""
        return 0

    @property
    def drafts(self) -> int:
        """Tokens that the model is to go on with."""
        return 0


@dataclass(frozen=True)
class Window(Probe):
    """The last queries of the prompt, as many as the policy's window."""

    name: ClassVar[str] = WINDOW


@dataclass(frozen=True)
class Own(Probe):
    """The queries of the prompt's second half, each for entries more than 64 tokens before it: no further pass."""

    name: ClassVar[str] = "prompt"

    def own(self, length: int) -> int:
        """The second half."""
        return length - length // 2

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
        whole = (
            argument.isascii() and argument.isdigit() and len(argument) < 10
        )  # longer ones may be too long for int()
        if not whole or not 1 <= int(argument) <= MOST_DRAFTS:
            raise PolicyError(f"probe {brief(f'draft:{argument}')}: give the tokens to draft, 1 to {MOST_DRAFTS}")
        return cls(int(argument))

    @property
    def drafts(self) -> int:
        """As many as were asked for."""
        return self.count


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


@dataclass(frozen=True)
class Questions(Probe):
    """Questions about the text, each asked on its own."""

    name: ClassVar[str] = "questions"
    path: str | None = None  # of a file with one question a line; None: general ones

    @classmethod
    def of(cls, argument: str | None) -> Probe:
        """questions:FILE."""
        if argument == "":
            raise PolicyError("probe questions:: name a file after the colon, or leave it out for general questions")
        return cls(argument)

    def sides(self, ids: Sequence[int], phrases: Phrases) -> list[Side]:
        """A side for every question.

        Raises:
            PolicyError: the file cannot be read, there are none or too many in it, or there is no tokenizer to ask with.
        """
        texts = QUESTIONS if self.path is None else _lines(self.path)
        sides = [Side(phrases.request(f"Question: {text}")) for text in texts]
        if not all(side.ids for side in sides):
            raise PolicyError("probe questions: this model has no tokenizer to ask with; choose another probe")
        return sides


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


PROBES: dict[str, type[Probe]] = {cls.name: cls for cls in (Window, Own, Draft, Replay, Questions)}


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


@dataclass(frozen=True)
class Reading:
    """What a prompt's eviction has to read and to observe.

    Attributes:
        own, gap: so many of the prompt's queries with such a gap.
        drafts: tokens to draft.
        sides: text to read after the prompt.
    """

    own: int = 0
    gap: int = 0
    drafts: int = 0
    sides: tuple[Side, ...] = ()

    @classmethod
    def of(cls, probe: str, ids: Sequence[int], phrases: Phrases) -> Reading:
        """Of a probe and a prompt."""
        probes = parse_probe(probe)
        return cls(
            own=max(one.own(len(ids)) for one in probes),
            gap=max(one.gap for one in probes),
            drafts=max(one.drafts for one in probes),
            sides=tuple(side for one in probes for side in one.sides(ids, phrases)),
        )

    def merged(self, other: Reading) -> Reading | None:
        """What serves both, by `part`; None where the prompt's own queries or the drafts are others."""
        own = {(one.own, one.gap) for one in (self, other) if one.own} or {(0, 0)}
        drafts = {one.drafts for one in (self, other) if one.drafts} or {0}
        if len(own) > 1 or len(drafts) > 1:
            return None
        return Reading(*own.pop(), drafts.pop(), tuple(dict.fromkeys((*self.sides, *other.sides))))

    def part(self, seen: Sequence[Seen], reading: Reading) -> tuple[Seen, ...]:
        """Of what was seen in this reading what would have been in another one, which this one serves."""
        first = int(self.own > 0)
        sides = dict(zip(self.sides, seen[first:], strict=False))
        own, drafts = seen[:first], seen[first + len(self.sides) :]
        return (
            *(own if reading.own else ()),
            *(sides[side] for side in reading.sides),
            *(drafts if reading.drafts else ()),
        )


def looks(probe: str, obs: Observation, seen: Sequence[Seen], window: int) -> tuple[Look, ...]:
    """What the queries that a probe observes see of a layer's prompt and of what was read after it; nothing where they are those
    that `obs` has anyway.

    Args:
        obs: all entries of the prompt, and its last queries.
        window: how many of the newest queries count.
    """
    if not seen:
        return ()
    newest = [Look(lambda obs: obs)] if WINDOW in probe.split("+") else []
    return (*newest, *(_look(obs, one, window) for one in seen))


def _look(obs: Observation, seen: Seen, window: int) -> Look:
    at_n = None
    if seen.part is not None:
        start, stop = seen.part
        at_n = torch.cat([torch.arange(min(FIRST, start)), torch.arange(start, stop)]).to(obs.pos.device)
    return Look(partial(_view, seen=seen, at_n=at_n, window=window), at_n)


def _view(obs: Observation, seen: Seen, at_n: Tensor | None, window: int) -> Observation:
    length, device = obs.pos.shape[-1], obs.pos.device
    k, v, pos = (x if at_n is None else x[:, :, at_n] for x in (obs.k, obs.v, obs.pos))
    if seen.k_KTD is not None and seen.v_KTD is not None:
        own_KT = torch.arange(length, length + seen.k_KTD.shape[1], device=device).expand(len(seen.k_KTD), -1)
        k, v = torch.cat([k, seen.k_KTD[None]], 2), torch.cat([v, seen.v_KTD[None]], 2)
        pos = torch.cat([pos, own_KT[None]], 2)
    q_1HQD, stop = seen.q_HQD[None], seen.first + seen.q_HQD.shape[1]
    if seen.newest:
        room = max(0, window - q_1HQD.shape[2])
        q_1HQD = torch.cat([obs.q[:, :, max(0, obs.q.shape[2] - room) :], q_1HQD], 2)
    q_pos_1Q = torch.arange(stop - q_1HQD.shape[2], stop, device=device)[None]
    end = length if seen.gap else None  # what a query of the prompt counts for is not older than all of them
    sizes_1SQ = None if seen.sizes_SQ is None else seen.sizes_SQ[None]
    if seen.newest and sizes_1SQ is not None and obs.sizes is not None:
        sizes_1SQ = torch.cat([obs.sizes, sizes_1SQ], 2)[..., -q_1HQD.shape[2] :]
    view = replace(obs, q=q_1HQD, q_pos=q_pos_1Q, k=k, v=v, pos=pos, end=end, gap=seen.gap, sizes=sizes_1SQ)
    return replace(view, protected=None, mass=None)


def check_readable(probe: str, refit: str, chunked: bool) -> None:
    """Refuse a probe and a refit for a prompt that is evicted while it is read.

    Raises:
        PolicyError: it needs the whole prompt.
    """
    option, value, mend = ("probe", probe, WINDOW) if probe != WINDOW else ("refit", refit, "none")
    if chunked and value != mend:
        raise PolicyError(
            f"{option} {value!r}: a chunked prefill evicts before all of the prompt has been read; choose {option}={mend}, or "
            "prefill=dense"
        )
