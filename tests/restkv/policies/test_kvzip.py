"""KVzip against scores and kept sets recorded from NVIDIA kvpress 0.5.5 (bench/speed/peers/README.md).

Letters: N layers, K KV heads, L prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from make.places import DATA
from make.zipped import CASES, FIRST, LATER, SUFFIX, Case, llama
from modeling.checkpoint.loading import load_model
from restkv import probes
from restkv.engine import Engine
from restkv.observe import Observation
from restkv.policies import KVzip, Policy
from restkv.probes import Phrases
from restkv.session import Session
from restkv.testing.watch import positions, snapshot

RECORDED = load_file(DATA / "kvzip" / "kvzip.safetensors")


class Requests(Phrases):
    """The recorded ones."""

    def request(self, text: str, quoted: Sequence[int] = ()) -> tuple[int, ...]:
        return (*(LATER if quoted else FIRST), *quoted, *SUFFIX)


@torch.no_grad()
def zipped(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
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
    session = Session(engine, KVzip(case.length // 2, window=1), [case.length], 1)
    session.prefill([case.ids])
    kept_NKL = torch.zeros(case.layers, case.kv_heads, case.length, dtype=torch.bool)
    for index, lists in enumerate(snapshot(session.cache)):
        for head, held in enumerate(positions(lists)):
            kept_NKL[index, head, held] = True
    return torch.stack(scores), kept_NKL


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_and_kept_entries_are_those_of_kvpress(case, tmp_path, monkeypatch):
    """But for the newest entry, which always stays here: each head that would drop it drops one more of its lowest scores.

    kvpress raises the scores of the first 4 entries above all others; later pieces attend to them, and here so score them.
    """
    score_NKL, kept_NKL = zipped(case, tmp_path, monkeypatch)
    theirs_NKL, their_kept_NKL = RECORDED[f"{case.seed}.score_NKL"], RECORDED[f"{case.seed}.kept_NKL"].bool()
    torch.testing.assert_close(score_NKL[..., 4:], theirs_NKL[..., 4:], rtol=1e-5, atol=2e-6)
    assert kept_NKL[..., :4].all() and kept_NKL[..., -1].all() and kept_NKL.sum() == their_kept_NKL.sum()
    more_NKL = kept_NKL & ~their_kept_NKL
    assert not more_NKL[..., :-1].any()
    gone_NKL, free_NKL = their_kept_NKL & ~kept_NKL, kept_NKL.clone()
    free_NKL[..., :4] = free_NKL[..., -1] = False
    assert gone_NKL.any() == more_NKL.any()
    if gone_NKL.any():
        assert theirs_NKL[gone_NKL].max() < theirs_NKL[free_NKL].min()
