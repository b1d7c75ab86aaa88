"""One law for every policy: its options, budgets and schedules, on tiny random models, through the real engine.

tests/laws/law.py checks each eviction as it happens; here are the runs, and what can only be seen by comparing runs. What a
policy's score should be is the business of its own tests.

Letters: B batch rows, L prompt length, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from laws.law import Snapshot, Watch, entries_of, positions, protected, snapshot, watched
from make.small import small_ids, small_model
from modeling.layers import Decoder
from restkv import schedule
from restkv.budgets import Global, Pyramid
from restkv.engine import Engine
from restkv.errors import PolicyError
from restkv.observe import Observation, attention_BHWC
from restkv.policies import POLICIES, FullCache, LaCache, Policy, get_policy
from restkv.policies.slots import Slotted
from restkv.sampling import Sampling
from restkv.session import Session
from twins.stepwise import exact

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
    "caote joint": ("caote", {"gqa": "joint", "output_weight": True}),
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
SCHEDULES: dict[str, dict[str, Any]] = {
    "after the prompt": {"interval": None},
    "every 5 tokens": {"interval": 5},
    "every step": {"interval": 1},
    "high water": {"interval": 2, "high_water": 18},
    "chunks": {"interval": 5, "chunk": 7},
}
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


each = pytest.mark.parametrize(("variant", "granularity"), pairs())
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


@torch.no_grad()
def full_rows(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Snapshot]:
    """What a full cache holds of each prompt, unrotated keys where `raw`."""
    snapshots = []
    for ids in prompts:
        session = Session(engine, FullCache(), [len(ids)], 1)
        session.prefill([ids])
        snapshots.append(snapshot(session.cache))
    return snapshots


ENGINE = Engine(exact(small_model(1, windows=(None,) * LAYERS)), "sdpa")  # float64: no two scores are nearly equal
GROUPS = {
    1: Engine(exact(small_model(2, windows=(None,) * LAYERS, kv_heads=3, group=1)), "sdpa"),
    8: Engine(exact(small_model(2, windows=(None,) * LAYERS, kv_heads=1, group=8)), "sdpa"),
}
PROMPTS = [small_ids(length, seed=length) for length in LENGTHS]


@pytest.fixture
def law() -> Iterator[Watch]:
    with watched() as watch:
        yield watch


def lawful(
    law: Watch, policy: Policy, engine: Engine = ENGINE, chunk: int | None = None, prompts=PROMPTS, alone=(-1,)
) -> Run:
    """Run a batch under the law, then some rows alone: their tokens, logits and kept positions are the same."""
    if not policy.slot_positions:
        law.full = full_rows(engine, [ids[:chunk] for ids in prompts])
    law.prompts = law.rounds = law.cut = 0
    batch = run(engine, policy, prompts, chunk=chunk)
    chunks = sum(-(-len(ids) // chunk) - 1 for ids in prompts) if chunk else 0
    assert law.prompts == len(prompts)
    assert law.rounds == chunks + (NEW // policy.interval if policy.interval else 0)
    columns = [policy.layer_budgets(len(ids), engine.model.config.num_layers) for ids in prompts]
    assert batch.session.evictor.budgets == [list(column) for column in zip(*columns, strict=True)]
    for row in alone:
        law.full = []
        single = run(engine, policy, [prompts[row]], chunk=chunk)
        assert single.tokens[0] == batch.tokens[row]
        assert single.kept[0] == batch.kept[row]
        gaps = [(mine[0] - theirs[row]).abs().max() for mine, theirs in zip(single.logits, batch.logits, strict=True)]
        assert max(gaps) < 1e-9
    return batch


def check(law: Watch, variant: str, granularity: str, budget: str, schedule: str, alone=(-1,)) -> None:
    options = dict(SCHEDULES[schedule])
    chunk = options.pop("chunk", None)
    option = refusal(variant, granularity, budget)
    if option is None:
        lawful(law, make(variant, granularity, **BUDGETS[budget], **options), chunk=chunk, alone=alone)
        assert law.cut, "nothing was evicted"
    else:
        with pytest.raises(PolicyError, match=rf"^{VARIANTS[variant][0]}: {option} ") as error:
            make(variant, granularity, **BUDGETS[budget], **options)
        assert "\n" not in str(error.value)


def some_schedule(variant: str, granularity: str, budget: str) -> str:
    """Every pair meets all schedules, since there are more budgets than schedules; which budget meets which varies."""
    shift = zlib.crc32(f"{variant} {granularity}".encode())
    return list(SCHEDULES)[(shift + list(BUDGETS).index(budget)) % len(SCHEDULES)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("variant", "granularity"), PAIRS)
def test_law(law, variant, granularity, budget):
    check(law, variant, granularity, budget, some_schedule(variant, granularity, budget))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("variant", "granularity"), PAIRS)
def test_law_of_every_combination(law, variant, granularity, budget, schedule):
    if schedule != some_schedule(variant, granularity, budget):
        check(law, variant, granularity, budget, schedule, alone=(0,))


def test_the_full_cache_refuses_a_budget():
    for budget in (12, 0.5, (9, 12, 16)):
        with pytest.raises(PolicyError, match=r"^full: budget "):
            get_policy("full", budget=budget)


def test_the_full_cache_evicts_nothing(law):
    done = run(ENGINE, FullCache(interval=1), PROMPTS)
    assert done.kept == [[[[*range(length + NEW)]] * 2] * LAYERS for length in LENGTHS]
    assert law.rounds == law.cut == 0


# -- shapes that hurt

SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "window = budget": ({"budget": 9, "window": 9}, LENGTHS),
    "window = budget - 1": ({"budget": 9, "window": 8}, LENGTHS),
    "a fraction that is 1 + window": ({"budget": 0.01, "window": 5}, LENGTHS),
    "prompts shorter than the window": ({"budget": 14, "window": 8}, (5, 7)),
    "one token": ({"budget": 4, "window": 1}, (1, 2)),
    "sinks and spans": ({"budget": 14, "window": 3, "sinks": 2, "protect": ((1, 4), (8, 11))}, LENGTHS),
}


@pytest.mark.parametrize("shape", SHAPES)
@each
def test_shapes(law, variant, granularity, shape):
    options, lengths = SHAPES[shape]
    name, _ = VARIANTS[variant]
    options = {"interval": 4, "sinks": 0, "budget_by": "uniform", **options}
    if name == "adakv":
        options["budget_by"] = "adakv"
    if name == "lacache" and isinstance(options["budget"], int):  # its ladders need room of their own
        options["budget"] += LAYERS + 1
    policy = make(variant, granularity, **options)
    lawful(law, policy, prompts=[small_ids(length, seed=length) for length in lengths])
    assert bool(law.cut) == (max(lengths) + 2 * 4 > policy.budget_for(max(lengths)))


@pytest.mark.parametrize("group", [1, 8])
@each_allocation
def test_groups(law, variant, granularity, budget_by, group):
    """Multi-head attention, and eight query heads on one KV head."""
    policy = make(variant, granularity, budget=12, interval=4, budget_by=budget_by)
    lawful(law, policy, GROUPS[group], alone=())
    assert law.cut


# -- sliding windows

WINDOW = 6
SLIDING = Engine(exact(small_model(3, windows=(WINDOW, None, WINDOW), thetas=(100.0, 1000.0))), "sdpa")


@each_allocation
def test_sliding_layers_lose_what_they_cannot_see(law, variant, granularity, budget_by):
    """Sliding layers see all they can, and what they cannot costs the others nothing: those keep early facts."""
    policy = make(variant, granularity, budget=12, interval=1, budget_by=budget_by)
    done = lawful(law, policy, SLIDING, alone=())
    assert law.hidden
    if isinstance(policy, LaCache):  # ladders count slots, whatever is in them
        return
    for (first, everywhere, last), length in zip(done.kept, LENGTHS, strict=True):
        length += NEW
        visible = set(range(length - WINDOW + 1, length))  # to the next token
        for head in (*first, *last):
            if budget_by == "global":
                assert set(head) <= visible | protected(policy, head, length, 12)
            else:
                assert visible <= set(head)
        early = [len(set(head) - visible) for head in everywhere]
        if budget_by == "uniform":
            assert min(early) >= 12 - len(visible)
        elif budget_by == "adakv":
            assert sum(early) >= (12 - len(visible)) * len(early)
        else:
            most = len(visible | protected(policy, range(length), length, 12))
            assert sum(early) >= (3 * 12 - 2 * most - len(visible)) * len(early)


# -- what comparing runs shows


def same(mine: Run, theirs: Run, exactly: bool = True) -> bool:
    close = torch.equal if exactly else lambda a, b: bool((a - b).abs().max() < 1e-9)
    logits = all(close(a, b) for a, b in zip(mine.logits, theirs.logits, strict=True))
    return logits and mine.tokens == theirs.tokens and mine.kept == theirs.kept


@each
def test_calls_leave_nothing_behind(variant, granularity):
    """The same call gives the same bits: again, after another call, and on an engine that has seen none."""
    policy = make(variant, granularity, budget=12, interval=3)
    first = run(ENGINE, policy, PROMPTS)
    other = run(ENGINE, policy, PROMPTS[::-1])
    assert same(run(ENGINE, policy, PROMPTS), first)
    assert other.kept == first.kept[::-1]
    assert same(run(Engine(ENGINE.model, "sdpa"), make(variant, granularity, budget=12, interval=3), PROMPTS), first)


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
    ("variant", "granularity", "budget"), [(*pair, budget) for budget in ROOMY for pair in pairs(budget)]
)
def test_a_budget_for_everything_is_the_full_cache(variant, granularity, budget):
    """Bit for bit, whatever the policy would have to say."""
    for chunk, full in FULL.items():
        if chunk is None or budget == "int":
            options = {"interval": 1, **ROOMY[budget]}
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


@pytest.mark.parametrize("interval", [1, 3])
@each
def test_masked_is_compacted(monkeypatch, variant, granularity, interval):
    """Reclaiming pages after every eviction, or never: the same schedule, the same logits."""
    policy = make(variant, granularity, budget=12, interval=interval)
    runs = []
    for every in (1, 1000):
        monkeypatch.setattr(schedule, "COMPACT_EVERY", every)
        runs.append(run(ENGINE, policy, PROMPTS, new=15))
    compacted, masked = runs
    assert same(compacted, masked, exactly=False)
    dead = [int((layer.used.view(2, -1) - layer.live_counts()).sum()) for layer in masked.session.cache.layers]
    assert min(dead) > 0
    assert all(torch.equal(x.used.view(2, -1), x.live_counts().int()) for x in compacted.session.cache.layers)


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


SATURATED = Engine(saturated(small_model(4, windows=(None, WINDOW, None))), "sdpa")


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
