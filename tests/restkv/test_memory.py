"""Memory: flat however much is read, peaks of one layer while a prompt is read, and bytes that a budget really saves.

What a process holds is read in a process of its own, whose allocator gives back at once what is freed: it is then what is in
use, and neither luck nor the tests before decide how much that is.

Letters: L tokens, K KV heads, D head dim, G query heads per KV head.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from make.places import environment
from make.small import small_ids, small_model
from modeling.checkpoint.loading import load_model
from modeling.forward import CHUNK
from modeling.layers import Decoder
from restkv import probes
from restkv.budgets import Pyramid
from restkv.engine import Engine
from restkv.lm import LM
from restkv.meter import PeakMemory
from restkv.policies import H2O, TOVA, FullCache, KeyDiff, KVzip, LaCache, Policy, ReSTKV, SnapKV, StreamingLLM
from restkv.schedule import COMPACT_EVERY
from restkv.session import Session
from restkv.sizing import page_size

MIB = 1 << 20
PART = 512
TOKENS = 40 * PART  # whole parts: a turn shorter than the interval would evict nothing yet
BUDGET = 256
POLICIES: dict[str, Policy] = {
    "restkv": ReSTKV(BUDGET),
    "restkv query": ReSTKV(BUDGET, granularity="query", window=16),
    "restkv global": ReSTKV(BUDGET, budget_by="global"),
    "snapkv": SnapKV(BUDGET),
    "snapkv adakv": SnapKV(BUDGET, budget_by="adakv"),
    "snapkv pyramid": SnapKV(BUDGET, budget_by=Pyramid(exact=True)),
    "h2o": H2O(BUDGET),
    "streamingllm": StreamingLLM(BUDGET),
    "streamingllm original": StreamingLLM(BUDGET, positions="original"),
    "lacache": LaCache(BUDGET),
    "full": FullCache(),
}
BOUNDED = [name for name in POLICIES if name != "full"]


class Reading(NamedTuple):
    """Bytes after a part of the text: live and allocated entries, the pools with their free pages, the process."""

    live: int
    allocated: int
    reserved: int
    resident: int


def reading(session: Session) -> Reading:
    cache = session.cache
    cache.refresh()  # a prompt's chunks are read through a window on their row
    resident = psutil.Process().memory_info().rss
    return Reading(cache.live_bytes, cache.allocated_bytes, cache.reserved_bytes, resident)


def wide_model(layers: int = 2) -> Decoder:
    """A random model with a large cache: 2 KiB per token and layer."""
    return small_model(5, windows=(None,) * layers, kv_heads=4, group=2, head_dim=64, hidden=48)


@torch.no_grad()
def readings(model: Decoder, policy: Policy, tokens: int, turns: bool) -> list[Reading]:
    """Feed a text part by part: one long prompt in chunks, or turns after a short one."""
    ids = small_ids(tokens)
    engine, out = Engine(model, "sdpa"), []
    if turns:
        session = Session(engine, policy, [PART], PART, chunk=PART, extends=True)
        session.prefill([ids[:PART]])
        for start in range(PART, tokens, PART):
            session.extend([ids[start : start + PART]])
            out.append(reading(session))
    else:
        session = Session(engine, policy, [tokens], 1, prefill="chunked", chunk=PART)
        session.prefill([ids], lambda done, total: out.append(reading(session)))
    assert session.cache.next_pos.tolist() == [tokens]
    assert session.logits_BV.isfinite().all()
    return out


def apart(call: str) -> Any:
    """What an expression over this module's names gives, as JSON, in a process of its own with an honest allocator."""
    env = environment(MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    script = f"import json\nfrom test_memory import *\nprint(json.dumps({call}))"
    ran = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(ran, env=env, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def long_run(name: str, turns: bool = False, checkpoint: str = "", tokens: int = TOKENS) -> list[Reading]:
    """Called apart: readings of a long text under a policy, by the wide model or a checkpoint."""
    return readings(load_model(Path(checkpoint)) if checkpoint else wide_model(), POLICIES[name], tokens, turns)


def entry_bytes(model: Decoder, policy: Policy) -> int:
    """Keys, values and a position; what some policies need besides: unrotated keys, attention collected, flags of a group."""
    config, size = model.config, model.dtype.itemsize
    entry = (2 + policy.slot_positions) * config.head_dim * size + 4
    per_query = policy.granularity == "query"
    if "mass" in policy.needs:
        entry += 4 * (config.group if per_query else 1)
    return entry + (config.group if per_query else 0)


def assert_cache_is_flat(model: Decoder, policy: Policy, seen: list[Reading]) -> None:
    """The cache holds its budget and no more, and the pools never grow."""
    config = model.config
    sets = config.group if policy.granularity == "query" else 1
    heads = config.num_layers * config.num_kv_heads
    entry = entry_bytes(model, policy)
    most = heads * sets * BUDGET * entry
    assert max(r.live for r in seen) <= most
    if isinstance(policy, LaCache):  # a ladder drops several at once, a stretched one more
        assert min(r.live for r in seen) > 0.98 * most
    elif sets == 1:
        assert {r.live for r in seen} == {most}
    assert max(r.allocated for r in seen) <= most + heads * page_size(BUDGET) * entry
    assert len({r.reserved for r in seen}) == 1


def assert_process_is_flat(model: Decoder, seen: list[Reading], what: str) -> None:
    """After the first quarter of a long run, the process grows by no more than an eighth of what a full cache would."""
    early, late = seen[: len(seen) // 4], seen[len(seen) // 4 :]
    full = len(late) * PART * model.config.kv_bytes_per_token(model.dtype)
    grown = max(r.resident for r in late) - max(r.resident for r in early)
    assert grown < full / 8, f"{what}: {grown / MIB:.1f} MiB more; a full cache grows by {full / MIB:.1f} MiB"


@pytest.mark.parametrize("what", ["a random model", pytest.param("stories260k", marks=pytest.mark.slow)])
def test_memory_is_flat(what, request):
    """20,480 tokens in chunks at budget 256; stories260k is read far past its 512 positions, and need not make sense."""
    checkpoint = str(request.getfixturevalue("stories260k")) if what == "stories260k" else ""
    model = load_model(Path(checkpoint)) if checkpoint else wide_model()
    seen = [Reading(*r) for r in apart(f"long_run('restkv', checkpoint={checkpoint!r})")]
    assert len(seen) == TOKENS // PART
    assert_cache_is_flat(model, POLICIES["restkv"], seen)
    assert_process_is_flat(model, seen, what)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_cache_is_flat_under_every_policy(name):
    model = wide_model()
    assert_cache_is_flat(model, POLICIES[name], readings(model, POLICIES[name], 5 * PART, turns=name == "restkv"))


@pytest.mark.slow
@pytest.mark.parametrize(("names", "turns"), [(BOUNDED[2::2], False), (BOUNDED[1::2], True)], ids=["prompt", "turns"])
def test_memory_is_flat_under_every_policy(names, turns):
    """But for the first, whose prompt the test above reads."""
    model, runs = wide_model(), apart(f"{{name: long_run(name, {turns}) for name in {names}}}")
    for name, rows in runs.items():
        seen = [Reading(*r) for r in rows]
        assert_cache_is_flat(model, POLICIES[name], seen)
        assert_process_is_flat(model, seen, name)


@pytest.mark.slow
def test_a_full_cache_is_not_flat():
    """The measurements see what they should."""
    first, *_, last = (Reading(*r) for r in apart("long_run('full', turns=True, tokens=12 * PART)"))
    entries = 10 * PART * wide_model().config.kv_bytes_per_token(torch.float32)
    for kind in Reading._fields:
        assert getattr(last, kind) - getattr(first, kind) > 0.9 * entries, kind


STEPWISE: dict[str, Policy] = {
    "restkv": ReSTKV(32, window=8, interval=16),
    "restkv global, every step": ReSTKV(32, window=8, interval=1, budget_by="global"),
    "h2o": H2O(32),
    "h2o query": H2O(32, granularity="query"),
    "tova": TOVA(32),
    "tova mark": TOVA(32, high_water=57),
    "snapkv mark": SnapKV(32, window=8, interval=2, high_water=60),
    "keydiff mark": KeyDiff(32, interval=5, high_water=70),
    "streamingllm": StreamingLLM(32),
    "lacache": LaCache(32),
}


@pytest.mark.parametrize("policy", STEPWISE.values(), ids=STEPWISE)
@torch.no_grad()
def test_decoding_is_flat(policy):
    """Token by token: marked entries are reclaimed in time, also where evictions are rare and fall between compactions."""
    model = small_model(6)
    session = Session(Engine(model, "sdpa"), policy, [50], 160)
    session.prefill([small_ids(50)])
    reserved, most = session.cache.reserved_bytes, 0
    for token in small_ids(160, seed=1):
        session.feed(torch.tensor([token]))
        most = max(most, session.cache.allocated_bytes)
    assert session.cache.reserved_bytes == reserved
    sets = model.config.group if policy.granularity == "query" else 1
    until_compaction = COMPACT_EVERY + (policy.interval or 0)
    entries = max(policy.budget, policy.high_water or 0) * sets + until_compaction
    heads = model.config.num_layers * model.config.num_kv_heads
    assert most <= heads * (entries + 2 * page_size(entries)) * entry_bytes(model, policy)


# -- the peak of a prompt


PROMPT = 4_000


@torch.no_grad()
def peaks(
    depths: list[int], budget_by: str, prefill: str = "dense", probe: str = "window", piece: int = probes.PIECE
) -> list[int]:
    """Called apart: bytes by which the process peaks over what it held while a prompt goes through models of these depths."""
    policy: Policy = ReSTKV(128, budget_by=budget_by)
    if probe != "window":
        policy = KVzip(128, budget_by=budget_by, probe=probe)
    probes.PIECE, out = piece, []
    for depth in [1, *depths]:  # the first run makes buffers that come to stay
        session = Session(Engine(wide_model(depth), "sdpa"), policy, [PROMPT], 1, prefill=prefill)
        before = psutil.Process().memory_info().rss
        meter = PeakMemory(torch.device("cpu"))
        session.prefill([small_ids(PROMPT)])
        out.append(meter.bytes() - before)
    return out[1:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to reset")
@pytest.mark.parametrize(
    ("budget_by", "prefill"),
    [("uniform", "dense"), ("global", "dense"), ("uniform", "flexprefill"), ("uniform", "vertical-slash:slash=2000")],
)
def test_a_prompt_peaks_at_one_layer(budget_by, prefill):
    """Reading a prompt takes one layer's keys and values, a few hidden states and one chunk's mask, however deep the model.

    A sparse prefill holds the layer's queries too; there, estimates and the gathered keys are smaller than that mask.
    """
    depths = [1, 3, 9]
    config = wide_model(1).config
    layer = PROMPT * config.kv_bytes_per_token(torch.float32)
    hidden = PROMPT * config.hidden_size * 4
    mask = CHUNK * PROMPT * (4 + 1)  # as booleans, and as the floats SDPA makes of them
    kept = 128 * config.kv_bytes_per_token(torch.float32)
    queries = 0 if prefill == "dense" else PROMPT * config.num_heads * config.head_dim * 4
    measured = apart(f"peaks({depths}, {budget_by!r}, {prefill!r})")
    for depth, peak in zip(depths, measured, strict=True):
        assert peak < layer + queries + 6 * hidden + 2 * mask + 2 * depth * kept, (
            f"{depth} layers: {peak / MIB:.1f} MiB"
        )
    grown = measured[-1] - measured[1]
    assert grown < layer / 2, f"{depths} layers take {[peak / MIB for peak in measured]} MiB"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to reset")
@pytest.mark.parametrize(
    ("budget_by", "probe", "piece"),
    [
        ("uniform", "replay", 2048),
        ("global", "replay", 200),
        ("uniform", "prompt", 2048),
        ("uniform", "draft:4", 2048),
    ],
)
def test_a_probe_peaks_at_one_layer_unless_it_drafts(budget_by, probe, piece):
    """A replay takes one more hidden state, and of one layer its queries, keys and values, in however many pieces it is read; a
    draft takes the full cache."""
    depths = [1, 3, 9]
    layer = PROMPT * wide_model(1).config.kv_bytes_per_token(torch.float32)
    measured = apart(f"peaks({depths}, {budget_by!r}, probe={probe!r}, piece={piece})")
    grown = measured[-1] - measured[1]
    if probe.startswith("draft"):
        assert 5 * layer < grown < 8 * layer
    else:
        assert measured[-1] < 8 * layer and grown < layer / 2, (
            f"{depths} layers take {[peak / MIB for peak in measured]} MiB"
        )


# -- bytes


BYTES: dict[str, Policy] = {
    "uniform": SnapKV(64),
    "per layer": SnapKV((96, 64, 32)),
    "fraction": SnapKV(0.1),
    "pyramid": SnapKV(64, budget_by="pyramid"),
    "pyramid exact": SnapKV(64, budget_by=Pyramid(exact=True)),
    "adakv": SnapKV(64, budget_by="adakv"),
    "global": ReSTKV(64, budget_by="global"),
    "query": SnapKV(64, granularity="query"),
    "h2o": H2O(64),
    "slots": StreamingLLM(64),
}


@pytest.mark.parametrize("policy", BYTES.values(), ids=BYTES)
def test_budgets_save_real_bytes(policy):
    """stats after a prompt, and a compressed context: the budget's entries and at most one page per head."""
    model, lengths = small_model(7, windows=(None,) * 3), [700, 300]
    lm, config = LM(model, None), model.config
    prompts = [small_ids(length, seed=length) for length in lengths]
    stats = lm.generate(prompts, policy, max_new_tokens=1)[0].stats
    per_query = config.group if policy.granularity == "query" else 1
    entry, heads = entry_bytes(model, policy), config.num_layers * config.num_kv_heads
    budgets = [
        sum(policy.layer_budgets(length, config.num_layers)) * config.num_kv_heads * per_query * entry
        for length in lengths
    ]
    assert stats.live_bytes <= sum(budgets)
    assert per_query > 1 or stats.live_bytes == sum(budgets)
    assert stats.allocated_bytes <= sum(budgets) + len(lengths) * heads * page_size(64) * entry
    assert stats.full_bytes == sum(lengths) * heads * 2 * config.head_dim * 4
    assert stats.allocated_bytes < stats.full_bytes / (2 if per_query > 1 else 3)
    context = lm.compress(prompts[0], policy)
    assert context.nbytes <= budgets[0] + heads * page_size(64) * entry
    assert sum(context.kept) * config.num_kv_heads * entry <= context.nbytes
