"""Sparse prefill: patterns against their slow twins, both backends against an explicit mask, and eviction after it.

Letters: L prompt length, M blocks of it, T rows of a chunk, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.quality.fidelity import FidelityPlan, run_fidelity
from bench.quality.ruler import Plan, answer
from bench.quality.ruler import run as run_ruler
from bench.quality.tasks import Frame, make_sample
from bench.report.kinds import parts
from bench.report.tables import Table
from bench.runs.folder import read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.together import prefill_together
from laws.law import entries_of
from make.small import small_ids, small_model
from modeling.attention import causal_attention
from modeling.layers import Decoder
from modeling.sparse import BlockMap, reachable, sparse_attention
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PromptError
from restkv.evict import Evictor
from restkv.generate import Engine, Session
from restkv.lm import LM, load
from restkv.mass import column_mass
from restkv.patterns import AShape, FlexPrefill, Pattern, VerticalSlash, parse_prefill, vertical_and_slash
from restkv.policies import FullCache, Policy, get_policy, known_policies
from twins.reference_sparse import blocks_with, choose_slowly, mask_of, masked_output, masked_weights

SHAPES = st.fixed_dictionaries(
    {
        "length": st.integers(1, 70),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 8]),
        "size": st.sampled_from([4, 8, 16]),
        "window": st.sampled_from([None, None, 1, 5, 16, 40]),
        "softcap": st.sampled_from([None, None, 2.0]),
        "seed": st.integers(0, 1 << 20),
        "share": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    }
)


def tensors(
    seed: int, length: int, kv_heads: int, group: int, head_dim: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """q [H, L, D], k and v [K, L, D] in float64."""
    random = torch.Generator().manual_seed(seed)
    q_HLD = 2 * torch.randn(kv_heads * group, length, head_dim, generator=random, dtype=torch.float64)
    k_KLD, v_KLD = torch.randn(2, kv_heads, length, head_dim, generator=random, dtype=torch.float64)
    return q_HLD, k_KLD, v_KLD


def random_map(seed: int, heads: int, length: int, size: int, window: int | None, share: float) -> BlockMap:
    blocks = -(-length // size)
    listed = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < share
    diagonal = torch.eye(blocks, dtype=torch.bool)
    return BlockMap((listed | diagonal) & reachable(blocks, size, window, torch.device("cpu")), size)


# -- attention over listed blocks


def test_what_is_in_reach_by_hand():
    """Size 4, window 3: queries 8 ... 11 see the keys 6 ... 11; with window 2 query 8 sees 7; with window 1 only itself."""
    expected = {None: [True, True, True], 5: [False, True, True], 2: [False, True, True], 1: [False, False, True]}
    for window, row in expected.items():
        assert reachable(3, 4, window, torch.device("cpu"))[2].tolist() == row


@settings(max_examples=20)
@given(blocks=st.integers(1, 6), size=st.sampled_from([1, 4, 8]), window=st.sampled_from([None, 1, 2, 5, 8, 9, 17]))
def test_what_is_in_reach(blocks, size, window):
    slow = blocks_with(lambda q, k: window is None or q - k < window, blocks * size, size)
    assert torch.equal(reachable(blocks, size, window, torch.device("cpu")), slow)
    everything = BlockMap(slow.expand(2, -1, -1), size)
    assert float(everything.share(window)) == 1.0


@settings(max_examples=60)
@given(shape=SHAPES, chunk=st.integers(1, 3))
def test_sparse_attention_is_attention_under_an_explicit_mask(shape, chunk):
    """Outputs, and the attention that columns collect, chunk by chunk."""
    q_HLD, k_KLD, v_KLD = tensors(**shape)
    length, size, window = shape["length"], shape["size"], shape["window"]
    chosen = random_map(shape["seed"], len(q_HLD), length, size, window, shape["share"])
    how = {"scale": 0.5, "softcap": shape["softcap"], "window": window}
    weights_HLL = masked_weights(q_HLD, k_KLD, mask_of(chosen.listed_HMM, size, length, window), 0.5, shape["softcap"])
    parts, mass_HL = [], torch.zeros(len(q_HLD), length)
    for start in range(0, length, chunk * size):
        q_THD = q_HLD[:, start : start + chunk * size].transpose(0, 1)
        parts.append(sparse_attention(q_THD, k_KLD, v_KLD, start, chosen, backend="sdpa", **how))
        stop = start + len(q_THD)
        mass_HL[:, :stop] += column_mass(q_THD, k_KLD[:, :stop], start, chosen=chosen, **how)
    torch.testing.assert_close(torch.cat(parts).transpose(0, 1), masked_output(weights_HLL, v_KLD), rtol=0, atol=1e-5)
    torch.testing.assert_close(mass_HL.double(), weights_HLL.sum(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(
    shape=SHAPES,
    chunk=st.integers(1, 70),
    elements=st.sampled_from([1, 400, 4000, 1 << 21]),
    sharpness=st.sampled_from([1, 30]),
)
def test_attention_that_columns_collect_in_blocks_of_any_size(shape, chunk, elements, sharpness):
    """Sharp attention too, whose smallest weights are no normal float32."""
    q_HLD, k_KLD, _ = tensors(**shape)
    q_HLD = q_HLD * sharpness
    length, window = shape["length"], shape["window"]
    q_L1, k_L = torch.arange(length)[:, None], torch.arange(length)
    seen_LL = (k_L <= q_L1) & (k_L > q_L1 - (length if window is None else window))
    weights_HLL = masked_weights(q_HLD, k_KLD, seen_LL.expand(len(q_HLD), -1, -1), 0.5, shape["softcap"])
    mass_HL = torch.zeros(len(q_HLD), length)
    with mock.patch("restkv.mass.chunk_elements", return_value=elements):
        for start in range(0, length, chunk):
            q_THD = q_HLD[:, start : start + chunk].transpose(0, 1)
            stop = start + len(q_THD)
            how = {"scale": 0.5, "softcap": shape["softcap"], "window": window}
            mass_HL[:, :stop] += column_mass(q_THD, k_KLD[:, :stop], start, **how)
    torch.testing.assert_close(mass_HL.double(), weights_HLL.sum(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(shape=SHAPES)
def test_all_blocks_are_dense_attention(shape):
    q_HLD, k_KLD, v_KLD = tensors(**shape)
    chosen = random_map(0, len(q_HLD), shape["length"], shape["size"], shape["window"], share=1.1)
    how = {"scale": 0.5, "softcap": shape["softcap"], "window": shape["window"]}
    ours = sparse_attention(q_HLD.transpose(0, 1), k_KLD, v_KLD, 0, chosen, backend="sdpa", **how)
    dense = causal_attention(q_HLD.transpose(0, 1), k_KLD, v_KLD, 0, **how)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
    assert float(chosen.share(shape["window"])) == 1.0


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_compiled_graph_serves_all_lengths_windows_and_listings(softcap):
    torch._dynamo.reset()
    counted, seen = torch._dynamo.utils.counters["stats"], []
    for seed, (length, window, share) in enumerate(
        [(33, None, 0.5), (700, None, 0.3), (1500, 100, 0.5), (64, 1, 1.0), (1024, 31, 0.7), (1300, None, 0.0)]
    ):
        q_HLD, k_KLD, v_KLD = (t.float() for t in tensors(seed, length, 2, 3, 16))
        chosen = random_map(seed, 6, length, 32, window, share)
        how: dict[str, Any] = {"scale": 0.25, "softcap": softcap, "window": window}
        for start in range(0, length, 1024):
            q_THD = q_HLD[:, start : start + 1024].transpose(0, 1)
            ours, slow = (
                sparse_attention(q_THD, k_KLD, v_KLD, start, chosen, backend=backend, **how)
                for backend in ("flex", "sdpa")
            )
            torch.testing.assert_close(ours, slow, rtol=0, atol=1e-5)
        seen.append(counted["unique_graphs"])
    assert len(set(seen)) == 1
    torch._dynamo.reset()


# -- patterns


PATTERNS = st.one_of(
    st.builds(AShape, block=st.just(32), sinks=st.sampled_from([0, 1, 40]), local=st.sampled_from([1, 32, 33, 70])),
    st.builds(VerticalSlash, block=st.just(32), vertical=st.integers(30, 60), slash=st.integers(50, 140)),
    st.builds(
        FlexPrefill,
        block=st.just(32),
        gamma=st.sampled_from([0.3, 0.6, 0.9]),
        tau=st.sampled_from([0.0, 0.1, 0.3, 2.0]),
        min_budget=st.sampled_from([1, 33, 64]),
        max_budget=st.sampled_from([None, 96]),
    ),
)


@settings(max_examples=40)
@given(
    pattern=PATTERNS,
    seed=st.integers(0, 1 << 20),
    length=st.integers(141, 200),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    window=st.sampled_from([None, None, 20, 90]),
    softcap=st.sampled_from([None, None, 2.0]),
    scale=st.sampled_from([0.05, 0.5]),
)
def test_patterns_list_what_their_slow_twins_list(pattern, seed, length, kv_heads, group, window, softcap, scale):
    q_HLD, k_KLD, _ = tensors(seed, length, kv_heads, group, 8)
    chosen = pattern.choose(q_HLD, k_KLD, scale, softcap, window)
    slow_HMM = choose_slowly(pattern, q_HLD, k_KLD, scale, softcap, window)
    assert torch.equal(chosen.listed_HMM, slow_HMM)
    assert chosen.listed_HMM.diagonal(dim1=1, dim2=2).all()
    assert window is not None or isinstance(pattern, AShape) or chosen.listed_HMM[:, :, 0].all()


def test_vertical_and_slash_by_hand():
    """Two queries over three keys: query 1 halves between keys 0 and 1, query 2 has 1/5, 1/5, 3/5 for the keys 0, 1, 2."""
    q_HWD = torch.ones(1, 2, 1, dtype=torch.float64)
    k_KLD = torch.tensor([[[1.0], [1.0], [3.0]]], dtype=torch.float64).log()
    vertical_HL, slash_HL = vertical_and_slash(q_HWD, k_KLD, 1.0, None, None)
    torch.testing.assert_close(vertical_HL[0].tolist(), [0.35, 0.35, 0.3])
    torch.testing.assert_close(slash_HL[0].tolist(), [(0.5 + 0.6) / 2, (0.5 + 0.2) / 2, 0.1])


def test_a_column_and_a_distance_that_all_attention_goes_to_are_found():
    """Head 0 looks at position 70 (block 2) only, head 1 always 160 tokens (5 blocks) back, of 320 tokens in 10 blocks.

    Head 0's last 64 queries are 186 to 249 tokens from that position, the last 32 are 218 to 249: 6 in block 6, 26 in block 7.
    """
    length, at, back = 320, 70, 160
    q_HLD, k_KLD = torch.zeros(2, length, 64), torch.zeros(2, length, 64)
    q_HLD[0, :, 0] = k_KLD[0, at, 0] = 30.0
    code_LD = torch.randn(length + back, 64, generator=torch.Generator().manual_seed(0))
    code_LD = torch.nn.functional.normalize(code_LD, dim=-1)
    q_HLD[1], k_KLD[1] = 60 * code_LD[:length], code_LD[back:]  # key p carries the code of query p + back
    causal_MM = torch.ones(10, 10, dtype=torch.bool).tril()
    distance_MM = torch.arange(10)[:, None] - torch.arange(10)
    column_M = torch.isin(torch.arange(10), torch.tensor([0, 2]))
    # The nearest 100 distances touch the block distances 0 to 4; 186, first of many equals, 5 and 6.
    for pattern, distances in (
        (FlexPrefill(32, min_budget=64, tau=0.0), [0, 7]),
        (VerticalSlash(32, vertical=31, slash=101), [0, 1, 2, 3, 4, 5, 6]),
    ):
        listed_HMM = pattern.choose(q_HLD, k_KLD, 1.0, None, None).listed_HMM
        assert torch.equal(listed_HMM[0], causal_MM & (column_M | torch.isin(distance_MM, torch.tensor(distances))))
        assert listed_HMM[1][distance_MM == 5].all()


@pytest.mark.parametrize(
    ("pattern", "longest"),
    [(AShape(), 3968), (VerticalSlash(), 6096), (FlexPrefill(), 1024), (FlexPrefill(128, min_budget=1), 256)],
    ids=str,
)
def test_published_defaults_leave_prompts_dense_up_to(pattern, longest):
    assert pattern.dense(longest) and not pattern.dense(longest + 1)


def test_patterns_are_written_as_they_are_read():
    for text in (
        "a-shape",
        "a-shape:sinks=4:local=100",
        "vertical-slash:block=128:slash=700",
        "flexprefill:gamma=0.95",
    ):
        assert str(parse_prefill(text)) == text
    assert parse_prefill("flexprefill:max_budget=4096") == FlexPrefill(max_budget=4096)
    assert parse_prefill("dense") is None and parse_prefill("chunked") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sideways", "give dense, chunked, flexprefill, vertical-slash or a-shape"),
        ("dense:block=64", "'dense:block=64' is not known"),
        ("a-shape:sink=4", "'sink=4' is not OPTION=VALUE with one of block, sinks, local"),
        ("a-shape:local=many", "local is a number, not 'many'"),
        ("a-shape:local=0", "local=0; give at least 1"),
        ("a-shape:block=48", "block=48; give 32, 64 or 128"),
        ("vertical-slash:vertical=3", "vertical=3; give at least 30"),
        ("vertical-slash:slash=3", "slash=3; give at least 50"),
        ("flexprefill:gamma=1.5", "gamma=1.5"),
        ("flexprefill:tau=-1", "tau=-1"),
        ("flexprefill:max_budget=512", "max_budget=512; give at least min_budget, 1024"),
    ],
)
def test_impossible_patterns_are_refused_in_one_line(text, words):
    with pytest.raises(PromptError, match=words) as error:
        parse_prefill(text)
    assert "\n" not in str(error.value)


# -- prompts, and what is kept of them


LENGTH = 190
SMALL: list[Pattern] = [
    AShape(block=32, sinks=10, local=40),
    VerticalSlash(block=32, vertical=30, slash=50),
    FlexPrefill(block=32, gamma=0.5, min_budget=32),
    FlexPrefill(block=32, gamma=0.5, min_budget=32, tau=2.0),
]


def run(model: Decoder, policy: Policy, ids: list[int], prefill: str | Pattern, backend: str = "sdpa") -> Session:
    session = Session(Engine(model, backend), policy, [len(ids)], 4, prefill=prefill)
    session.prefill([ids])
    return session


@torch.no_grad()
def explicit(model: Decoder, ids: list[int], pattern: Pattern) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Every layer's q [H, L, D], k and v [K, L, D], unrotated k and attention by column [H, L]; and the last logits [V]."""
    length, config = len(ids), model.config
    pos_1L = torch.arange(length)[None]
    x_1LE, ropes = model.embed(torch.tensor([ids])), model.rotary(pos_1L, torch.tensor([length]))
    layers: list[tuple[Tensor, ...]] = []
    for block in model.blocks:
        q, k, v = (t[0].transpose(0, 1) for t in block.project(x_1LE, *ropes[block.rope]))
        raw = block.unrotated(x_1LE)[1][0].transpose(0, 1)
        listed = choose_slowly(pattern, q, k, config.attn_scale, config.attn_softcap, block.window)
        seen = mask_of(listed, pattern.block, length, block.window)
        weights = masked_weights(q, k, seen, config.attn_scale, config.attn_softcap)
        x_1LE = block.finish(x_1LE, masked_output(weights, v).transpose(0, 1)[None])
        layers.append((q, k, v, raw, weights.sum(1)))
    return layers, model.head(x_1LE)[0, -1]


@pytest.mark.parametrize("pattern", SMALL, ids=str)
@pytest.mark.parametrize("window", [None, 50])
def test_every_policy_keeps_of_a_sparse_prompt_what_an_explicit_mask_leaves_it(pattern, window):
    """Logits, kept positions, keys and values, for every policy; and those that count attention count what was computed."""
    model, ids = small_model(3, windows=(None, window)).double(), small_ids(LENGTH, seed=1)
    config = model.config
    layers, logits_V = explicit(model, ids, pattern)
    evictable = [name for name in known_policies() if name != "full"]
    policies = [get_policy(name, budget=40) for name in evictable]
    policies += [get_policy(name, budget=40, granularity="query") for name in ("restkv", "h2o")]
    policies.append(get_policy("restkv", budget=40, budget_by="global"))
    for policy in policies:
        session = run(model, policy, ids, pattern)
        torch.testing.assert_close(session.logits_BV[0], logits_V.float(), rtol=0, atol=1e-4)
        expected = Session(session.engine, policy, [LENGTH], 4)
        cache, evictor = expected.cache.row(0), expected.evictor.row(0)
        last = min(max(policy.observed_prompt, cache.window), LENGTH)
        for index, (q, k, v, raw, mass_HL) in enumerate(layers):
            mass = None
            if "mass" in policy.needs:
                mass = (
                    mass_HL
                    if policy.granularity == "query"
                    else mass_HL.unflatten(0, (config.num_kv_heads, -1)).mean(1)
                )
            mine = raw if policy.slot_positions else None
            evictor.store_prompt(
                cache, index, q[:, LENGTH - last :], k, v, mine, None if mass is None else mass.float()
            )
        evictor.prompt_done(cache, LENGTH)
        for ours, theirs in zip(session.cache.layers, cache.layers, strict=True):
            for a, b in zip(entries_of(ours), entries_of(theirs), strict=True):
                assert (a.pos, a.seen) == (b.pos, b.seen), policy
                torch.testing.assert_close((a.k, a.v), (b.k, b.v), rtol=0, atol=1e-9)
            if "mass" in policy.needs:
                torch.testing.assert_close(
                    ours.pool.companions["mass"], theirs.pool.companions["mass"], rtol=1e-4, atol=1e-4
                )
        assert sum(layer.live_counts().sum() for layer in session.cache.layers) < LENGTH * config.num_kv_heads * 2


@pytest.mark.parametrize("prefill", ["a-shape", "vertical-slash", "flexprefill", "flexprefill:min_budget=200:block=64"])
def test_short_prompts_are_dense_to_the_bit(prefill):
    model, ids = small_model(), small_ids(LENGTH)
    dense, sparse = (run(model, FullCache(), ids, how).logits_BV for how in ("dense", prefill))
    assert torch.equal(dense, sparse)


@torch.no_grad()
def test_a_pattern_that_lists_everything_is_the_dense_prefill():
    model, ids = small_model(2, windows=(None, 60, None)), small_ids(LENGTH)
    everything = FlexPrefill(block=32, gamma=1.0, min_budget=160)
    assert not everything.dense(LENGTH)
    dense, sparse, other = (
        run(model, FullCache(), ids, how).logits_BV for how in ("dense", everything, replace(everything, gamma=0.01))
    )
    torch.testing.assert_close(dense, sparse, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        dense, other, rtol=0, atol=1e-4
    )  # min_budget alone lists 5 of 6 blocks and all diagonals but one


def test_ragged_batches_contexts_and_decoding_after_a_sparse_prompt():
    """A row of a batch is the prompt alone; a compressed context answers as a generation does; both backends agree."""
    lm = LM(small_model(), None)
    how: dict[str, Any] = {"prefill": "a-shape:block=32:sinks=4:local=32"}
    prompts = [small_ids(LENGTH), small_ids(20, seed=1), small_ids(LENGTH + 77, seed=2)]
    policy = get_policy("restkv", budget=40, window=8)
    together = lm.generate(prompts, policy, max_new_tokens=12, **how)
    for prompt, row in zip(prompts, together, strict=True):
        assert lm.generate(prompt, policy, max_new_tokens=12, **how).tokens == row.tokens
    sparse, dense = (lm.generate(prompts[2], policy, max_new_tokens=12, **kind).tokens for kind in (how, {}))
    assert sparse != dense
    assert sum(lm.compress(prompts[0], policy, **how).kept) == 2 * 40


def test_a_session_says_how_it_was_read():
    session = run(small_model(), FullCache(), small_ids(LENGTH), SMALL[2])
    assert session.describe()["job"]["prefill"] == "flexprefill:block=32:gamma=0.5:min_budget=32"
    assert isinstance(session.evictor, Evictor)


# -- benches and commands


def test_policies_share_a_sparse_prompt_as_each_alone_would_read_it():
    lm, ids = LM(small_model(4), None), small_ids(LENGTH)
    policies = [get_policy(name, budget=40) for name in ("restkv", "h2o", "streamingllm")]
    policies += [FullCache(), get_policy("h2o", budget=40, granularity="query")]
    together = [Session(lm.engine, policy, [LENGTH], 4) for policy in policies]
    prefill_together(lm, together, ids, SMALL[0])
    for policy, session in zip(policies, together, strict=True):
        alone = run(lm.model, policy, ids, SMALL[0])
        assert torch.equal(alone.logits_BV, session.logits_BV)
        for ours, theirs in zip(session.cache.layers, alone.cache.layers, strict=True):
            for a, b in zip(entries_of(ours), entries_of(theirs), strict=True):
                assert a.pos == b.pos and torch.equal(a.k, b.k) and torch.equal(a.v, b.v)


@pytest.fixture(scope="module")
def recall() -> LM:
    return load(RECALL)


def test_fidelity_shows_what_a_sparse_prefill_costs_the_full_cache(recall, tmp_path):
    text = (RECALL / "story.txt").read_text(encoding="utf-8")
    plan = FidelityPlan(text, tuple(parse_methods("snapkv")), (64,), context=160, tail=4, windows=1, oracle=0)
    cost = {}
    for prefill in ("dense", "a-shape:block=32:sinks=4:local=32"):
        folder = run_fidelity(recall, replace(plan, prefill=prefill), tmp_path / prefill.partition(":")[0])
        assert read_manifest(folder)["arguments"]["prefill"] == prefill
        cost[prefill] = {row["method"]: row["kl"] for row in read_rows(folder)}
        shown = parts("fidelity", read_manifest(folder)["arguments"], read_rows(folder))
        (table,) = [part for part in shown if isinstance(part, Table)]
        assert [line[0] for line in table.lines] == (["snapkv"] if prefill == "dense" else ["full", "snapkv"])
    dense, sparse = cost.values()
    assert abs(dense["full"]) < 1e-6 and sparse["full"] > 1e-4
    assert sparse["snapkv"] != dense["snapkv"]


def test_benches_refuse_what_cannot_be_shared_and_what_is_unknown(recall, tmp_path):
    plan = FidelityPlan("Once", tuple(parse_methods("")), (64,), prefill="chunked")
    with pytest.raises(PromptError, match="prefill 'chunked' evicts while it reads"):
        run_fidelity(recall, plan, tmp_path)
    ruler = Plan(("niah_single",), (256,), tuple(parse_methods("")), (4.0,), 1, prefill="flexprefill:gamma=7")
    with pytest.raises(PromptError, match="gamma=7"):
        run_ruler(recall, ruler, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ruler_reads_its_prompts_by_a_pattern(recall, monkeypatch):
    """Once for all policies; the answer is that of a generation whose prompt is read so."""
    frame, pattern, read = Frame(recall.tokenizer), parse_prefill("a-shape:block=32:sinks=1:local=1"), []
    choose = AShape.choose

    def spy(self: AShape, q_HLD: Tensor, *rest: Any) -> BlockMap:
        read.append(q_HLD.shape[1])
        return choose(self, q_HLD, *rest)

    monkeypatch.setattr(AShape, "choose", spy)
    sample = make_sample("niah_single", 300, 0, 0, frame)
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    policies = [FullCache(), get_policy("snapkv", budget=64)]
    rows = answer(recall, frame, sample, "aware", policies, pattern)
    assert read == [len(context + asked)] * recall.config.num_layers
    for policy, row in zip(policies, rows, strict=True):
        how = {"max_new_tokens": sample.max_new_tokens, "stop": ".", "prefill": pattern}
        assert row["output"] == recall.generate(context + asked, policy, **how).text


def test_the_command_takes_a_pattern(capsys):
    prompt = ["-p", "Anna has a red hat. " * 40, "--no-chat", "--max-new-tokens", "4", "--budget", "64"]
    assert main(["generate", *prompt, "--prefill", "vertical-slash:block=32:vertical=30:slash=50"]) == 0
    assert main(["generate", *prompt, "--prefill", "vertical-slash:columns=3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "restkv: error: prefill 'vertical-slash:columns=3': 'columns=3' is not OPTION=VALUE with one of"
    )
