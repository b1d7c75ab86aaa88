"""Ranks that share a model: logits, kept sets, tokens and figures are those of one process. What two and four ranks do is done
by one group of processes (make/ranks.py), and compared here with the same work done alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from make.families import prompt_ids, save_case
from make.ranks import Job, run_ranks
from make.shared import (
    Described,
    Newest,
    answers,
    broken,
    chunked,
    logits,
    narrow,
    policy_of,
    runs,
    save_shared,
    together,
)
from modeling.checkpoint.loading import load_model
from modeling.families.registry import read_config
from modeling.ranks import ALONE, Ranks
from restkv import traffic
from restkv.engine import Engine
from restkv.errors import PolicyError
from restkv.policies import POLICIES, get_policy
from restkv.policies.base import require_policy
from restkv.testing.cases import fitted
from restkv.traffic import Traffic

# Biases of o_proj and down_proj, a tied head, windows, softcaps, norms after and inside; the second list has four KV heads.
FAMILIES = {2: ("llama31", "llama_biases", "gemma2", "qwen3_window"), 4: ("llama2", "qwen3_window")}
SMALL: dict[str, Any] = {"budget": 14, "window": 4, "interval": 5}
ALLOCATIONS = ("uniform", "pyramid", "adakv", "global")
PROBES = ("window", "prompt", "draft:3", "replay", "window+replay")
PROMPTS = [prompt_ids(length, seed).remainder(61).tolist() for seed, length in enumerate((53, 31))]
NEW = 6
COUNTED: list[Described] = [
    ("snapkv", {"budget": 12, "window": 4, "interval": 2}),
    ("snapkv", {"budget": 12, "window": 4, "interval": 2, "budget_by": "adakv"}),
    ("snapkv", {"budget": 12, "window": 4, "interval": 2, "budget_by": "adakv", "granularity": "query"}),
    ("restkv", {"budget": 12, "window": 4, "interval": 2}),  # global
    ("tova", {"budget": 12, "interval": 2}),
    ("compactor", {"budget": 12, "interval": 2}),
]


def of_all() -> list[Described]:
    """Every policy as it is by default, but small."""
    chosen: list[Described] = []
    for name in POLICIES:
        given: dict[str, Any] = {} if name == "full" else {"budget": 1024}
        small = fitted(get_policy(name, **given))
        options = {} if name == "full" else {key: getattr(small, key) for key in ("budget", "window", "sinks")}
        interval = {} if name in ("full", "streamingllm", "lacache") else {"interval": 5}
        chosen.append((name, options | interval))
    return chosen


SPREAD: list[Described] = [
    *of_all(),
    *(("snapkv", {**SMALL, "budget_by": by, "granularity": "query"}) for by in ALLOCATIONS),
    ("restkv", {**SMALL, "budget_by": "adakv", "aggregate": "indicator"}),
    *(("snapkv", {**SMALL, "budget_by": "adakv", "probe": probe}) for probe in PROBES[1:4]),
    ("restkv", {**SMALL, "preset": "draft", "probe": "prompt+draft:3", "sinks": 2}),
    ("restkv", {**SMALL, "preset": "replay", "refit": "both", "sinks": 2}),
    ("snapkv", {**SMALL, "budget_by": "global", "granularity": "query", "probe": "replay"}),
    ("h2o", {"budget": 14, "interval": 5, "budget_by": "adakv", "granularity": "query", "positions": "original"}),
    ("kvzip", {"budget": 14, "window": 4, "interval": 5}),
    (
        "snapkv",
        {**SMALL, "budget_by": "adakv", "interval": 1},
    ),  # a rank with little would not know that others have too much
    ("snapkv", {**SMALL, "high_water": 18, "protect": ((6, 9),), "budget_by": "global"}),
]


# A call of four ranks takes the processors eleven times as long as one of two: what crosses in each of its ways, and once more
# what does not.
CHOSEN: dict[int, list[Described]] = {
    2: SPREAD,
    4: [
        ("snapkv", {**SMALL, "budget_by": "adakv", "granularity": "query", "probe": "draft:3"}),
        ("restkv", {**SMALL, "preset": "replay", "refit": "both", "sinks": 2, "interval": 5}),
        ("tova", {"budget": 14, "interval": 5}),
        ("compactor", {"budget": 14, "interval": 5, "window": 2, "sinks": 2, "sketch_dimension": 2}),
        ("random", {"budget": 14, "interval": 5, "budget_by": "global"}),
        ("streamingllm", {"budget": 14, "interval": 5}),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shared")
    save_shared(made)
    return made


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for some in FAMILIES.values() for name in some}
    for name, place in made.items():
        save_case(name, place)
    return made


CHUNKED: list[Described] = [
    ("snapkv", {**SMALL, "budget_by": "adakv"}),
    ("restkv", {**SMALL}),
    ("tova", {"budget": 14, "interval": 5}),
]
SAMPLED = {"temperature": 1.3, "seed": 7}
UNSEEDED = {"temperature": 1.3}


def asked_of(size: int, folder: Path, families: dict[str, Path]) -> dict[Any, Job]:
    """What so many ranks are asked in any case."""
    some = [families[name] for name in FAMILIES[size]]
    return {
        ("logits", size): Job(size, "make.shared:logits", (some, prompt_ids(90).tolist(), 80)),
        ("runs", size): Job(size, "make.shared:runs", (folder, CHOSEN[size], PROMPTS, NEW)),
        ("greedy", size): Job(size, "make.shared:answers", (folder, PROMPTS, {})),
        ("crossed", size): Job(size, "make.shared:crossed", (folder, COUNTED[size - 2 :], PROMPTS[0])),
    }


@pytest.fixture(scope="module")
def found_by_2(folder: Path, families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    jobs = asked_of(2, folder, families)
    jobs["sampled", 2] = Job(2, "make.shared:answers", (folder, PROMPTS, SAMPLED))
    jobs["unseeded", 2] = Job(2, "make.shared:answers", (folder, PROMPTS, UNSEEDED))
    jobs["chunked", 2] = Job(2, "make.shared:chunked", (folder, CHUNKED, PROMPTS, 6))
    jobs["narrow", 2] = Job(2, "make.shared:narrow", (folder, PROMPTS[0]))
    jobs["broken", 2] = Job(2, "make.shared:broken", (folder, PROMPTS[1]))
    jobs["refused", 2] = Job(2, "make.shared:refused", (folder,))
    return dict(zip(jobs, run_ranks(tmp_path_factory.mktemp("ranks"), list(jobs.values())), strict=True))


@pytest.fixture(scope="module")
def found_by_4(folder: Path, families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    jobs = asked_of(4, folder, families)
    return dict(zip(jobs, run_ranks(tmp_path_factory.mktemp("ranks"), list(jobs.values())), strict=True))


@pytest.fixture
def found(request: pytest.FixtureRequest) -> dict[Any, list[Any]]:
    """(what, ranks) -> what each rank came to."""
    size = getattr(request.node, "callspec", None) and request.node.callspec.params.get("size")
    return request.getfixturevalue(f"found_by_{size or 2}")


each_size = pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])


@each_size
def test_logits_are_those_of_one_process(found, families, size):
    names = FAMILIES[size]
    want = logits(ALONE, [families[name] for name in names], prompt_ids(90).tolist(), 80)
    for part in found["logits", size]:
        for name, got, alone in zip(names, part, want, strict=True):
            for ours, theirs in zip(got, alone, strict=True):
                assert (ours - theirs).abs().max() < 1e-5, name
    for index in range(len(names)):  # the same bits on all ranks, so that they draw the same tokens
        for which in (0, 1):
            assert all(
                torch.equal(part[index][which], found["logits", size][0][index][which])
                for part in found["logits", size]
            )


@each_size
def test_kept_sets_and_tokens_are_those_of_one_process(found, folder, size):
    chosen = CHOSEN[size]
    compare(chosen, found["runs", size], runs(ALONE, folder, chosen, PROMPTS, NEW))


def compare(chosen: Sequence[Described], parts: Sequence[Sequence[Any]], want: Sequence[Any]) -> None:
    """What ranks have kept, head after head, is what one process keeps."""
    evicted = 0
    for index, (described, alone) in enumerate(zip(chosen, want, strict=True)):
        ours = [part[index] for part in parts]
        assert all(one["tokens"] == alone["tokens"] for one in ours), described
        for when in ("first", "last"):
            assert together([one[when] for one in ours]) == alone[when], (described, when)
        assert all(one["evictions"] == alone["evictions"] for one in ours), described
        evicted += alone["evictions"] > 0
    assert evicted > len(chosen) // 2  # most of them have had something to choose while decoding, too


def test_prompts_that_are_evicted_while_they_are_read_keep_the_same(found, folder):
    compare(CHUNKED, found["chunked", 2], chunked(ALONE, folder, CHUNKED, PROMPTS, 6))


def test_in_bfloat16_logits_differ_by_rounding_alone(found, folder):
    want, wide = narrow(ALONE, folder, PROMPTS[0]), logits(ALONE, [folder], PROMPTS[0], len(PROMPTS[0]))[0][0]
    first, second = found["narrow", 2]
    assert torch.equal(first, second)
    assert (first - wide).abs().mean() < 1.5 * (want - wide).abs().mean()


def test_what_no_number_comes_out_of_is_said_alike_on_all_ranks(found, folder):
    want = broken(ALONE, folder, PROMPTS[1])
    places = ("layer 1's MLP", "layer 0's attention", f"the embedding of token {PROMPTS[1][1]}", "the output matrix")
    assert all(place in line and "hold NaN" in line for place, line in zip(places, want, strict=True))
    for lines in found["broken", 2]:
        assert lines == want


@each_size
def test_greedy_answers_and_their_figures_are_those_of_one_process(found, folder, size):
    want = answers(ALONE, folder, PROMPTS, {})
    for one in found["greedy", size]:
        assert one["tokens"] == want["tokens"] and one["asked"] == want["asked"]
        mine, alone = one["stats"], want["stats"]
        assert [mean for rows in mine.kept for mean in rows] == pytest.approx(
            [mean for rows in alone.kept for mean in rows]
        )
        for name in ("seen", "max_kept", "live_bytes", "full_bytes", "evictions", "new_tokens"):
            assert getattr(mine, name) == getattr(alone, name), name
        assert len(mine.rank_entries) == size and [sum(mine.rank_entries)] == alone.rank_entries
        assert one["imbalance"] == max(mine.rank_entries) / (sum(mine.rank_entries) / size) > 1
    assert want["imbalance"] == 1


def test_sampled_tokens_are_those_of_one_process(found, folder):
    want = answers(ALONE, folder, PROMPTS, SAMPLED)
    assert want["tokens"] != answers(ALONE, folder, PROMPTS, {})["tokens"]
    assert all(one["tokens"] == want["tokens"] for one in found["sampled", 2])


def test_without_a_seed_all_ranks_draw_the_same(found):
    first, *others = found["unseeded", 2]
    assert all(one["tokens"] == first["tokens"] and one["asked"] == first["asked"] for one in others)


@each_size
def test_what_crosses_is_what_is_predicted(found, folder, size):
    config, dtype, length = read_config(folder), torch.float32, len(PROMPTS[0])
    for part in found["crossed", size]:
        for described, (prompt, token, evicting) in zip(COUNTED[size - 2 :], part, strict=True):
            policy = policy_of(described)
            assert isinstance(policy.budget, int)
            held = policy.budget + 2
            want = traffic.of_tokens(config, dtype, tokens=length) + traffic.of_prompt_eviction(
                config, policy, size, length
            )
            assert summed(prompt) == padded(want, config, dtype, size), described
            step = traffic.of_tokens(config, dtype)
            assert summed(token) == padded(step, config, dtype, size), described
            later = traffic.of_eviction(config, policy, size, held)
            got, want = summed(evicting), padded(step + later, config, dtype, size)
            if policy.allocation.ragged:  # as long as the longest list, which the mean says little of
                assert got.calls == want.calls and got.bytes >= want.bytes - 2 * 61 * 8 * 4, described
            else:
                assert got == want, described


def summed(crossed: Sequence[tuple[str, int]]) -> Traffic:
    sums, gathers = ([size for kind, size in crossed if kind == name] for name in ("sum", "gather"))
    return Traffic(len(sums), sum(sums), len(gathers), sum(gathers))


def padded(want: Traffic, config, dtype, size: int) -> Traffic:
    """The vocabulary's last part is filled up to the others' width."""
    more = -config.vocab_size % size * dtype.itemsize
    return want + Traffic(gathered=more)


def test_what_cannot_work_is_refused_by_name(found):
    for lines in found["refused", 2]:
        plugin, saved, heads = lines
        assert plugin.startswith("newest: nobody has said") and "2 ranks" in plugin
        assert "neither saved to a file" in saved
        assert heads == "parallel 'tensor': 4 KV heads do not divide among 3 ranks; start 1 or 2 or 4 of them"


def test_alone_a_policy_that_says_nothing_is_taken():
    assert require_policy(Newest(budget=8, window=4)).name == "newest"
    with pytest.raises(PolicyError, match="no Policy"):
        require_policy("newest")


# -- the exhaustive grid


def grid() -> list[Described]:
    """Every policy under every allocation, granularity and probe that it takes."""
    chosen: list[Described] = []
    for name, options in of_all():
        cls = POLICIES[name]
        for by in ALLOCATIONS:
            for granularity in cls.granularities:
                for probe in PROBES:
                    described = name, {**options, "budget_by": by, "granularity": granularity, "probe": probe}
                    try:
                        policy_of(described)
                    except PolicyError:
                        continue
                    chosen.append(described)
    return chosen


@pytest.mark.slow
def test_every_policy_allocation_granularity_and_probe_keeps_what_one_process_keeps(folder, tmp_path):
    chosen = [one for one in grid() if one[0] != "full"]
    assert len(chosen) > 200 and {name for name, _ in chosen} == set(POLICIES) - {"full"}
    (parts,) = run_ranks(tmp_path, [Job(2, "make.shared:runs", (folder, chosen, PROMPTS[1:], 5))])
    compare(chosen, parts, runs(ALONE, folder, chosen, PROMPTS[1:], 5))


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_gives_what_one_process_gives(folder, tmp_path):
    chosen: list[Described] = [("snapkv", SMALL)]
    (parts,) = run_ranks(tmp_path, [Job(2, "make.shared:compiled_runs", (folder, chosen, PROMPTS, NEW))], 600)
    compare(chosen, [[one for one, _ in part] for part in parts], runs(ALONE, folder, chosen, PROMPTS, NEW))
    for ((_, graphs),) in parts:
        assert graphs == (2, 0)  # the step, and an eviction whose heads nobody compares; then none


@pytest.mark.parametrize(
    ("described", "compared"),
    [
        (("snapkv", SMALL), False),
        (("snapkv", {**SMALL, "budget_by": "pyramid"}), False),
        (("snapkv", {**SMALL, "granularity": "query"}), True),
        (("snapkv", {**SMALL, "budget_by": "adakv"}), True),
        (("restkv", SMALL), True),
        (("tova", {"budget": 12}), True),
        (("compactor", {"budget": 12}), True),
    ],
)
def test_evictions_that_compare_heads_are_eager_where_ranks_share_a_model(folder, described, compared):
    model = load_model(folder, ranks=Ranks(0, 2))
    engine, alone = Engine(model, "sdpa"), Engine(load_model(folder), "sdpa")
    engine.backend = alone.backend = "flex"  # without asking for a compiler
    assert engine.masks(policy_of(described)) is not compared and alone.masks(policy_of(described))
