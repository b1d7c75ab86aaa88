"""KVzip and KVzip+ against scores and kept sets recorded from NVIDIA kvpress 0.5.5 (bench/speed/peers/README.md), and slow twins.

Letters: N layers, K KV heads, L prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from make.effort import many
from make.places import DATA
from make.zipped import CASES, FIRST, LATER, SUFFIX, Case, llama
from modeling.checkpoint.loading import load_model
from restkv import probes
from restkv.engine import Engine
from restkv.observe import Observation
from restkv.phrases import Phrases
from restkv.policies import KVzip, KVzipPlus, Policy
from restkv.session import Session
from restkv.testing.cases import shapes
from restkv.testing.observed import observation, root_for, sizes_of
from restkv.testing.watch import positions, snapshot
from twins import reference

RECORDED = load_file(DATA / "kvzip" / "kvzip.safetensors")


class Requests(Phrases):
    """The recorded ones."""

    def request(self, text: str, quoted: Sequence[int] = ()) -> tuple[int, ...]:
        return (*(LATER if quoted else FIRST), *quoted, *SUFFIX)


@torch.no_grad()
def zipped(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, cls: type[KVzip] = KVzip
) -> tuple[Tensor, Tensor]:
    """Scores and kept entries [N, K, L] of half a budget."""
    llama(case).save_pretrained(folder)
    scores: list[Tensor] = []
    ranking = Policy.ranking

    def spy(policy: Policy, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        ranked = ranking(policy, obs)
        scores.append(ranked[0][0])
        return ranked

    monkeypatch.setattr(Policy, "ranking", spy)
    monkeypatch.setattr(probes, "PIECE", case.piece)
    engine = Engine(load_model(folder), "sdpa", phrases=Requests())
    session = Session(engine, cls(case.length // 2, window=1), [case.length], 1)
    session.prefill([case.ids])
    kept_NKL = torch.zeros(case.layers, case.kv_heads, case.length, dtype=torch.bool)
    for index, lists in enumerate(snapshot(session.cache)):
        for head, held in enumerate(positions(lists)):
            kept_NKL[index, head, held] = True
    return torch.stack(scores), kept_NKL


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cls", [KVzip, KVzipPlus])
def test_scores_and_kept_entries_are_those_of_kvpress(case, cls, tmp_path, monkeypatch):
    """But for the newest entry, which always stays here: each head that would drop it drops one more of its lowest scores.

    kvpress raises the scores of the first 4 entries above all others; later pieces attend to them, and here so score them.
    """
    score_NKL, kept_NKL = zipped(case, tmp_path, monkeypatch, cls)
    if cls is KVzip:
        theirs_NKL, their_kept_NKL = RECORDED[f"{case.seed}.score_NKL"], RECORDED[f"{case.seed}.kept_NKL"].bool()
    else:
        theirs_NKL = RECORDED[f"{case.seed}.plus_NKL"]
        their_kept_NKL = best(theirs_NKL, case.layers * case.kv_heads * (case.length // 2))
    torch.testing.assert_close(score_NKL[..., 4:], theirs_NKL[..., 4:], rtol=1e-5, atol=2e-6)
    assert kept_NKL[..., :4].all() and kept_NKL[..., -1].all() and kept_NKL.sum() == their_kept_NKL.sum()
    more_NKL = kept_NKL & ~their_kept_NKL
    assert not more_NKL[..., :-1].any()
    gone_NKL, free_NKL = their_kept_NKL & ~kept_NKL, kept_NKL.clone()
    free_NKL[..., :4] = free_NKL[..., -1] = False
    assert gone_NKL.any() == more_NKL.any()
    if gone_NKL.any():
        assert theirs_NKL[gone_NKL].max() < theirs_NKL[free_NKL].min()


def best(score_NKL: Tensor, count: int) -> Tensor:
    """So many entries, the first 4 of each head and the highest scores."""
    kept_NKL = torch.zeros_like(score_NKL, dtype=torch.bool)
    raised_NKL = score_NKL.clone()
    raised_NKL[..., :4] = torch.inf
    kept_NKL.view(-1)[raised_NKL.flatten().topk(count).indices] = True
    return kept_NKL


@settings(max_examples=many(100, 2))
@given(
    shape=shapes,
    cls=st.sampled_from([KVzip, KVzipPlus]),
    gqa=st.sampled_from(["max", "mean"]),
    granularity=st.sampled_from(["kv", "query"]),
    per_head=st.booleans(),
    known=st.booleans(),
)
def test_equal_their_slow_twins(shape, cls, gqa, granularity, per_head, known):
    """W_O as it is, one query and one entry at a time; with and without lengths of hidden states."""
    policy = cls(64, gqa=gqa, granularity=granularity)
    obs, w_o = observation(**shape, per_head=per_head and granularity == "query")
    obs = replace(obs, root=root_for(policy, w_o, shape["kv_heads"]), sizes=sizes_of(obs) if known else None)
    got, want = policy.score(obs).numpy(), reference.scores(policy, obs, w_o)
    promised = ~np.isnan(want)
    np.testing.assert_allclose(got[promised], want[promised], rtol=1e-9, atol=1e-15)


def test_a_length_that_divides_is_the_querys_own():
    """Of two queries the one from a stream ten times as long counts a tenth."""
    obs, w_o = observation(queries=2, group=1, kv_heads=1)
    policy = KVzipPlus(64)
    obs = replace(obs, root=root_for(policy, w_o, 1))
    alone = [policy.score(replace(obs, q=obs.q[:, :, [w]], q_pos=obs.q_pos[:, [w]])) for w in range(2)]
    sizes = torch.tensor([[[7.0, 7.0], [1.0, 10.0]]])
    want = torch.maximum(alone[0], alone[1] / 10)
    torch.testing.assert_close(policy.score(replace(obs, sizes=sizes)), want)
