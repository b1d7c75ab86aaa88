"""A text read by many policies side by side and in pieces is what each of them reads alone, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import restkv
from bench.quality.distance import Judged, Told, read
from bench.quality.kept import kept_masks
from bench.runs.together import answer_together, prefill_all
from make.small import small_ids
from modeling.families.registry import FAMILIES
from restkv.lm import LM
from restkv.policies import FullCache, Policy
from restkv.session import Session
from restkv.testing.models import tiny_lm

POLICIES: tuple[Policy, ...] = (
    restkv.SnapKV(budget=12, window=4, interval=None),
    restkv.ReSTKV(budget=10, window=4, interval=None),
    restkv.ReSTKV(budget=0.5, window=3, interval=None, probe="draft:3"),
    restkv.SnapKV(budget=8, window=3, interval=None, probe="replay"),
    restkv.SnapKV(budget=9, window=3, granularity="query", interval=None),
    restkv.H2O(budget=8, interval=None),
    restkv.StreamingLLM(budget=9, interval=None),
    restkv.AdaKV(budget=12, window=4, interval=None),
    restkv.SnapKV(budget=12, window=4, interval=7),  # evicts within most texts, and reads them token by token
    restkv.TOVA(budget=9, interval=1),
)


@cache
def model(family: str) -> LM:
    return tiny_lm(family, 5)


@torch.no_grad()
def slow(lm: LM, policy: Policy, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Log-probabilities [T, V] after each token but the last one."""
    session = Session(lm.engine, policy, [len(prompt)], len(text))
    session.prefill([prompt])
    seen = []
    for token in text[:-1]:
        session.feed(torch.tensor([token]))
        seen.append(session.logits_BV[0].double())
    return torch.stack(seen).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(
    st.integers(14, 60),
    st.sampled_from((2, 3, 9, 65, 66, 70)),
    st.lists(st.sampled_from(POLICIES), min_size=1, max_size=5, unique=True),
    st.integers(0, 1000),
)
def test_reading_in_pieces_is_reading_by_tokens(
    family: str, length: int, tail: int, some: list[Policy], seed: int
) -> None:
    lm, policies = model(family), [FullCache(), *some]
    ids = small_ids(length + tail, seed)
    prompt, (first, *rest) = ids[:length], ids[length:]
    groups = answer_together(lm, policies, length, tail, extends=True)
    prefill_all(lm, groups, prompt)
    full_TV = slow(lm, FullCache(), prompt, [first, *rest])
    told = Told(torch.tensor(rest))
    told.see(0, full_TV)
    for group in groups:
        judged = [Judged(told) for _ in group.policies]
        read(group.session, [first], rest, judged)
        for policy, one in zip(group.policies, judged, strict=True):
            log_TV = slow(lm, policy, prompt, [first, *rest])
            found = one.measures()
            assert found["kl"] == pytest.approx(float((full_TV.exp() * (full_TV - log_TV)).sum(-1).mean()), abs=2e-5)
            said_T = log_TV.gather(1, torch.tensor(rest)[:, None])
            assert found["nll"] == pytest.approx(-float(said_T.mean()), abs=2e-5)
            assert found["top1"] == pytest.approx(
                float((log_TV.argmax(-1) == full_TV.argmax(-1)).double().mean()), abs=1.1 / len(rest)
            )


MAKERS: tuple[Callable[..., Policy], ...] = (
    restkv.SnapKV,
    restkv.ReSTKV,
    partial(restkv.SnapKV, reduction="max"),
    *(partial(restkv.ReSTKV, pooling=pooling, budget_by="uniform") for pooling in ("none", "adaptive")),
    *(partial(restkv.ReSTKV, alpha=0.3, tau=tau, drift="symmetric") for tau in (0, 1)),
    *(partial(restkv.ReSTKV, aggregate="indicator", output_weight=output) for output in (True, False)),
    partial(restkv.ReSTKV, aggregate="indicator", reduction="max", relative=True, pooling="none"),
)
PROBES = ("window", "prompt", "draft:5", "draft:3", "replay", "prompt+draft:5", "window+prompt+draft:3+replay")


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(("llama", "gemma2", "mistral")),
    st.integers(12, 50),
    st.lists(
        st.tuples(
            st.sampled_from(MAKERS), st.sampled_from(PROBES), st.sampled_from(("kv", "query")), st.sampled_from((9, 12))
        ),
        min_size=2,
        max_size=6,
    ),
    st.integers(0, 1000),
)
def test_one_reading_for_many_probes_leaves_what_each_alone_would_have(
    family: str, length: int, kinds: list[tuple[Callable[..., Policy], str, str, int]], seed: int
) -> None:
    lm, ids = model(family), small_ids(length, seed)
    policies = [
        make(budget=budget, window=4, interval=None, probe=probe, granularity=granularity)
        for make, probe, granularity, budget in kinds
    ]
    groups = answer_together(lm, policies, length, 1, extends=True)
    prefill_all(lm, groups, ids)
    for group in groups:
        for row, policy in enumerate(group.policies):
            alone = Session(lm.engine, policy, [length], 1)
            alone.prefill([ids])
            assert torch.equal(group.session.logits_BV[row], alone.logits_BV[0])
            for mine, theirs in zip(kept_masks(group.session, length, row), kept_masks(alone, length), strict=True):
                assert torch.equal(mine, theirs), policy
