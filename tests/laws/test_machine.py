"""Sessions driven at random, against a dense float64 twin of their cache: whatever is done, in whatever order.

A few sessions live at a time. Each step does one thing to one of them: generate, append a turn, go on to the next eviction
or to the next compaction, save and load, fork, ask, end a row or let it go on, drop. Its twins (tests/twins/stepwise.py: lists of
entries per KV head, attention by dense matrices, float64) read the same tokens; logits and entries must agree to 1e-8, and
all other sessions must not have changed by a bit.

Who evicts: under a uniform, per-layer or pyramid budget a twin chooses for itself, by the papers' step-by-step rules where
twins/stepwise.py has them, else by the policy's score of what the twin holds; the engine must have kept the same, unless two
scores are closer than float32 (H2O's collected attention) can tell. Where heads or layers compete for one budget, and for
ExpectedAttention, the twin takes the engine's choice, once tests/laws/law.py has found it lawful: which entries win there is
tested by itself, here it is what comes after.

RESTKV_MACHINE_STEPS sets the number of steps (2,000); with it, or with --hypothesis-seed, runs are not the same each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from torch import Tensor

from laws.law import watched
from laws.live import CLOSE, Live, Twin
from make.small import eagerly, small_ids, small_model
from restkv import schedule, sizing
from restkv.context import CompressedContext
from restkv.engine import Engine
from restkv.lm import LM
from restkv.policies import (
    CAOTE,
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    FullCache,
    KeyDiff,
    KeyNorm,
    LaCache,
    Policy,
    PyramidKV,
    Random,
    ReSTKV,
    SnapKV,
    StreamingLLM,
)
from restkv.sampling import Sampling
from restkv.saving.store import load_session, save_session
from restkv.session import Session
from restkv.testing.models import exact
from twins.stepwise import Kept

STEPS = int(os.environ.get("RESTKV_MACHINE_STEPS", "2000"))
STEPS_OF_A_LIFE = 50
SESSIONS = 3  # alive at a time
COMPACT_EVERY = 8  # in place of the engine's 32, so that marking and reclaiming alternate
PAGE = 4  # in place of 32, so that lists have several pages, and forks share full ones

ENGINES = [
    Engine(exact(small_model(11, windows=(None, None))), "sdpa"),
    Engine(exact(small_model(12, windows=(7, None), thetas=(100.0, 1000.0))), "sdpa"),
    # Evictions that only mask, and compactions now and then, as compiled ones.
    eagerly(Engine(exact(small_model(13, windows=(7, None), thetas=(100.0, 1000.0))), "flex")),
]
POLICIES: dict[str, Policy] = {
    "restkv": ReSTKV(10, window=3, interval=4),
    "restkv query": ReSTKV(10, window=3, interval=1, granularity="query"),
    "restkv global": ReSTKV(10, window=3, interval=5, budget_by="global", aggregate="indicator"),
    "restkv joint, mark": ReSTKV(10, window=3, interval=2, high_water=15, gqa="joint"),
    "snapkv per layer": SnapKV((8, 12), window=3, interval=4),
    "snapkv fraction": SnapKV(0.4, window=3, interval=3),
    "snapkv span": SnapKV(10, window=3, sinks=1, protect=((2, 5),), interval=3, gqa="max"),
    "snapkv once": SnapKV(10, window=3, interval=None),
    "pyramidkv": PyramidKV(10, window=3, interval=4),
    "adakv": AdaKV(10, window=3, interval=1),
    "adakv query": AdaKV(10, window=3, interval=6, granularity="query"),
    "h2o": H2O(10),
    "h2o query": H2O(10, interval=4, granularity="query"),
    "h2o slot": H2O(10, interval=3, positions="slot", recent=4),
    "h2o global": H2O(10, interval=2, budget_by="global"),
    "tova": TOVA(10),
    "tova mark": TOVA(10, interval=1, high_water=14),
    "caote": CAOTE(10, interval=3),
    "expected-attention": ExpectedAttention(10, sinks=2, interval=4),
    "keynorm": KeyNorm(10, interval=5),
    "keydiff adakv": KeyDiff(10, interval=5, budget_by="adakv"),
    "streamingllm": StreamingLLM(10, sinks=2),
    "streamingllm original": StreamingLLM(10, sinks=2, interval=4, positions="original"),
    "lacache": LaCache(12, sinks=2),
    "lacache original": LaCache(12, sinks=1, interval=3, positions="original"),
    "random query": Random(10, interval=2, granularity="query"),
    "full": FullCache(),
}
# More often: what has a memory that forks might share, and what renumbers some rows and must leave the others alone.
DELICATE = [name for name, policy in POLICIES.items() if policy.start() is not None or policy.slot_positions]
METHODS = [*POLICIES, *DELICATE, *DELICATE]


def running(live: Live) -> bool:
    return any(live.session.active)


def evicting(live: Live) -> bool:
    policy = live.session.policy
    return running(live) and policy.budget is not None and policy.interval is not None


def single(live: Live) -> bool:
    return live.rows == 1


def several(live: Live) -> bool:
    return live.rows > 1


def some(able: Callable[[Live], bool]) -> Callable[[Any], Any]:
    """A rule for when there is such a session."""
    return precondition(lambda self: any(map(able, self.live)))


index = st.integers(0, SESSIONS - 1)
prompt_length = st.integers(1, 30)
wide = st.integers(0, 2**16 - 1)  # of a small range hypothesis draws some often and others never


class Machine(RuleBasedStateMachine):
    steps = ties = 0  # of all lives

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self._contexts = ExitStack()
        self._contexts.enter_context(torch.no_grad())
        self._contexts.enter_context(patch.object(schedule, "COMPACT_EVERY", COMPACT_EVERY))
        self._contexts.enter_context(patch.object(sizing, "page_size", lambda entries: PAGE))
        self._watch = self._contexts.enter_context(watched())
        self._watch.ladders = False
        self.live: list[Live] = []
        self._tokens = 0

    def teardown(self) -> None:
        while self.live:
            self._drop(self.live[0])
        self._contexts.close()
        self._folder.cleanup()

    # -- helpers

    def _ids(self, count: int) -> list[int]:
        self._tokens += 1
        return small_ids(count, seed=self._tokens)

    def _pick(self, i: int, able: Callable[[Live], bool] = lambda live: True) -> Live:
        """One of the sessions that can do something."""
        those = [live for live in self.live if able(live)]
        return those[i % len(those)]

    def _told(self) -> Iterator[list[Kept]]:
        """What the engine does from here on; all of it must be asked for."""
        self._watch.kept.clear()
        return iter(self._watch.kept)

    def _done(self, live: Live | None, logits: Sequence[Tensor | None], told: Iterator[list[Kept]]) -> None:
        """A step has been taken; its session agrees with its twins, and the others are as they were."""
        assert next(told, None) is None, "an eviction nobody expected"
        for other in self.live:
            if other is live:
                live.agree(logits)
            else:
                other.untouched()
        Machine.steps += 1

    def _feed(self, live: Live, told: Iterator[list[Kept]]) -> list[Tensor | None]:
        """One token, drawn greedily, for every active row."""
        session = live.session
        ids_B = session.sample(Sampling(), [])
        session.feed(ids_B)
        pieces = [[token] if on else [] for token, on in zip(ids_B.tolist(), session.active, strict=True)]
        return live.absorb(pieces, told)

    def _drop(self, live: Live) -> None:
        self.live.remove(live)
        Machine.ties += sum(twin.ties for twin in live.twins)
        live.session.cache.free()
        pools = {id(layer.pool): layer.pool for layer in live.session.cache.layers}
        for pool in pools.values():
            if not any(layer.pool is pool for other in self.live for layer in other.session.cache.layers):
                assert pool.free_pages == pool.num_pages - 1, "pages leaked"
                assert (pool.pos == -1).all()

    # -- what may happen

    @precondition(lambda self: len(self.live) < SESSIONS)
    @rule(
        model=st.integers(0, len(ENGINES) - 1),
        method=wide,
        rows=wide,
        lengths=st.tuples(prompt_length, prompt_length),
        chunk=st.integers(1, 12),
        chunked=st.booleans(),
        room=st.integers(1, 20),
        forks=st.integers(0, 1),
    )
    def start(
        self,
        model: int,
        method: int,
        rows: int,
        lengths: tuple[int, ...],
        chunk: int,
        chunked: bool,
        room: int,
        forks: int,
    ) -> None:
        engine, policy, told = ENGINES[model], POLICIES[METHODS[method % len(METHODS)]], self._told()
        lengths = lengths[: 1 + rows % 2]
        how = "chunked" if chunked else "dense"
        session = Session(engine, policy, lengths, room, prefill=how, chunk=chunk, extends=True, forks=forks)
        prompts = [self._ids(length) for length in lengths]
        session.prefill(prompts)
        live = Live(session, [Twin(engine, policy, length) for length in lengths], chunk)
        logits: list[Tensor | None] = []
        for twin, ids in zip(live.twins, prompts, strict=True):
            first = chunk if chunked else len(ids)
            logits.append(twin.read(ids[:first]))
            twin.settle(next(told)[0], prompt=True)
            for begin in range(first, len(ids), chunk):
                logits[-1] = twin.read(ids[begin : begin + chunk])
                twin.settle(next(told)[0])
        self.live.append(live)
        self._done(live, logits, told)

    @some(running)
    @rule(i=index, count=st.integers(1, 4))
    def generate(self, i: int, count: int) -> None:
        live, told = self._pick(i, running), self._told()
        for _ in range(count):
            logits = self._feed(live, told)
        self._done(live, logits, told)

    @some(running)
    @rule(i=index, counts=st.lists(st.integers(0, 9), min_size=2, max_size=2).filter(any))
    def append_a_turn(self, i: int, counts: list[int]) -> None:
        """Of as many tokens per row; 0 for some."""
        live, told = self._pick(i, running), self._told()
        active = live.session.active
        pieces = [self._ids(count) if on else [] for count, on in zip(counts, active, strict=False)]
        if not any(pieces):
            pieces[active.index(True)] = self._ids(max(counts))
        live.session.extend(pieces)
        logits: list[Tensor | None] = [None] * live.rows
        for begin in range(0, max(map(len, pieces)), live.chunk):
            fresh = live.absorb([ids[begin : begin + live.chunk] for ids in pieces], told)
            logits = [old if new is None else new for old, new in zip(logits, fresh, strict=True)]
        self._done(live, logits, told)

    @some(evicting)
    @rule(i=index, reclaimed=st.booleans())
    def go_on_to_the_next_eviction(self, i: int, reclaimed: bool) -> None:
        """Or to the next compaction."""
        live, told = self._pick(i, evicting), self._told()
        before = self._watch.compactions if reclaimed else self._watch.rounds
        for _ in range(2 * COMPACT_EVERY):
            logits = self._feed(live, told)
            if before < (self._watch.compactions if reclaimed else self._watch.rounds):
                break
        else:
            raise AssertionError("no eviction, or none that reclaims")
        self._done(live, logits, told)

    @precondition(lambda self: self.live)
    @rule(i=index, go_on=st.booleans())
    def save_and_load(self, i: int, go_on: bool) -> None:
        """The loaded session goes on beside the saved one, or in its place."""
        live, told = self._pick(i), self._told()
        path = Path(self._folder.name) / "session.safetensors"
        save_session(live.session, path, {"tokens": self._tokens})
        live.untouched()
        session, about = load_session(live.session.engine, path)
        assert about == {"tokens": self._tokens}
        loaded = live.fork(session)
        if go_on or len(self.live) == SESSIONS:
            self._drop(live)
        self.live.append(loaded)
        assert torch.equal(session.logits_BV, live.logits)
        self._done(loaded, [None] * loaded.rows, told)

    @precondition(lambda self: 0 < len(self.live) < SESSIONS)
    @rule(i=index, room=st.integers(0, 10), forked=st.integers(0, 4), old=st.integers(0, 4))
    def fork(self, i: int, room: int, forked: int, old: int) -> None:
        """And let first the one, then the other go on a little."""
        live, told = self._pick(i), self._told()
        twin = live.fork(live.session.fork(room))
        self.live.append(twin)
        self._done(twin, [None] * twin.rows, told)
        for each, count in ((twin, forked), (live, old)):
            if count and running(each):
                told = self._told()
                for _ in range(count):
                    logits = self._feed(each, told)
                self._done(each, logits, told)

    @some(single)
    @rule(i=index, question=st.integers(1, 9), answer=st.integers(1, 5))
    def ask(self, i: int, question: int, answer: int) -> None:
        """A question is answered as by a fork that is told it, and the context stays as it was."""
        live = self._pick(i, single)
        self._told()
        ids = self._ids(question)
        context = CompressedContext(LM(live.session.engine.model, None), live.session, self._tokens)
        got = context.ask(ids, max_new_tokens=answer).tokens
        told = iter(self._watch.kept)
        # A dry run on a fork of the twins: what they would say, and no session beside them.
        twin = Live(live.session, [live.twins[0].fork()], live.chunk, live.since)
        for begin in range(0, len(ids), live.chunk):
            (logits,) = twin.absorb([ids[begin : begin + live.chunk]], told)
        assert len(got) == answer
        for step, token in enumerate(got):
            assert logits is not None and logits.max() - logits[token] < CLOSE
            if step + 1 < answer:
                (logits,) = twin.absorb([[token]], told)
        self._done(None, [], told)

    @some(several)
    @rule(i=index, row=st.integers(0, 1))
    def end_a_row_or_go_on(self, i: int, row: int) -> None:
        live, told = self._pick(i, several), self._told()
        if live.session.active[row]:
            live.session.finish(row)
        else:
            live.session.resume(5)
        self._done(None, [], told)

    @precondition(lambda self: len(self.live) == SESSIONS)
    @rule(i=index)
    def drop(self, i: int) -> None:
        told = self._told()
        self._drop(self._pick(i))
        self._done(None, [], told)


def test_machine():
    Machine.steps = Machine.ties = 0
    chance = bool(os.environ.get("RESTKV_MACHINE_STEPS"))
    lives = 12 + 3 * STEPS // (2 * STEPS_OF_A_LIFE)  # hypothesis begins with short ones, and throws some away
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=lives,
            stateful_step_count=STEPS_OF_A_LIFE,
            derandomize=not chance,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{Machine.steps} steps, {Machine.ties} near ties")
    assert Machine.steps >= STEPS
