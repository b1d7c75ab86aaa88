"""Probes, by hypothesis, against a dense model that reads everything (twins/probed.py), over random models, policies, budgets and
batches. Models compute in float64.

Letters: L tokens of a prompt, H query heads, K KV heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.models import MODELS, model_of
from make.effort import many
from make.small import small_ids
from modeling.layers import Decoder
from restkv import drafting, probes, schedule
from restkv.engine import Engine
from restkv.errors import PolicyError
from restkv.observe import Observation
from restkv.phrases import Phrases
from restkv.policies import Policy, get_policy
from restkv.session import Session
from restkv.testing.dense import Dense
from restkv.testing.watch import positions, snapshot
from twins import probed

FEW, MANY = many(40, 2), many(600)
FIRST, LATER, ASKED, CLOSING = (3, 5), (6,), ((7, 8, 9), (1, 2)), (4,)
WRITE, WORDS, REPLY = (
    (8, 2),
    ((11,), (12, 13)),
    (14, 15),
)  # what asks for a question, its first words, what asks for its answer
DRAFTED = 4, 2  # tokens of a question of the model's own and of its answer


class Words(Phrases):
    """Requests of few tokens, as they would come from a tokenizer."""

    def __init__(self) -> None:
        super().__init__()

    def request(self, text: str, quoted: Sequence[int] = ()) -> tuple[int, ...]:
        if text.startswith("Question: "):
            return (*ASKED[probes.QUESTIONS.index(text.removeprefix("Question: "))], *CLOSING)
        if text.startswith("Write a question"):
            return (*WRITE, *CLOSING)
        return (*(LATER if quoted else FIRST), *quoted, *CLOSING)

    def begin(self, text: str) -> tuple[int, ...]:
        return WORDS[probes.BEGINNINGS.index(text)]

    def reply(self, text: str) -> tuple[int, ...]:
        return REPLY


@dataclass(frozen=True)
class Job:
    """Prompts, the policy that evicts them, and how its probe asks."""

    traits: tuple[tuple[str, Any], ...]  # of the model
    policy: Policy
    lengths: tuple[int, ...]
    piece: int
    gap: int
    words: bool
    eos: bool  # the model may end its drafts, by every third token
    texts: int  # drafted at once
    seed: int

    @property
    def prompts(self) -> list[list[int]]:
        return [small_ids(length, self.seed + row) for row, length in enumerate(self.lengths)]

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(range(0, 23, 3)) if self.eos else ()

    @property
    def settings(self) -> probed.Settings:
        if not self.words:
            return probed.Settings(self.piece, self.gap, eos=self.ends)
        first, later = (*FIRST, *CLOSING), (LATER, CLOSING)
        asked = [(*question, *CLOSING) for question in ASKED]
        begun = [(*WRITE, *CLOSING, *words) for words in WORDS]
        return probed.Settings(self.piece, self.gap, first, later, asked, self.ends, begun, REPLY, DRAFTED)

    def model(self) -> Decoder:
        return model_of(True, **dict(self.traits))

    def session(self, policy: Policy | None = None, rows: Sequence[int] | None = None, new: int = 0) -> Session:
        """A session that has read the prompts (of some rows)."""
        rows, model = range(len(self.lengths)) if rows is None else rows, self.model()
        engine = Engine(model, "sdpa", phrases=Words() if self.words else Phrases())
        session = Session(engine, policy or self.policy, [self.lengths[row] for row in rows], new)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probes, "PIECE", self.piece)
            patch.setattr(probes, "QUESTIONS", probes.QUESTIONS[: len(ASKED)])
            patch.setattr(probes, "BEGINNINGS", probes.BEGINNINGS[: len(WORDS)])
            patch.setattr(probes, "ASKED", DRAFTED[0])
            patch.setattr(probes, "ANSWERED", DRAFTED[1])
            patch.setattr(drafting, "TEXTS", self.texts)
            patch.setattr(probes.Own, "gap", self.gap)
            patch.setattr(model, "config", replace(model.config, eos_token_ids=self.ends))
            session.prefill([self.prompts[row] for row in rows])
        return session


SNAPKV = {
    "pooling": st.sampled_from(["none", "none", "avg", "max"]),
    "kernel_size": st.sampled_from([3, 5]),
    "reduction": st.sampled_from(["mean", "max"]),
    "gqa": st.sampled_from(["mean", "max"]),
}
SHARES = st.sampled_from(["uniform", "pyramid", "adakv", "global"])
SCORED = st.one_of(
    st.fixed_dictionaries({"name": st.just("snapkv"), "budget_by": SHARES, **SNAPKV}),
    st.fixed_dictionaries({"name": st.just("adakv"), **SNAPKV}),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["kvzip", "kvzip-plus"]), "gqa": st.sampled_from(["max", "max", "mean"])}
    ),
    st.fixed_dictionaries(
        {
            "name": st.just("restkv"),
            "budget_by": SHARES,
            "gqa": st.sampled_from(["mean", "max", "joint"]),
            "aggregate": st.sampled_from(["attention", "indicator"]),
            "drift": st.sampled_from(["released", "symmetric"]),
            "pooling": st.sampled_from(["adaptive", "avg", "max", "none"]),
            "kernel_size": st.sampled_from([1, 3]),
            "scale": st.sampled_from([2, 2000]),
            "alpha": st.sampled_from([None, 0.3]),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just("restkv"),
            "aggregate": st.just("indicator"),
            "reduction": st.just("max"),
            "relative": st.booleans(),
            "budget_by": SHARES,
            "gqa": st.sampled_from(["mean", "max"]),
            "pooling": st.sampled_from(["adaptive", "max", "none"]),
            "scale": st.sampled_from([2, 2000]),
        }
    ),
)
SINGLE = ["window", "prompt", "prompt:3", "draft:1", "draft:9", "replay", "questions", "questions:3", "ask:1", "ask:2"]
JOINED = [
    "prompt+draft:3",
    "window+prompt",
    "draft+questions",
    "replay+window",
    "prompt+replay",
    "questions+draft:3+prompt+replay",
    "ask:2+replay",
    "questions:4+draft:2+window+ask:2",
]
PROBES = st.sampled_from([*SINGLE, *JOINED])


@st.composite
def policies(draw: Callable) -> Policy:
    options = dict(draw(SCORED))
    if options.get("gqa") != "joint":
        options["granularity"] = draw(st.sampled_from(["kv", "kv", "query"]))
    window, sinks = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    budget = window + sinks + draw(st.integers(0, 9))
    probe = draw(PROBES)
    return get_policy(
        options.pop("name"), **options, window=window, sinks=sinks, budget=budget, probe=probe, interval=None
    )


@st.composite
def jobs(draw: Callable, rows: int = 1) -> Job:
    policy = draw(policies())
    return Job(
        traits=tuple(draw(MODELS).items()),
        policy=policy,
        lengths=tuple(draw(st.lists(st.integers(20, 36) | st.integers(1, 30), min_size=rows, max_size=rows))),
        piece=draw(st.sampled_from([3, 7, 11, 2048])),
        gap=draw(st.sampled_from([1, 4, 64])),
        words="questions" in policy.probe or "ask" in policy.probe or draw(st.booleans()),
        eos=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
        texts=draw(st.sampled_from([1, 2, 32])),
    )


def laws(strategy: st.SearchStrategy, few: int = FEW, many: int = MANY) -> Callable[[Callable], Callable]:
    """A test over few random jobs on every run and over many with -m slow."""

    def decorate(body: Callable) -> Callable:
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(examples: int) -> None:
            @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
            @given(strategy)
            @torch.no_grad()
            def law(job: Job) -> None:
                try:
                    body(job)
                except PolicyError as error:  # a pyramid's last layer may be too small for what is protected
                    assume("protected" not in str(error))
                    raise

            law()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


def held(session: Session) -> list[list[list[int]]]:
    """[layer][row * heads + head]: positions."""
    return [positions(lists) for lists in snapshot(session.cache)]


@contextmanager
def scores_seen() -> Iterator[list[Tensor]]:
    """The scores [X, L] that evictions rank entries by, layer by layer."""
    seen: list[Tensor] = []
    ranking = Policy.ranking

    def spy(policy: Policy, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        ranked = ranking(policy, obs)
        seen.append(ranked[0][0].masked_fill(ranked[2][0], 0))
        return ranked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "ranking", spy)
        yield seen


@laws(jobs())
def test_a_dense_model_that_reads_everything_scores_and_keeps_the_same(job: Job) -> None:
    """Positions, keys, values and logits; of what the probe read nothing is left."""
    with scores_seen() as mine:
        session = job.session()
    model, policy, (prompt,) = job.model(), job.policy, job.prompts
    theirs, want = probed.kept(model, policy, policy.probe, prompt, job.settings)
    squared = (
        policy.name == "restkv" and vars(policy)["reduction"] == "max"
    )  # distances from squares lose half of the digits
    for mine_XL, theirs_XL in zip(mine, theirs, strict=True):
        torch.testing.assert_close(mine_XL, mine_XL.new_tensor(theirs_XL), rtol=1e-6, atol=1e-7 if squared else 1e-12)
    assert [[sorted(head) for head in layer] for layer in want] == held(session)
    dense = Dense(model)
    logits_V = dense.run(prompt)
    for layer, lists in enumerate(snapshot(session.cache)):
        for head, entries in enumerate(lists):
            torch.testing.assert_close(entries.k, dense.k[layer][entries.pos, head])
            torch.testing.assert_close(entries.v, dense.v[layer][entries.pos, head])
    assert float((logits_V - session.logits_BV[0]).abs().max()) < 1e-8
    assert torch.equal(session.logits_BV, job.session(replace(policy, probe="window")).logits_BV)
    assert session.cache.next_pos.tolist() == [len(prompt)]


@laws(jobs(rows=3), few=many(20, 2), many=many(150))
def test_a_row_of_a_batch_is_the_prompt_alone_and_masked_is_compacted(job: Job) -> None:
    """And so it stays while more is fed: later evictions observe what any session observes."""
    policy, tokens = replace(job.policy, interval=3), torch.tensor(small_ids(24, job.seed)).view(8, 3)
    together = replace(job, policy=policy).session(new=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "COMPACT_EVERY", 1)
        compacted = replace(job, policy=policy).session(new=8)
    alone = [replace(job, policy=policy).session(rows=[row], new=8) for row in range(3)]
    for ids_B in (None, *tokens):
        if ids_B is not None:
            for session in (together, compacted):
                session.feed(ids_B)
            for row, session in enumerate(alone):
                session.feed(ids_B[row : row + 1])
        logits_BV = torch.cat([session.logits_BV for session in alone])
        assert float((together.logits_BV - logits_BV).abs().max()) < 1e-8
        assert float((compacted.logits_BV - logits_BV).abs().max()) < 1e-8
        for mine, others, *single in zip(held(together), held(compacted), *map(held, alone), strict=True):
            assert mine == others == [head for heads in single for head in heads]
