"""Every policy at a small budget, and variants of some: what tests of a whole engine run over."""

from __future__ import annotations

import torch
from torch import Tensor

from restkv.observe import Observation
from restkv.policies import H2O, POLICIES, LaCache, ReSTKV, SnapKV, StreamingLLM, get_policy

FOUR = (None,) * 4  # layers: LaCache's shortest ladders need as many
POLICY = {
    name: get_policy(name, None, **({} if name == "full" else {"budget": 20, "interval": 8}), **more)
    for name in POLICIES
    for more in [{"window": 4} if POLICIES[name].window > 20 and name != "full" else {}]
} | {
    "restkv once": ReSTKV(20, window=4, interval=None),
    "restkv query": ReSTKV(20, window=4, interval=8, granularity="query"),
    "restkv joint global": ReSTKV(20, window=4, interval=8, gqa="joint", budget_by="global"),
    "restkv part": ReSTKV(0.3, window=4, interval=8, protect=((5, 9),)),
    "snapkv layers": SnapKV((12, 20, 28, 12), window=4, interval=8),
    "h2o every step": H2O(20),
    "h2o query": H2O(20, interval=8, granularity="query"),
    "h2o slot": H2O(20, interval=8, positions="slot"),
    "streamingllm every step": StreamingLLM(20),
    "lacache every step": LaCache(20),
}
SOME = ("restkv", "restkv joint global", "restkv part", "h2o slot", "lacache", "full")


class Lopsided(SnapKV):
    """The longer the prompt, the more of the model's budget the first head of a layer takes."""

    name = "lopsided"

    def importance(self, obs: Observation) -> Tensor:
        place_H1 = torch.arange(obs.q.shape[1], device=obs.q.device)[:, None]
        ahead_B11 = obs.q_pos[:, -1:, None] * (place_H1 < obs.group)
        return super().importance(obs) * (1 + ahead_B11)


LOPSIDED = Lopsided(400, window=4, interval=16, budget_by="global")
