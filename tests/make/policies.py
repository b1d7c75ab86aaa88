"""Every policy at a small budget, and variants of some: what tests of a whole engine run over."""

from __future__ import annotations

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
