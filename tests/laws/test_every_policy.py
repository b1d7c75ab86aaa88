"""Every policy of ours, in every variant, keeps the laws of restkv.testing; and what only these policies promise.

What a policy's score should be is the business of its own tests.

Letters: B batch rows, L prompt length, V vocabulary.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from laws.law import Watch, watched
from make.effort import IN_CI, many
from make.small import small_ids, small_model
from modeling.layers import Decoder
from restkv.budgets import Global, Pyramid
from restkv.engine import Engine
from restkv.errors import PolicyError
from restkv.observe import Observation, attention_BHWC
from restkv.policies import POLICIES, FullCache, LaCache, Policy, get_policy
from restkv.policies.slots import Slotted
from restkv.sampling import Sampling
from restkv.session import Session
from restkv.testing import check_policy
from restkv.testing.laws import LARGEST, OBSERVED, SESSIONS
from restkv.testing.models import exact
from restkv.testing.watch import entries_of, positions

LAYERS = 3
LENGTHS = (41, 26)  # of the rows of a batch
NEW = 8
GRANULARITIES = ("kv", "query")

# Variants that differ from their policy in what the engine has to do for them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in POLICIES if name != "full"} | {
    "restkv joint": ("restkv", {"gqa": "joint", "aggregate": "indicator"}),
    "restkv symmetric": ("restkv", {"drift": "symmetric", "scale": 3, "gqa": "max"}),
    "snapkv max": ("snapkv", {"gqa": "max", "pooling": "max"}),
    "h2o slot": ("h2o", {"positions": "slot"}),
    "h2o per query": ("h2o", {"per_query": True, "window": 2}),
    "caote max": ("caote", {"gqa": "max", "output_weight": True}),
    "caote joint": ("caote", {"gqa": "joint", "output_weight": True}),
    "expected-attention max": ("expected-attention", {"gqa": "max", "epsilon": 0.02, "covariance": False, "future": 9}),
    "compactor chunks": ("compactor", {"chunk_size": 5, "sketch_dimension": 3, "blending": 0.3}),
    "curdkv projected": ("curdkv", {"projection": 3, "neighbours": 5}),
    "streamingllm original": ("streamingllm", {"positions": "original"}),
    "streamingllm first": ("streamingllm", {"positions": "original", "fill": "first", "window": 3}),
    "lacache original": ("lacache", {"positions": "original"}),
}
BUDGETS: dict[str, dict[str, Any]] = {
    "int": {"budget": 12},
    "float": {"budget": 0.35},
    "per layer": {"budget": (9, 16, 12)},
    "pyramid": {"budget": 12, "budget_by": "pyramid"},
    "pyramid exact": {"budget": 12, "budget_by": Pyramid(exact=True)},
    "adakv": {"budget": 12, "budget_by": "adakv"},
    "global": {"budget": 12, "budget_by": "global"},
}
EXAMPLES = {
    "int": many(6, 2),
    "adakv": many(4, 2),
    "global": many(4, 2),
}  # observations: the others choose from one as these do
OF_ONE = [law.name for law in (*OBSERVED, *LARGEST)]
OF_SESSIONS = [law.name for law in SESSIONS]
PAIRS = [(variant, granularity) for variant in VARIANTS for granularity in GRANULARITIES]


def refusal(variant: str, granularity: str, budget: str) -> str | None:
    """The option by which a combination is refused."""
    name, options = VARIANTS[variant]
    cls = POLICIES[name]
    if granularity not in cls.granularities:
        return "granularity"
    if options.get("gqa") == "joint" and granularity == "query":
        return "gqa"
    slots = issubclass(cls, Slotted) and options.get("positions", cls.positions) == "slot"
    if slots and (budget not in ("int", "float") or granularity == "query"):
        return "positions"
    if cls is LaCache and budget not in ("int", "float"):
        return "budget_by"
    if budget == "per layer" and name == "pyramidkv":
        return "budget"
    return None


def make(variant: str, granularity: str = "kv", **options: Any) -> Policy:
    """A policy whose window and sinks fit small budgets."""
    name, own = VARIANTS[variant]
    cls = POLICIES[name]
    small = {"window": min(cls.window, 4), "sinks": min(cls.sinks, 2)}
    if name == "keydiff" and options.get("budget_by") in ("pyramid", Pyramid(exact=True)):
        small["sinks"] = (
            1  # a last layer of 1 entry: of two keys neither is nearer to their mean, and rounding would choose
        )
    return get_policy(name, **{**small, "granularity": granularity, **own, **options})


def pairs(budget: str = "int") -> list[tuple[str, str]]:
    """(variant, granularity) of all that take this kind of budget."""
    return [pair for pair in PAIRS if refusal(*pair, budget) is None]


each_allocation = pytest.mark.parametrize(
    ("variant", "granularity", "budget_by"),
    [(*pair, "uniform") for pair in pairs()] + [(*pair, by) for by in ("adakv", "global") for pair in pairs(by)],
)


class Run(NamedTuple):
    """What a session did."""

    tokens: list[list[int]]  # [row][step]
    logits: list[Tensor]  # [step] of [B, V]
    kept: list[list[list[list[int]]]]  # [row][layer][head]
    session: Session


@torch.no_grad()
def run(
    engine: Engine, policy: Policy, prompts: Sequence[Sequence[int]], new: int = NEW, chunk: int | None = None
) -> Run:
    """Prefill and decode greedily."""
    how: dict[str, Any] = {} if chunk is None else {"prefill": "chunked", "chunk": chunk}
    session = Session(engine, policy, [len(ids) for ids in prompts], new, **how)
    session.prefill(prompts)
    steps, logits = [], [session.logits_BV]
    for _ in range(new):
        steps.append(session.sample(Sampling(), []))
        session.feed(steps[-1])
        logits.append(session.logits_BV)
    tokens = torch.stack(steps).T.tolist() if steps else [[] for _ in prompts]
    return Run(tokens, logits, kept_of(session), session)


def kept_of(session: Session) -> list[list[list[list[int]]]]:
    """Positions [row][layer][head] (query heads where they have sets of their own)."""
    layers = [positions(entries_of(layer)) for layer in session.cache.layers]
    return [
        [heads[row * (per := len(heads) // session.cache.rows) : (row + 1) * per] for heads in layers]
        for row in range(session.cache.rows)
    ]


ENGINE = Engine(exact(small_model(1, windows=(None,) * LAYERS)), "sdpa")  # float64: no two scores are nearly equal
PROMPTS = [small_ids(length, seed=length) for length in LENGTHS]


@pytest.fixture
def law() -> Iterator[Watch]:
    with watched() as watch:
        yield watch


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("variant", "granularity"), PAIRS)
def test_every_law(variant: str, granularity: str, budget: str) -> None:
    """Through the door that is everybody's (restkv.testing), or refused by the option's name."""
    if (option := refusal(variant, granularity, budget)) is not None:
        with pytest.raises(PolicyError, match=rf"^{VARIANTS[variant][0]}: {option} ") as error:
            make(variant, granularity, **BUDGETS[budget])
        assert "\n" not in str(error.value)
        return
    seed = zlib.crc32(f"{variant} {granularity} {budget}".encode())
    policy, observed = make(variant, granularity, **BUDGETS[budget]), EXAMPLES.get(budget, 0)
    if observed:
        laws = [*OF_ONE, "waits"] if budget == "int" else OF_ONE
        report = check_policy(policy, examples=observed, seed=seed, laws=laws)
        assert not report.notes and report.cases["columns"] == observed
    # Of those that are shared among heads a half, of those that differ in their sizes alone a quarter.
    if budget == "int" or seed % (2 if observed else 4) == 0:
        check_policy(policy, sessions=many(2, 2), seed=seed, laws=OF_SESSIONS)


def longer() -> list[tuple[str, str, str]]:
    """Combinations that are tried at length. Under CI the white fields of a chess board: each variant meets each budget at one of
    its granularities, and the test above tries the other."""
    tried = []
    for (row, variant), (column, budget) in itertools.product(enumerate(VARIANTS), enumerate(BUDGETS)):
        admitted = [granularity for granularity in GRANULARITIES if refusal(variant, granularity, budget) is None]
        chosen = admitted[(row + column) % 2 :][:1] if IN_CI and len(admitted) == 2 else admitted
        tried += [(variant, granularity, budget) for granularity in chosen]
    return tried


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "granularity", "budget"), longer())
def test_every_law_for_longer(variant: str, granularity: str, budget: str) -> None:
    check_policy(make(variant, granularity, **BUDGETS[budget]), examples=many(60, 10), sessions=many(15, 7), seed=1)


@pytest.mark.parametrize("variant", [*(name for name in POLICIES if name != "full"), "restkv joint", "caote joint"])
def test_every_score_traces_into_one_graph(variant: str) -> None:
    """But for what LaCache keeps, which no score says."""
    notes = check_policy(make(variant, budget=12), laws=["traces"]).notes
    assert notes == (["eager only: it chooses by a `keep` of its own"] if variant == "lacache" else [])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_full_cache_keeps_every_law(granularity: str) -> None:
    assert not check_policy(FullCache(granularity=granularity), examples=10, sessions=2).notes


def test_the_full_cache_refuses_a_budget():
    for budget in (12, 0.5, (9, 12, 16)):
        with pytest.raises(PolicyError, match=r"^full: budget "):
            get_policy("full", budget=budget)


def test_the_full_cache_evicts_nothing(law):
    done = run(ENGINE, FullCache(interval=1), PROMPTS)
    assert done.kept == [[[[*range(length + NEW)]] * 2] * LAYERS for length in LENGTHS]
    assert law.rounds == law.cut == 0


# -- what comparing runs shows


ROOMY: dict[str, dict[str, Any]] = {
    "int": {"budget": 60},
    "float": {"budget": 1.0, "interval": None},
    "per layer": {"budget": (60, 80, 70)},
    "pyramid": {"budget": 60, "budget_by": "pyramid"},
    "adakv": {"budget": 60, "budget_by": "adakv"},
    "global": {"budget": 60, "budget_by": "global"},
}
FULL = {chunk: run(ENGINE, FullCache(), PROMPTS, chunk=chunk) for chunk in (None, 7)}


@pytest.mark.parametrize(
    ("variant", "granularity", "budget"),
    [(*pair, budget) for budget in ROOMY for pair in pairs(budget) if budget == "int" or pair[1] == "query"],
)
def test_a_budget_for_everything_is_the_full_cache(variant, granularity, budget):
    """Bit for bit, whatever the policy would have to say."""
    for chunk, full in FULL.items():
        if chunk is None or budget == "int":
            options = {"interval": 1, **ROOMY[budget]}
            if chunk is not None:  # which no other probe reads
                options["probe"] = "window"
            roomy = run(ENGINE, make(variant, granularity, **options), PROMPTS, chunk=chunk)
            assert all(torch.equal(a, b) for a, b in zip(roomy.logits, full.logits, strict=True))


@each_allocation
def test_of_equal_scores_the_older_loses(monkeypatch, variant, granularity, budget_by):
    policy = make(variant, granularity, budget=12, interval=1, budget_by=budget_by)
    if isinstance(policy, LaCache):  # it has no scores
        return
    monkeypatch.setattr(type(policy), "importance", lambda self, obs: torch.zeros_like(obs.k[..., 0]))
    done = run(ENGINE, policy, PROMPTS)
    for row, length in zip(done.kept, LENGTHS, strict=True):
        budgets = policy.layer_budgets(length, LAYERS)
        for heads, budget in zip(row, budgets, strict=True):
            total = length + NEW
            want = [*range(policy.sinks), *range(total - budget + policy.sinks, total)]
            assert heads == [want] * len(heads)


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("variant", "granularity"), pairs("global"))
def test_a_cascade_is_one_selection_from_all_layers(monkeypatch, variant, granularity, floor):
    """The prompt's survivors of budget_by="global" are the best of all layers' scores at once."""
    seen: list[Observation] = []
    uniform = make(variant, granularity, budget=12, interval=None, budget_by="uniform")
    keep = type(uniform).keep

    def spy(self: Policy, obs: Observation, states: Sequence[Any] = ()) -> Tensor:
        seen.append(obs)
        return keep(self, obs, states)

    with monkeypatch.context() as patch:
        patch.setattr(type(uniform), "keep", spy)
        run(ENGINE, uniform, PROMPTS, new=0)  # scores of a prompt do not depend on what is evicted
    spread = Global(floor=floor)
    done = run(ENGINE, replace(uniform, budget_by=spread), PROMPTS, new=0)
    for row, kept in enumerate(done.kept):
        layers = seen[row * LAYERS : (row + 1) * LAYERS]
        score, pos, protected = zip(*(uniform.ranking(obs) for obs in layers), strict=True)
        keeps = spread.select_layers(score, pos, protected, torch.tensor([12]))
        assert kept == [[head.nonzero()[:, 0].tolist() for head in keep_BXC[0]] for keep_BXC in keeps]
        assert sum(len(head) for heads in kept for head in heads) == 12 * LAYERS * len(kept[0])


def saturated(model: Decoder) -> Decoder:
    """In bfloat16, with queries so long that all attention goes to one entry."""
    heads = model.config.num_heads * model.config.head_dim
    for block in model.blocks:
        block.qkv_proj.weight[:heads] *= 300
    return model.bfloat16()


SATURATED = Engine(saturated(small_model(4, windows=(None, 6, None))), "sdpa")


@each_allocation
def test_saturated_bfloat16(monkeypatch, law, variant, granularity, budget_by):
    """Attention of exactly 1: no NaN in scores or logits, and the law holds."""
    policy = make(variant, granularity, budget=12, interval=2, budget_by=budget_by)
    score, scores, most = type(policy).score, [], []

    def spy(self: Policy, obs: Observation) -> Tensor:
        most.append(attention_BHWC(obs).max())
        scores.append(score(self, obs))
        return scores[-1]

    monkeypatch.setattr(type(policy), "score", spy)
    done = run(SATURATED, policy, PROMPTS)
    assert law.cut
    assert isinstance(policy, LaCache) or (scores and max(most) == 1.0)
    assert not any(score_BXC.isnan().any() for score_BXC in scores)
    assert all(logits_BV.isfinite().all() for logits_BV in done.logits)
