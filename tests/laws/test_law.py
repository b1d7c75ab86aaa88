"""The law, by hypothesis, over random models, policies, budgets, schedules and batches.

What restkv.testing tries on policies of anybody (a row alone, masked and compacted, padding, columns) is not repeated but for the
watch over each eviction. Here the rest: the same session against a dense model that only masks and ranks by a slow twin, against
itself with everything that must not matter changed (pages, slots, forks, poison), and against the full cache.

Models compute in float64, so that no choice hangs on the last bit of a score, unless a test says otherwise.

Letters: L tokens so far, H query heads, K KV heads, G = H/K, D head dim, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.law import watched
from laws.models import MODELS, model_of
from make.effort import many
from make.small import small_ids
from modeling.layers import Decoder
from restkv import schedule
from restkv.engine import Engine
from restkv.errors import PolicyError
from restkv.evict import UNLIMITED
from restkv.policies import FullCache, Policy, get_policy
from restkv.session import Session
from restkv.testing.watch import snapshot
from twins.masking import Ranked

# Examples of each of the 6 tests: 240 on every run, 3,750 in the slow one; 120 and 750 under CI, which runs both.
FEW, MANY = many(40, 2), many(625, 10)


@dataclass(frozen=True)
class Job:
    """What a session is asked to do."""

    traits: tuple[tuple[str, Any], ...]  # of the model
    policy: Policy
    lengths: tuple[int, ...]  # prompts
    new: int  # tokens fed after them
    chunk: int | None
    every: int  # schedule.COMPACT_EVERY
    seed: int

    def model(self, double: bool = True) -> Decoder:
        return model_of(double, **dict(self.traits))

    @property
    def prompts(self) -> list[list[int]]:
        return [small_ids(length, self.seed + row) for row, length in enumerate(self.lengths)]

    @property
    def tokens(self) -> Tensor:
        """[step][row]."""
        rows = len(self.lengths)
        return torch.tensor(small_ids(self.new * rows, self.seed - 1)).view(self.new, rows)

    def session(self, model: Decoder | None = None, rows: Sequence[int] | None = None) -> Session:
        """A session that has read the prompts (of some rows)."""
        rows = range(len(self.lengths)) if rows is None else rows
        session = self.empty(model or self.model(), [self.lengths[row] for row in rows])
        session.prefill([self.prompts[row] for row in rows])
        return session

    def empty(self, model: Decoder, lengths: Sequence[int]) -> Session:
        how: dict[str, Any] = {} if self.chunk is None else {"prefill": "chunked", "chunk": self.chunk}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule, "COMPACT_EVERY", self.every)
            return Session(Engine(model, "sdpa"), self.policy, lengths, self.new, **how)


# Scores that have a slow twin in tests/twins/reference.py.
SCORED = st.one_of(
    st.fixed_dictionaries(
        {
            "name": st.just("restkv"),
            "gqa": st.sampled_from(["mean", "max", "joint"]),
            "aggregate": st.sampled_from(["attention", "indicator"]),
            "drift": st.sampled_from(["released", "symmetric"]),
            "pooling": st.sampled_from(["adaptive", "avg", "max", "none"]),
            "kernel_size": st.sampled_from([1, 3, 5]),
            "scale": st.sampled_from([2, 2000]),
            "alpha": st.sampled_from([None, 0.3]),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just("snapkv"),
            "gqa": st.sampled_from(["mean", "max"]),
            "pooling": st.sampled_from(["avg", "max", "none"]),
        }
    ),
)
OTHERS = st.sampled_from(
    [
        {"name": "h2o", "positions": "original"},
        {"name": "h2o", "positions": "slot"},
        {"name": "tova"},
        {"name": "keynorm"},
        {"name": "streamingllm", "positions": "slot"},
        {"name": "adakv"},
    ]
)


@st.composite
def policies(draw: Callable, scores: st.SearchStrategy, longest: int) -> Policy:
    options = dict(draw(scores))
    slots = options.get("positions") == "slot"
    if options["name"] in ("restkv", "snapkv", "adakv") and options.get("gqa") != "joint":
        options["granularity"] = draw(st.sampled_from(["kv", "kv", "query"]))
    if options["name"] in ("restkv", "snapkv"):
        options["budget_by"] = draw(st.sampled_from(["uniform", "uniform", "pyramid", "adakv", "global"]))
    window, sinks = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    start, span = draw(st.integers(0, longest - 1)), 0
    if draw(st.booleans()):
        span = draw(st.integers(1, 4))
        options["protect"] = ((start, start + span),)
    budget = window + sinks + span + draw(st.integers(0, 14))
    interval = draw(st.sampled_from([None, 1, 2, 5, 9, 12]))
    if draw(st.booleans()):
        options["high_water"] = budget + draw(st.integers(0, 9))
    if draw(st.integers(0, 4)) == 0 and not slots and not span:
        budget = draw(st.floats(0.05, 1.0))
    return get_policy(options.pop("name"), **options, window=window, sinks=sinks, budget=budget, interval=interval)


@st.composite
def jobs(draw: Callable, scores: st.SearchStrategy = SCORED | OTHERS, chunks: bool = True) -> Job:
    lengths = tuple(draw(st.lists(st.integers(1, 36), min_size=1, max_size=3)))
    return Job(
        traits=tuple(draw(MODELS).items()),
        policy=draw(policies(scores, max(lengths))),
        lengths=lengths,
        new=draw(st.integers(0, 18)),
        chunk=draw(st.sampled_from([None, None, 5, 16])) if chunks else None,
        every=draw(st.sampled_from([1, 6, 12])),
        seed=draw(st.integers(0, 2**20)),
    )


def laws(strategy: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """A test over FEW random jobs on every run and over MANY with -m slow."""

    def decorate(body: Callable) -> Callable:
        @pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
        def test(examples: int) -> None:
            @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
            @given(strategy)
            @torch.no_grad()
            def law(job: Job) -> None:
                try:
                    body(job)
                except (
                    PolicyError
                ) as error:  # a pyramid's last layer may be too small for what is protected, or becomes so
                    assume("protected" not in str(error))
                    raise

            law()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


def feed(session: Session, tokens: Tensor, rows: Sequence[int] | None = None) -> list[Tensor]:
    """Teacher-force tokens [step][row]; the logits [B, V] before the first and after each."""
    logits = [session.logits_BV]
    for ids_B in tokens:
        session.feed(ids_B if rows is None else ids_B[list(rows)])
        logits.append(session.logits_BV)
    return logits


def held(session: Session) -> list[list[set[int]]]:
    """Positions each query head holds, [layer][row * H + head]."""
    group = session.engine.model.config.group
    out = []
    for lists in snapshot(session.cache):
        heads: list[set[int]] = []
        for entries in lists:
            bits = entries.seen or [[True] * len(entries.pos)] * group
            heads.extend({p for p, has in zip(entries.pos, line, strict=True) if has} for line in bits)
        out.append(heads)
    return out


def gap(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


def identical(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@laws(jobs())
def test_every_eviction_is_lawful(job: Job) -> None:
    """Counts, protected entries, order, bits of keys and values (restkv/testing/watch.py); and no pool ever grows."""
    with watched():
        session = job.session()
        reserved = session.cache.reserved_bytes
        feed(session, job.tokens)
    assert session.cache.reserved_bytes == reserved, "a larger pool would be a new graph"


@laws(jobs(SCORED, chunks=False))
def test_a_dense_model_that_masks_gives_the_same_logits_and_choices(job: Job) -> None:
    model, N = job.model(), len(job.model().blocks)
    session = job.session(model)
    budgets = [
        [UNLIMITED] * N if job.policy.budget is None else job.policy.layer_budgets(length, N) for length in job.lengths
    ]
    twins, H = [Ranked(model) for _ in job.lengths], model.config.num_heads

    def agree(pieces: Sequence[Sequence[int]]) -> None:
        for row, (twin, ids) in enumerate(zip(twins, pieces, strict=True)):
            assert float((twin.run(ids) - session.logits_BV[row]).abs().max()) < 1e-8
            twin.follow([layer[row * H : (row + 1) * H] for layer in held(session)], job.policy, budgets[row])

    agree(job.prompts)
    for ids_B in job.tokens:
        session.feed(ids_B)
        agree([[token] for token in ids_B.tolist()])


@laws(jobs())
def test_a_budget_for_everything_is_the_full_cache_exactly(job: Job) -> None:
    """In float32, bit for bit."""
    model, longest = job.model(double=False), max(job.lengths) + job.new
    roomy = replace(job, policy=replace(job.policy, budget=longest + 30, high_water=None, protect=()))
    full = replace(job, policy=FullCache())
    assert identical(feed(roomy.session(model), job.tokens), feed(full.session(model), job.tokens))


@laws(jobs())
def test_neither_pages_nor_slots_matter(job: Job) -> None:
    """A pool whose free pages lie in any order; and lists whose entries are shuffled before they are decoded from."""
    plain, dice = job.session(), random.Random(job.seed)
    logits = feed(plain, job.tokens)

    scattered = job.empty(job.model(), job.lengths)
    for pool in {id(layer.pool): layer.pool for layer in scattered.cache.layers}.values():
        pages = pool.take(pool.free_pages)
        for page in dice.sample(pages, len(pages)):
            pool.release([page])
    scattered.prefill(job.prompts)
    assert identical(feed(scattered, job.tokens), logits)

    if job.policy.slot_positions:  # there, order in the list is the position
        return
    shuffled = job.session()
    for layer in shuffled.cache.layers:
        slot_RC, pos_RC = layer.slots()
        order_RC = torch.rand(slot_RC.shape, generator=torch.Generator().manual_seed(job.seed)).argsort(-1)
        slot_RC, pos_RC = slot_RC.gather(1, order_RC), pos_RC.gather(1, order_RC)
        pool, K = layer.pool, layer.heads
        k_RCD, v_RCD = pool.k[0, 0, slot_RC], pool.v[0, 0, slot_RC]
        companions = {name: data[slot_RC] for name, data in pool.companions.items()}
        layer.clear()
        for row in range(layer.rows):
            mine = slice(row * K, (row + 1) * K)
            theirs = {name: data[mine] for name, data in companions.items()}
            layer.append(row, k_RCD[mine], v_RCD[mine], pos_RC[mine], companions=theirs)
    assert gap(feed(shuffled, job.tokens), logits) < 1e-8
    assert held(shuffled) == held(plain)


@laws(jobs())
def test_nothing_reads_a_padded_or_evicted_slot(job: Job) -> None:
    """Whatever lies there, as long as it is finite: every bit of the logits and every choice stay. In float32."""
    runs = []
    for size in (None, 1e4, 1e30):
        session = job.session(job.model(double=False))
        logits = [session.logits_BV]
        for ids_B in job.tokens:
            if size is not None:
                for layer in session.cache.layers:
                    pool = layer.pool
                    dead_S = pool.pos < 0
                    pool.k[0, 0, dead_S], pool.v[0, 0, dead_S] = size, -size
                    if "raw" in pool.companions:
                        pool.companions["raw"][dead_S] = size
            session.feed(ids_B)
            logits.append(session.logits_BV)
        runs.append((logits, held(session)))
    for logits, kept in runs[1:]:
        assert identical(logits, runs[0][0])
        assert kept == runs[0][1]


@laws(jobs())
def test_forks_go_their_own_ways(job: Job) -> None:
    """Forked in the middle of a round: each side goes on as a session of its own would."""
    at, tokens = job.new // 2, job.tokens
    other = torch.cat([tokens[:at], (tokens[at:] + 1) % job.model().config.vocab_size])
    parent = job.session()
    feed(parent, tokens[:at])
    fork = parent.fork()
    mine, theirs = [], []
    for ids_B, their_ids_B in zip(tokens[at:], other[at:], strict=True):
        parent.feed(ids_B)
        fork.feed(their_ids_B)
        mine.append(parent.logits_BV)
        theirs.append(fork.logits_BV)
    for session, logits, fed in ((parent, mine, tokens), (fork, theirs, other)):
        twin = job.session()
        assert identical(feed(twin, fed)[at + 1 :], logits)
        assert held(twin) == held(session)
    for pool in {id(layer.pool): layer.pool for layer in parent.cache.layers}.values():
        parent.cache.free()
        fork.cache.free()
        assert pool.free_pages == pool.num_pages - 1
