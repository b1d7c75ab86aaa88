"""One prompt, many caches: a prefill in one piece does not depend on what is evicted after it, so that policies can share it.

Letters: L prompt length, E hidden width, H query heads, K KV heads, D head dim, W queries, T new tokens, X = K or H, B rows, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.runs.sharing import Scores, sharing
from modeling.cache import KVCache
from modeling.forward import Watch
from restkv.errors import PromptError
from restkv.evict import Evictor
from restkv.lm import LM
from restkv.meter import Meter
from restkv.patterns import Pattern, parse_prefill
from restkv.policies import FullCache, Policy
from restkv.reading import Layer, read_layers
from restkv.results import Decoding, Generation, Row, Stats
from restkv.seen import Reading
from restkv.session import Session
from restkv.sizing import companions_of, page_size

Found = TypeVar("Found")
# Rows of a session whose layers draw on one pool: every list's table is as long as that pool, so that all tables together grow
# with the square of the rows.
MOST_UNEVEN = 8


@dataclass(frozen=True)
class Held:
    """What a policy has kept of a prompt: entries per layer and KV head, and bytes (None: not counted)."""

    kept: float
    bytes: int | None


@dataclass
class Together:
    """A session whose rows hold the same prompt under different policies.

    Attributes:
        policies: of the rows.
        evictors: theirs, each of one row.
        about: what the rows stand for, in the caller's words.
    """

    session: Session
    policies: list[Policy]
    evictors: list[Evictor]
    about: list[int]

    @property
    def rows(self) -> list[tuple[KVCache, Evictor]]:
        return [(self.session.cache.row(index), evictor) for index, evictor in enumerate(self.evictors)]

    def held(self) -> list[Held]:
        """Each row's live entries, and their bytes with positions and what its own policy stores beside them."""
        model, cache = self.session.engine.model, self.session.cache
        live_BN = torch.stack([layer.live_counts().sum(-1) for layer in cache.layers], 1)
        heads = sum(layer.heads for layer in cache.layers)
        found = []
        for policy, live in zip(self.policies, live_BN.sum(-1).tolist(), strict=True):
            extra = sum(math.prod(shape) * dtype.itemsize for shape, dtype in companions_of(policy, model).values())
            slot = 2 * model.config.head_dim * model.dtype.itemsize + torch.int32.itemsize + extra
            found.append(Held(live / heads, slot * live))
        return found


def kept_mean(session: Session, row: int = 0) -> float:
    """Live entries of a row per layer and KV head."""
    layers = session.kept()
    return sum(rows[row] for rows in layers) / len(layers)


def answer_together(lm: LM, policies: Sequence[Policy], length: int, later: int, extends: bool) -> list[Together]:
    """Sessions without entries yet for a prompt of `length` tokens and up to `later` more, every policy a row of one.

    Policies that will not evict again within `later` tokens share a session with those of down to an eighth of their size,
    since a step of many rows takes hardly longer than a step of one. `about` numbers the policies.
    """
    sizes = [_most(lm, policy, length) for policy in policies]
    largest = max((size for size, policy in zip(sizes, policies, strict=True) if policy.budget is not None), default=1)
    groups: dict[object, list[int]] = {}
    uneven_rows = 0
    for index, (size, policy) in enumerate(zip(sizes, policies, strict=True)):
        rests = policy.interval is None or policy.interval > later
        together = policy.budget is not None and rests
        if together:
            eighth = max(1, math.ceil(math.log(largest / size, 8) - 1e-9))
            uneven = _uneven(lm, policy, length)
            key: object = (eighth, policy.slot_positions, policy.biased, uneven, uneven and uneven_rows // MOST_UNEVEN)
            uneven_rows += uneven
        else:
            key = (policy, index)
        groups.setdefault(key, []).append(index)
    made = []
    for indices in groups.values():
        some = [policies[index] for index in indices]
        evictors = [Evictor(lm.model, policy, lm.engine.roots, [length]).row(0) for policy in some]
        if len(some) > 1:
            session = _shared_session(lm, some, length, later)
        else:
            session = Session(lm.engine, some[0], [length], later, extends=extends)
            evictors = [session.evictor.row(0)]
        made.append(Together(session, some, evictors, indices))
    return made


def _most(lm: LM, policy: Policy, length: int) -> int:
    """Entries per KV head that a policy stores of a prompt, at most and on average over layers and heads."""
    if policy.budget is None:
        return length
    budgets = policy.layer_budgets(length, lm.config.num_layers)
    union = lm.config.group if policy.granularity == "query" else 1
    return min(length, -(-sum(budgets) * union // len(budgets)))


def _uneven(lm: LM, policy: Policy, length: int) -> bool:
    """Whether layers keep different numbers of entries."""
    return policy.allocation.across_layers or len(set(policy.layer_budgets(length, lm.config.num_layers))) > 1


def _shared_session(lm: LM, policies: Sequence[Policy], length: int, later: int) -> Session:
    """A row for each policy, with room for what they keep; nothing is evicted after the prompt."""
    session = Session(lm.engine, FullCache(), [1] * len(policies), 1)
    sizes = [_most(lm, policy, length) for policy in policies]
    marked = max(policies, key=lambda policy: policy.granularity == "query")
    session.cache = lm.engine.new_cache(
        replace(marked, interval=None),
        len(policies),
        -(-sum(sizes) // len(sizes)) + later,
        queries=0,
        ragged=True,
        shared=any(_uneven(lm, policy, length) for policy in policies),
        forks=0,
        page=page_size(max(sizes)),
    )
    return session


@torch.no_grad()
def under_each(
    lm: LM,
    policies: Sequence[Policy],
    prompt: Sequence[int],
    later: int,
    measure: Callable[[Session], Sequence[Found]],
    *,
    extends: bool,
    pattern: Pattern | None = None,
) -> list[tuple[Held, Found]]:
    """Measure something on what each policy has kept of a prompt; one prefill serves all.

    Args:
        prompt: token ids, evicted once they are prefilled.
        later: tokens that `measure` appends at most; extends: several at a time.
        measure: called with every session, whose rows are some of the policies; one value for each row.
        pattern: see prefill_together.
    Returns:
        For each policy what it kept, and its value.
    """
    groups = answer_together(lm, policies, len(prompt), later, extends)
    prefill_all(lm, groups, prompt, pattern)
    found: dict[int, tuple[Held, Found]] = {}
    for group in groups:
        held = group.held()
        values = measure(group.session)
        group.session.cache.free()
        found |= zip(group.about, zip(held, values, strict=True), strict=True)
    return [found[index] for index in range(len(policies))]


def answer_all(
    lm: LM,
    policies: Sequence[Policy],
    prompt: Sequence[int],
    decoding: Decoding,
    *,
    asked: Sequence[int] = (),
    eos: Sequence[int] | None = None,
    least_one: bool = False,
    pattern: Pattern | None = None,
) -> list[tuple[Held, Generation]]:
    """What every policy kept of a prompt, and its answer, in their order; one prefill serves all.

    Args:
        prompt: token ids, evicted once they are prefilled.
        asked: token ids appended after that.
        eos: ids that end an answer, if not the checkpoint's.
        least_one: the first token is the likeliest that ends no answer.
        pattern: see prefill_together.
    """
    ends = lm.config.eos_token_ids if eos is None else eos

    def answer(session: Session) -> list[Generation]:
        count = len(session.active)
        if asked:
            session.extend([asked] * count)
        if least_one:
            session.logits_BV = session.logits_BV.index_fill(
                1, torch.tensor(ends, dtype=torch.long, device=lm.device), float("-inf")
            )
        stats = Stats("", None, [len(prompt) + len(asked)] * count, question="agnostic" if asked else "aware")
        answers: list[Generation] = []
        rows = [Row(lm.tokenizer, decoding, ends) for _ in range(count)]
        for _ in lm.decode(session, decoding, stats, Meter(lm.device), answers, rows):
            pass
        return answers

    later = len(asked) + decoding.max_new_tokens
    return under_each(lm, policies, prompt, later, answer, extends=bool(asked), pattern=pattern)


def prefill_together(lm: LM, sessions: Sequence[Session], ids: Sequence[int], pattern: Pattern | None = None) -> None:
    """Session.prefill([ids]) of several new one-row sessions, at the price of one pass through the model.

    pattern: which part of the prompt's attention to compute; None: all of it.
    """
    alone = [Together(session, [session.policy], [session.evictor.row(0)], [0]) for session in sessions]
    prefill_all(lm, alone, ids, pattern)


def pattern_of(prefill: str) -> Pattern | None:
    """The pattern of a bench's `prefill`, None for "dense".

    Raises:
        PromptError: an unknown one, or a chunked prefill, which depends on the policy and cannot be shared.
    """
    if prefill == "chunked":
        raise PromptError(
            "prefill 'chunked' evicts while it reads, so that methods cannot share it; give dense or a pattern"
        )
    return parse_prefill(prefill)


class _Reader(NamedTuple):
    """A row that a prompt is read for."""

    cache: KVCache
    evictor: Evictor
    policy: Policy
    reading: Reading


@torch.no_grad()
def prefill_all(lm: LM, groups: Sequence[Together], ids: Sequence[int], pattern: Pattern | None = None) -> None:
    """Run one prompt through the model and let every row of every session keep its share of it: once for all probes, unless two
    of them observe other queries of the prompt's own."""
    passes: list[tuple[Reading, list[_Reader]]] = []
    for group in groups:
        for cache, evictor in group.rows:
            reading = evictor.reading(ids, lm.engine.phrases)
            row = _Reader(cache, evictor, evictor.policy, reading)
            for index, (others, rows) in enumerate(passes):
                if (merged := others.merged(reading)) is not None:
                    passes[index] = merged, [*rows, row]
                    break
            else:
                passes.append((reading, [row]))
    for reading, rows in passes:
        x_1E = _prefill_rows(lm, rows, ids, reading, pattern)
    logits_1V = lm.model.head(x_1E)
    for group in groups:
        group.session.cache.refresh()
        group.session.logits_BV = logits_1V.expand(len(group.policies), -1)


def _prefill_rows(
    lm: LM, rows: Sequence[_Reader], ids: Sequence[int], reading: Reading, pattern: Pattern | None
) -> Tensor:
    scores = Scores()
    for row in rows:
        row.evictor.policy = sharing(row.policy, scores)
    masses: dict[tuple[int, str], Tensor | None] = {}  # of layers that have been read and not yet stored

    def watch(index: int) -> Watch | None:
        """Accumulated attention is the same for all policies that want it, per KV head or per query head."""
        watches = []
        for row in rows:
            key = index, row.policy.granularity
            if "mass" in row.policy.needs and key not in masses:
                callback, masses[key] = row.evictor.watch_prompt(index, len(ids))
                watches.append(callback)

        def watch_all(*what: Any) -> None:
            for callback in watches:
                if callback is not None:
                    callback(*what)

        return watch_all if watches else None

    def store(index: int, layer: Layer) -> None:
        scores.clear()
        for row in rows:
            mass_XL = masses[index, row.policy.granularity] if "mass" in row.policy.needs else None
            raw_KLD = layer.raw_KLD if row.policy.slot_positions else None
            one = layer._replace(raw_KLD=raw_KLD, seen=reading.part(layer.seen, row.reading))
            row.evictor.store_prompt(row.cache, index, one, mass_XL)
        for key in [key for key in masses if key[0] == index]:
            del masses[key]

    x_1E = read_layers(
        lm.model,
        ids,
        reading,
        _last(rows),
        store,
        watch=watch,
        raw=any(row.policy.slot_positions for row in rows),
        normed=any("normed" in row.policy.needs for row in rows),
        pattern=pattern,
        attend=lm.engine.attend,
    )
    for row in rows:
        row.evictor.prompt_done(row.cache, len(ids))
        row.evictor.policy = row.policy
    return x_1E


def _last(rows: Sequence[_Reader]) -> int:
    """How many of a prompt's last queries some rows look at, or remember."""
    return max(max(row.policy.observed_prompt, row.cache.ring_size, 1) for row in rows)
