"""Sparse prefill: patterns against their slow twins, both backends against an explicit mask, and eviction after it.

Letters: L prompt length, M blocks of it, T rows of a chunk, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from make.small import small_ids, small_model
from make.sparse import LENGTH, SMALL, run
from modeling.layers import Decoder
from restkv.evict import Evictor
from restkv.lm import LM
from restkv.patterns import FlexPrefill, Pattern
from restkv.policies import FullCache, get_policy, known_policies
from restkv.reading import Layer
from restkv.session import Session
from restkv.testing.watch import entries_of
from twins.reference_sparse import choose_slowly, mask_of, masked_output, masked_weights

# -- prompts, and what is kept of them


@torch.no_grad()
def explicit(model: Decoder, ids: list[int], pattern: Pattern) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Every layer's q [H, L, D], k and v [K, L, D], unrotated k, attention by column [H, L], sizes [S, L]; last logits [V]."""
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
        sizes = torch.cat([x_1LE, block.input_layernorm(x_1LE)]).norm(dim=-1)
        x_1LE = block.finish(x_1LE, masked_output(weights, v).transpose(0, 1)[None])
        layers.append((q, k, v, raw, weights.sum(1), sizes))
    return layers, model.head(x_1LE)[0, -1]


@pytest.mark.parametrize("pattern", SMALL, ids=str)
@pytest.mark.parametrize("window", [None, 50])
def test_every_policy_keeps_of_a_sparse_prompt_what_an_explicit_mask_leaves_it(pattern, window):
    """Logits, kept positions, keys and values, for every policy; and those that count attention count what was computed."""
    model, ids = small_model(3, windows=(None, window)).double(), small_ids(LENGTH, seed=1)
    config = model.config
    layers, logits_V = explicit(model, ids, pattern)
    evictable = [name for name in known_policies() if name != "full"]
    policies = [get_policy(name, budget=40, probe="window") for name in evictable]
    policies += [get_policy(name, budget=40, granularity="query") for name in ("restkv", "h2o")]
    policies.append(get_policy("restkv", budget=40, budget_by="global"))
    for policy in policies:
        session = run(model, policy, ids, pattern)
        torch.testing.assert_close(session.logits_BV[0], logits_V.float(), rtol=0, atol=1e-4)
        expected = Session(session.engine, policy, [LENGTH], 4)
        cache, evictor = expected.cache.row(0), expected.evictor.row(0)
        last = min(max(policy.observed_prompt, cache.ring_size), LENGTH)
        for index, (q, k, v, raw, mass_HL, sizes_SL) in enumerate(layers):
            mass = None
            if "mass" in policy.needs:
                mass = (
                    mass_HL
                    if policy.granularity == "query"
                    else mass_HL.unflatten(0, (config.num_kv_heads, -1)).mean(1)
                )
            mine = raw if policy.slot_positions else None
            read = Layer(q[:, LENGTH - last :], k, v, mine, sizes_SL[:, LENGTH - last :])
            evictor.store_prompt(cache, index, read, None if mass is None else mass.float())
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
