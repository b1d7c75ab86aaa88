"""What plans are made of: cells (a method at a budget), and whether a prompt is evicted with its question in sight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

from bench.runs.methods import Method, equal_bytes
from bench.runs.rows import Row
from bench.runs.together import Held
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.policies import Policy

QUESTIONS = {"aware": ("aware",), "agnostic": ("agnostic",), "both": ("aware", "agnostic")}
One = TypeVar("One")
Asked = int | float  # a budget as it was asked for: entries, a share of the prompt, or a compression
Entries = Callable[[Asked, int], int]  # what that is for a prompt of so many tokens, in entries per KV head


@dataclass(frozen=True)
class Cell:
    """One method at one budget; the full cache is asked for 1.0, which is everything as a share and as a compression."""

    method: Method
    asked: Asked

    @property
    def key(self) -> str:
        """Short where that tells it from all others: six digits may not, and 1.0 (everything) is not 1 (an entry)."""
        short = f"{self.asked:g}"
        clear = self.method.full or (float(short) == self.asked and repr(self.asked) != "1.0")
        return f"{self.method.label}/{short if clear else repr(self.asked)}"

    def row(
        self, entries: int, policy: Policy, held: Held, about: Mapping[str, Any], measures: Mapping[str, Any]
    ) -> Row:
        """A result in this cell. entries: what `asked` came to; policy: what the method became; about, measures: see Row."""
        return Row(
            about,
            self.method.label,
            self.method.preset,
            self.asked,
            None if self.method.full else entries,
            policy.granularity,
            policy.budget,
            policy.window,
            round(held.kept, 3),
            held.bytes,
            measures,
        )


def cells_of(methods: Sequence[Method], budgets: Sequence[Asked]) -> list[Cell]:
    """Every method at every budget; the full cache once."""
    return [Cell(method, asked) for method in methods for asked in ((1.0,) if method.full else budgets)]


def distinct(cells: Sequence[Cell], length: int) -> list[Cell]:
    """Without cells that come to as many entries of `length` tokens as an earlier one of their method."""
    first: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        first.setdefault((cell.method.label, share(cell.asked, length)), cell)
    return list(first.values())


def share(asked: Asked, length: int) -> int:
    """Entries per KV head: a whole number is that many, a fraction is one of the prompt."""
    return max(1, round(asked * length)) if isinstance(asked, float) else asked


def compressed(asked: Asked, length: int) -> int:
    """Entries per KV head at a compression, which is the prompt's length over them."""
    return max(1, round(length / asked))


def by_turns(columns: Iterable[Sequence[One]]) -> list[One]:
    """The first of each, then the second of each, and so on, so that a broken run has some of everything."""
    return [one for some in zip_longest(*columns) for one in some if one is not None]


def at_least(plan: Any, **least: int) -> None:
    """Refuse a plan with a number below what it needs."""
    for name, bound in least.items():
        if getattr(plan, name) < bound:
            raise PromptError(f"{name} {getattr(plan, name)}: give at least {bound}")


def check_compression(rates: Sequence[float], length: int) -> None:
    """Refuse compressions that are none, or leave less than an entry of the shortest prompt."""
    for rate in rates:
        if not 1 <= rate <= length:
            raise PromptError(
                f"compression {rate:g}: the prompt over what is kept; give at least 1, and at most its {length} tokens"
            )


def policy_of(lm: LM, cell: Cell, entries: int, prompt: Sequence[int], once: bool) -> Policy:
    """The policy that keeps so many entries per KV head of this prompt; `once`: and evicts nothing after it."""
    policy = equal_bytes(lm, cell.method, entries, lambda: prompt)
    return replace(policy, interval=None) if once else policy


def modes_of(question: str) -> tuple[str, ...]:
    """The modes that aware, agnostic or both stand for."""
    if question not in QUESTIONS:
        raise PromptError(f"question {question!r} is not known; choose from {', '.join(QUESTIONS)}")
    return QUESTIONS[question]
