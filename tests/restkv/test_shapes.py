"""What a compiled step is given: few shapes in a server's life, and the same numbers as without padding.

Nothing is compiled here: the step's stand-in notes the shapes of its tensors.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bench.quality.teacher_forcing import logprobs
from make.effort import many
from make.places import environment
from make.policies import FOUR, LOPSIDED, POLICY, SOME
from make.small import eagerly, small_ids, small_model
from restkv import session as sessions
from restkv import sizing
from restkv.engine import COMPILED_SHAPES, Engine
from restkv.lm import LM
from restkv.masking import Entries, Shape
from restkv.policies import H2O, AdaKV, FullCache, LaCache, Policy, PyramidKV, ReSTKV, SnapKV, StreamingLLM
from restkv.session import Session
from restkv.sizing import FIXED

POSITIONS, ROWS = 4096, 8
SERVED: dict[str, Policy] = {
    "restkv": ReSTKV(1024),
    "restkv query": ReSTKV(64, granularity="query", interval=32),
    "restkv once": ReSTKV(128, interval=None),
    "restkv tenth": ReSTKV(0.1),
    "restkv part once": ReSTKV(0.3, interval=None, budget_by="adakv"),
    "restkv large": ReSTKV(20_000),
    "restkv seldom": ReSTKV(256, interval=100_000),
    "snapkv layers": SnapKV((64, 128)),
    "adakv": AdaKV(128),
    "pyramidkv": PyramidKV(256),
    "h2o": H2O(512),
    "h2o fifth": H2O(0.2),
    "h2o slot": H2O(100, positions="slot"),
    "streamingllm": StreamingLLM(2048),
    "lacache": LaCache(0.5, span=1),
    "full": FullCache(),
}


def shape_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """All that torch.compile makes a graph for."""
    _, ids, pos, lag, views, queries, window = arguments
    tensors = [ids, pos, lag, *(tensor for view in views for tensor in view), *queries]
    return (*(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors), window)


class Server:
    """A model behind flex whose steps only count tokens, one policy, and jobs of all kinds."""

    def __init__(self, policy: Policy, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy, self.dice = policy, random.Random(seed)
        self.shapes: dict[str, set[Any]] = defaultdict(set)
        self.lm = LM(small_model(), None, "flex")
        monkeypatch.setattr(self.lm.engine, "decode", self.noting("decode"))
        monkeypatch.setattr(self.lm.engine, "hidden", self.noting("hidden"))
        monkeypatch.setattr(self.lm.engine, "evict", self.evict)
        monkeypatch.setattr(sessions, "prefill", self.prefill)
        monkeypatch.setattr(sessions.Evictor, "round", self.round)
        monkeypatch.setattr(sessions.Evictor, "reclaim", self.round)
        monkeypatch.setattr(sessions.Evictor, "_align", lambda *_: None)

    def noting(self, name: str) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            self.shapes[name].add(shape_of(arguments))
            _, ids_BT, pos_BT, _, views, *_ = arguments
            for view in views:
                view.used.add_(
                    (pos_BT >= 0).sum(-1, dtype=torch.int32).repeat_interleave(len(view.used) // len(ids_BT))
                )
            return torch.zeros(len(ids_BT), 23) if name == "decode" else torch.zeros(*ids_BT.shape, 24)

        return run

    def evict(self, policy: Policy, shape: Shape, layers: list[Entries], *others: Tensor) -> Tensor:
        tensors = [tensor for layer in layers for tensor in layer if isinstance(tensor, Tensor)]
        self.shapes["evict"].add((shape, *(t.shape for t in [*tensors, *others])))
        return torch.tensor([1, self.policy.budget_for(POSITIONS)])

    def prefill(self, model, cache, evictor, ids, *_: Any) -> Tensor:
        """What a prompt leaves behind, in numbers."""
        for layer, (budget,) in zip(cache.layers, evictor.budgets, strict=True):
            layer.reserve(min(len(ids), budget))
            layer.used.add_(min(len(ids), budget))
        evictor.prompt_done(cache, len(ids))
        return torch.zeros(1, 24)

    @staticmethod
    def round(evictor, cache, *_: Any, **__: Any) -> bool:
        """Back to the budgets, pages included."""
        for layer, budgets in zip(cache.layers, evictor.budgets, strict=True):
            layer.own()
            layer.used.clamp_(max=torch.tensor(budgets).repeat_interleave(layer.heads))
            for pages, used in zip(layer.lists, layer.lengths(), strict=True):
                needed = -(-used // layer.pool.page)
                layer.pool.release(pages[needed:])
                del pages[needed:]
            layer.refresh()
        return True

    def some(self, most: int) -> int:
        """Small numbers as often as large ones."""
        return min(most, int(math.exp(self.dice.uniform(0, math.log(most + 1)))))

    def session(self, rows: int, **how: Any) -> Session:
        lengths = [self.some(POSITIONS) for _ in range(rows)]
        session = Session(self.lm.engine, self.policy, lengths, self.some(POSITIONS), **how)
        session.prefill([[0] * length for length in lengths])
        return session

    def answer(self, session: Session) -> None:
        """A token, and as many more as may come before the next eviction, at a stroke."""
        session.feed(torch.zeros(len(session.active), dtype=torch.long))
        more = min(self.some(POSITIONS), session.schedule.period - 1 if session.schedule.period else POSITIONS)
        session.cache.reserve(
            [more if on else 0 for on in session.active] + [0] * (session.cache.rows - len(session.active))
        )
        for layer in session.cache.layers:
            layer.used[: len(session.active) * layer.heads].add_(more)
        session.schedule.room = 0
        if not session.schedule.period:
            session.feed(torch.zeros(len(session.active), dtype=torch.long))

    def job(self) -> None:
        kind = self.dice.choice(["generate", "generate", "chunked", "chat", "context", "logprobs"])
        if kind == "generate":
            self.answer(self.session(self.dice.randint(1, ROWS)))
        elif kind == "chunked":
            self.answer(self.session(self.dice.randint(1, ROWS), prefill="chunked"))
        elif kind == "logprobs":
            session = self.session(1, forks=1)
            self.answer(session.fork())
            logprobs(session, [[0] * self.some(600)])
        elif kind == "chat":
            session = self.session(1, extends=True)
            session.extend([[0] * self.some(600)])
            self.answer(session)
        else:
            session = self.session(1, extends=True, forks=1)
            fork = session.fork(self.some(POSITIONS))
            fork.extend([[0] * self.some(600)])
            self.answer(fork)


def few(policy: Policy, jobs: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's life, and the bound of docs/performance.md."""
    server = Server(policy, seed, monkeypatch)
    with torch.no_grad():
        for _ in range(jobs):
            server.job()
    sizes = 2 + int(math.log2(POSITIONS / 256))
    bound = 2 * ((1 + int(math.log2(ROWS))) * sizes + sizes + int(math.log2(ROWS)))
    for name, shapes in server.shapes.items():
        assert len(shapes) <= min(bound, 64, COMPILED_SHAPES), (name, len(shapes))


TOO_MANY = """
import warnings
import torch
from make.small import small_ids, small_lm
from restkv import engine
from restkv.policies import FullCache, ReSTKV

torch._dynamo.config.recompile_limit = engine.COMPILED_SHAPES = 1
lm, ids = small_lm("flex", head_dim=16), small_ids(30)
policies = [ReSTKV(20, window=4, interval=8), ReSTKV(300, window=4, interval=8), FullCache()]
eager = small_lm(head_dim=16)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for policy in [*policies, policies[0]]:
        want = eager.generate(ids, policy, max_new_tokens=12)
        got = lm.generate(ids, policy, max_new_tokens=12)
        assert (got.tokens, got.stats.kept) == (want.tokens, want.stats.kept), policy
    context = lm.compress(ids, policies[1])
    assert context.ask([1, 2], max_new_tokens=9).tokens == eager.compress(ids, policies[1]).ask([1, 2], max_new_tokens=9).tokens
said = [str(one.message) for one in seen if "torch.compile allows" in str(one.message)]
assert len(said) == 1 and "\\n" not in said[0] and "go on with sdpa" in said[0], said
assert lm.backend == "flex"
"""


@pytest.mark.slow  # it compiles for long: not the last of the slow tests, or a worker would wait for it
def test_beyond_the_limit_answers_go_on_with_sdpa():
    ran = subprocess.run([sys.executable, "-c", TOO_MANY], env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("policy", SERVED.values(), ids=SERVED)
def test_a_servers_life_has_few_shapes(policy, monkeypatch):
    """1,000 random jobs in all: prompts and answers of up to 4,096 tokens, up to 8 rows, chunks, chats, contexts, scores."""
    few(policy, 400 if policy.budget is None else 40, 0, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("policy", SERVED.values(), ids=SERVED)
def test_so_has_a_long_one(policy, monkeypatch):
    few(policy, many(1000), 1, monkeypatch)


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, 3) for name in POLICY), *((name, 5) for name in SOME), ("restkv", 1)]
)
def test_rows_and_tokens_that_are_only_padding_change_nothing(name, rows):
    """Three rows are computed as four, chunks of 9 tokens as 16: the numbers and what is kept are those of three and 9."""
    policy, prompts = (
        POLICY[name],
        [[1 + token % 20 for token in small_ids(12 + 7 * row, seed=row)] for row in range(rows)],
    )
    if name == "restkv part":
        prompts = [[*ids, *small_ids(20)] for ids in prompts]
    said = []
    for backend in ("sdpa", "flex"):
        engine = eagerly(Engine(small_model(4, windows=FOUR), backend))
        session = Session(engine, policy, [len(ids) for ids in prompts], 20, chunk=9, extends=True, forks=1)
        session.prefill(prompts)
        session.extend([small_ids(5 + 9 * (row % 2), seed=row) if row != 1 else [] for row in range(rows)])
        session.finish(rows - 1)
        for token in range(12):
            session.feed(torch.tensor([token] * rows))
        judged = logprobs(session.fork(), [[1, 2, 3]] * rows)
        assert len(session.logits_BV) == len(judged) == rows
        said.append(
            (
                session.logits_BV[: max(1, rows - 1)],
                judged,
                session.kept(),
                session.evictor.evictions,
                session.evictor.max_live,
            )
        )
    torch.testing.assert_close(said[0][:2], said[1][:2], atol=1e-4, rtol=1e-4)
    assert said[0][2:] == said[1][2:]


@pytest.mark.parametrize("name", SOME)
def test_answers_of_padded_batches(name):
    policy = POLICY[name]
    prompts = [[1 + token % 20 for token in small_ids(40 + row, seed=row)] for row in range(3)]
    eager, padded = LM(small_model(4, windows=FOUR), None), LM(small_model(4, windows=FOUR), None, "flex")
    eagerly(padded.engine)
    for options in ({}, {"prefill": "chunked", "chunk": 9}):
        want, got = (lm.generate(prompts, policy, max_new_tokens=20, **options) for lm in (eager, padded))
        assert [row.tokens for row in got] == [row.tokens for row in want]
        for name in ("seen", "kept", "max_kept", "live_bytes", "evictions", "full_bytes", "new_tokens"):
            assert getattr(got[0].stats, name) == getattr(want[0].stats, name), name


BOUNDED = {
    "snapkv": SnapKV(96),
    "snapkv large": SnapKV(10_000),
    "pyramidkv": PyramidKV(96),
    "restkv pyramid": ReSTKV(600, budget_by="pyramid"),
    "adakv": AdaKV(96),
    "restkv": ReSTKV(300),
}


@pytest.mark.parametrize("policy", BOUNDED.values(), ids=BOUNDED)
def test_a_budget_in_entries_makes_one_eviction_whatever_the_prompt(policy, monkeypatch):
    """PyramidKV shares its budget out by the length of the prompt, and a large one has room for the prompt alone."""
    server = Server(policy, 3, monkeypatch)
    server.lm = lm = LM(small_model(windows=(None,) * 6), None, "flex")
    for name in ("decode", "evict"):
        monkeypatch.setattr(lm.engine, name, server.evict if name == "evict" else server.noting(name))
    with torch.no_grad():
        for length in (60, 90, 110, 150, 1000, 3000, 9880, 9990, 20_000):
            session = Session(lm.engine, policy, [length], 600)
            session.prefill([[0] * length])
            for _ in range(140):
                session.feed(torch.zeros(1, dtype=torch.long))
    kinds, pools = (server.shapes[name] for name in ("evict", "decode"))
    assert 1 <= len(kinds) <= len(pools)  # a large cache grows with its prompt
    assert len(pools) == 1 or policy.budget > FIXED


def test_longer_lists_than_before_are_evicted_eagerly(monkeypatch):
    """... and through the graph that there is when they fit again: the eager twin's answers, and one shape."""
    monkeypatch.setattr(sizing, "PATIENCE", 5)
    eager, compiled = LM(small_model(4), None), LM(small_model(4), None, "flex")
    asked = Mock(wraps=eagerly(compiled.engine).evict)
    compiled.engine.evict = asked  # type: ignore[method-assign]
    pages = []
    for length in (380, 1200, 390, 1200):
        said = [lm.generate(small_ids(length), LOPSIDED, max_new_tokens=80) for lm in (eager, compiled)]
        assert said[0].tokens == said[1].tokens and said[0].stats.kept == said[1].stats.kept
        assert said[0].stats.evictions == said[1].stats.evictions
        pages.append({call.args[1].pages for call in asked.call_args_list})
        asked.reset_mock()
    first, eagerly_done, fits, patient = pages
    assert len(first) == 1 and not eagerly_done - first and fits == first and max(patient) > max(first)
