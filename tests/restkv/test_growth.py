"""Memory comes with the tokens, whatever was planned; where there is none left it is one line, and nothing is lost."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv
from make.effort import many
from make.places import environment
from make.policies import FOUR, POLICY, SOME
from make.small import eagerly, small_ids, small_lm, small_model
from modeling import free, room
from modeling.checkpoint.loading import load_model
from modeling.pool import PagePool, pool_size
from restkv import sizing
from restkv.chat import Chat
from restkv.engine import Engine
from restkv.errors import PromptError, TooLargeError
from restkv.lm import LM
from restkv.policies import H2O, ExpectedAttention, FullCache, Policy, ReSTKV, SnapKV
from restkv.session import Session

EVER = 200_000
PLANS: dict[str, tuple[Policy, dict]] = {
    "full": (FullCache(), {}),
    "once": (SnapKV(24, window=4, interval=None), {}),
    "once, part": (SnapKV(0.1, window=4, interval=None), {}),
    "part": (ReSTKV(0.1, window=4, interval=16), {}),
    "seldom": (ReSTKV(20, window=4, interval=EVER), {}),
    "bounded": (ReSTKV(20, window=4, interval=8), {}),
    "ragged once": (ReSTKV(0.2, window=4, interval=None, budget_by="adakv"), {}),
    "for forks": (FullCache(), {"forks": 1}),
    "for forks, part": (ReSTKV(0.2, window=4), {"forks": 3, "extends": True}),
    "chunked": (FullCache(), {"prefill": "chunked"}),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("policy", "how"), PLANS.values(), ids=PLANS)
def test_a_long_answer_costs_nothing_before_it_is_there(policy, how, compiled):
    """Room for the prompt and 512 tokens, whether 600 or 200,000 are allowed; also once the answer has begun."""
    held = []
    for new in (600, EVER):
        engine = eagerly(Engine(small_model(), "flex")) if compiled else Engine(small_model(), "sdpa")
        session = Session(engine, policy, [60, 9], new, **how)
        session.prefill([small_ids(60), small_ids(9)])
        for token in (1, 2):
            session.feed(torch.tensor([token] * 2))
        held.append(session.cache.reserved_bytes)
    per_entry = engine.model.config.kv_bytes_per_token(torch.float32) * 1.2
    assert held[1] <= held[0]
    assert held[1] < (4 if compiled else 2) * (1 + how.get("forks", 0)) * (2 * (60 + 512 + 512) + 600) * per_entry


def test_a_budget_without_end_is_a_full_cache():
    """A budget beyond any prompt takes what the prompt takes."""
    lm, ids = small_lm(windows=FOUR), small_ids(70)
    want = lm.generate(ids, FullCache(), max_new_tokens=30)
    for policy in (SnapKV(2_000_000_000), ReSTKV(20_000, interval=50_000), ReSTKV(2_000_000_000, interval=None)):
        done = lm.generate(ids, policy, max_new_tokens=30)
        assert done.tokens == want.tokens
        assert done.stats.kept == want.stats.kept


@pytest.mark.parametrize("name", [*SOME, "restkv once", "h2o query", "snapkv layers"])
def test_what_grows_says_the_same(name, monkeypatch):
    """Pools that begin with room for a few tokens grow in the middle of answers, questions and turns."""
    lm, ids, policy = LM(small_model(4, windows=FOUR), None), small_ids(50), POLICY[name]

    def said():
        batch = lm.generate([ids, ids[:20]], policy, max_new_tokens=40) if name != "restkv part" else []
        context = lm.compress(ids, policy)
        answers = [context.ask(small_ids(n, n), max_new_tokens=20) for n in (3, 60)]
        tokens = [row.tokens for row in [*batch, *answers]]
        return tokens, [row.stats.kept for row in [*batch, *answers]], context.logprobs([small_ids(20)])

    want = said()
    grown = []
    grow = PagePool.grow

    def noting(pool: PagePool, count: int) -> None:
        grown.append(count)
        grow(pool, count)

    monkeypatch.setattr(PagePool, "grow", noting)
    monkeypatch.setattr(sizing, "AHEAD", 1)
    monkeypatch.setattr(sizing, "FIXED", 1)
    assert said() == want
    assert grown or policy.interval


def test_a_fork_that_grows_the_pool_leaves_the_others_alone(monkeypatch):
    monkeypatch.setattr(sizing, "AHEAD", 1)
    lm, ids = small_lm(windows=FOUR), small_ids(50)
    session = Session(lm.engine, FullCache(), [50], 1, forks=1)
    session.prefill([ids])
    one, other = session.fork(), session.fork()
    for fork, tokens in ((one, small_ids(200, 1)), (other, small_ids(40, 2))):
        fork.extend([tokens])
    want = small_lm(windows=FOUR).logits(ids + small_ids(200, 1) + [3])[-1:]
    one.feed(torch.tensor([3]))
    torch.testing.assert_close(one.logits_BV, want, atol=1e-4, rtol=1e-4)
    session.feed(torch.tensor([5]))
    torch.testing.assert_close(session.logits_BV, lm.logits([*ids, 5])[-1:], atol=1e-4, rtol=1e-4)


@settings(max_examples=many(200, 2))
@given(pages=st.integers(1, 10**9), steps=st.sampled_from([1, 2, 4, 8]))
def test_sizes_of_pools(pages, steps):
    size = pool_size(pages, steps)
    assert pages <= size < pages * (1 + 1 / steps) + 1
    assert pool_size(size, steps) == size, "a size is its own"
    assert size < steps or size % (1 << (size.bit_length() - steps.bit_length())) == 0


# -- lack of memory


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    said = str(error.value)
    assert "\n" not in said and "not enough memory" in said
    for word in words:
        assert word in said


@pytest.fixture
def scarce(monkeypatch):
    """scarce(count): only so many bytes are free from now on; None: as many as there are."""
    monkeypatch.setattr(room, "LARGE", 0)

    def only(count: int | None) -> None:
        monkeypatch.setattr(room, "free_bytes", lambda: count)

    return only


def test_what_is_too_large_to_begin_names_its_numbers(scarce):
    lm, ids = small_lm(), small_ids(300)
    scarce(20_000)
    for policy, options, words in (
        (
            FullCache(),
            {},
            ["the prompt (300 tokens)", "max_new_tokens (128)", "take a method with a budget", "bfloat16"],
        ),
        (ReSTKV(200), {}, ["the prompt (300 tokens)", "the budget (200)"]),
        (
            ReSTKV(200, window=4),
            {"prefill": "chunked", "chunk": 4096},
            ["lower the budget (200) or the chunk (4096 tokens)"],
        ),
        (SnapKV(0.5, interval=None), {"max_new_tokens": 70}, ["the budget (0.5)", "max_new_tokens (70)"]),
        (H2O(200, interval=9000), {}, ["the budget (200)", "the interval (9000)"]),
    ):
        with pytest.raises(TooLargeError) as error:
            lm.generate(ids, policy, **options)
        one_line(error, *words)
    with pytest.raises(TooLargeError) as error:
        lm.generate([ids] * 3)
    one_line(error, "the rows (3)")
    scarce(None)
    assert lm.generate(ids, FullCache(), max_new_tokens=2).tokens


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_whatever_the_allocator_says(failure, monkeypatch, tmp_path, rambler):
    """In the prompt, in the middle of an answer, in scores, in logits, in loading: always one line."""
    lm = restkv.load(rambler)
    context = lm.compress("one two three", ReSTKV(20, window=4))
    want = context.ask(" four", max_new_tokens=8).text

    def fails(*_, **__):
        raise failure

    for place, name, call in (
        ("restkv.session.prefill", "the prompt", lambda: lm.generate("one two")),
        ("restkv.lm.dense_hidden", "logits at 1 places", lambda: lm.logits([5])),
        (
            "modeling.layers.Decoder.to_empty",
            f"{rambler}: not enough memory, the weights take",
            lambda: restkv.load(rambler),
        ),
        ("modeling.pages.LayerCache.reserve", "the prompt", lambda: context.ask(" four")),
        ("modeling.pages.LayerCache.view", "the prompt", lambda: context.logprobs([" four five"])),
        ("modeling.cache.KVCache.create", "the prompt", lambda: lm.compress("one two", FullCache())),
    ):
        with monkeypatch.context() as patched, pytest.raises(TooLargeError) as error:
            patched.setattr(place, fails)
            call()
        one_line(error, name)
        if "8000000000" in str(failure):
            assert "(8.0 GB were asked for)" in str(error.value)
        elif "GiB" in str(failure):
            assert "(2.00 GiB were asked for)" in str(error.value)
    assert context.ask(" four", max_new_tokens=8).text == want


def test_a_pool_that_cannot_grow_is_as_it_was(scarce, monkeypatch):
    """Neither the pool nor what is in it changes, and with memory it goes on; what failed is not half done."""
    monkeypatch.setattr(sizing, "AHEAD", 1)
    lm = small_lm()
    session = Session(lm.engine, FullCache(), [30], EVER)
    session.prefill([small_ids(30)])
    tokens, pools = small_ids(100, 3), [layer.pool for layer in session.cache.layers]
    sizes = [pool.k.shape for pool in pools]
    scarce(1000)
    fed = 0
    with pytest.raises(TooLargeError):
        while True:
            session.feed(torch.tensor(tokens[fed : fed + 1]))
            fed += 1
    assert [pool.k.shape for pool in pools] == sizes
    assert all(len(pool.pos) == pool.v.shape[2] == pool.num_pages * pool.page for pool in pools)
    scarce(None)
    for token in tokens[fed:]:
        session.feed(torch.tensor([token]))
    torch.testing.assert_close(session.logits_BV, lm.logits(small_ids(30) + tokens)[-1:], atol=1e-4, rtol=1e-4)


def test_a_chat_stays(scarce, monkeypatch, rambler, tmp_path):
    monkeypatch.setattr(sizing, "AHEAD", 1)
    monkeypatch.setattr(sizing, "FIXED", 1)
    lm = restkv.load(rambler)
    chat = Chat(lm, FullCache(), "Be brief.", template=False)
    "".join(chat.send("one", max_new_tokens=8))
    chat.save(tmp_path / "chat")
    before = list(chat.messages), list(chat.tokens)
    scarce(1000)
    with pytest.raises(TooLargeError) as error:
        list(chat.send("two " * 300, max_new_tokens=8))
    one_line(error, "max_new_tokens (8)")
    with pytest.raises(TooLargeError):
        chat.change(ReSTKV(40, window=4))
    with pytest.raises(TooLargeError):
        Chat.load(tmp_path / "chat", lm)
    assert (chat.messages, chat.tokens) == before and chat.policy == FullCache()
    scarce(None)
    same = Chat.load(tmp_path / "chat", lm)
    assert "".join(chat.send("three", max_new_tokens=8)) == "".join(same.send("three", max_new_tokens=8))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A folder for what Linux says of memory, with nothing in it."""
    for name, file in (("MEMINFO", "meminfo"), ("STATUS", "status"), ("CGROUPS", "cgroups"), ("CGROUP", "cgroup")):
        monkeypatch.setattr(free, name, tmp_path / file)
    return tmp_path


MEMINFO = "MemTotal:       8000 kB\nMemAvailable:    4000 kB\nSwapFree:         1000 kB\n"


def test_what_is_free_is_known_or_nobody_says(machine):
    assert free.free_bytes() is None and free.free_text() == ""
    room.require(1 << 60, torch.device("cpu"))  # the allocator has the last word
    (machine / "meminfo").write_text(MEMINFO)
    assert free.free_bytes() == 5000 * 1024
    with pytest.raises(MemoryError):
        room.require(1 << 40, torch.device("cpu"))
    room.require(1 << 40, torch.device("meta"))


def test_this_machine_says_what_is_free():
    known = free.free_bytes()
    assert known is None or known > 1 << 20


def write_files(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


@pytest.mark.parametrize("path", ["/", "/outer/inner", "/elsewhere/than/in/this/container"])
@pytest.mark.parametrize(
    ("most", "high", "want"),
    [("max", "max", None), (2_000_000, "max", 1_300_000), (2_000_000, 1_500_000, 800_000), (10, "max", 0)],
)
def test_the_limits_of_a_cgroup_count_where_it_is_mounted(machine, path, most, high, want):
    (machine / "meminfo").write_text(MEMINFO)
    (machine / "cgroups").write_text(f"5:cpu:/x\n0::{path}\n")
    own = machine / "cgroup" / ("outer/inner" if "outer" in path else "")
    stat = "anon 5\ninactive_file 300000"
    write_files(own, memory_max=most, memory_high=high, memory_current=1_000_000, memory_stat=stat)
    assert free.free_bytes() == (5000 * 1024 if want is None else want)
    assert ("in its cgroup" in free.free_text()) == (want is not None)


def test_the_tightest_of_all_cgroups_above_counts_and_version_1_too(machine):
    (machine / "meminfo").write_text(MEMINFO)
    (machine / "cgroups").write_text("0::/a/b\n4:cpuset,memory:/c\n")
    for folder, limit in (("a/b", 4_000_000), ("a", 3_000_000)):
        write_files(machine / "cgroup" / folder, memory_max=limit, memory_current=1_000_000, memory_stat="")
    assert free.free_bytes() == 2_000_000
    write_files(
        machine / "cgroup" / "memory" / "c",
        memory_limit_in_bytes=1_500_000,
        memory_usage_in_bytes=1_000_000,
        memory_stat="inactive_file 9\ntotal_inactive_file 100000",
    )
    assert free.free_bytes() == 600_000


@pytest.mark.parametrize(("limit", "used", "name"), free.ULIMITS)
def test_the_limits_of_the_process_count(machine, monkeypatch, limit, used, name):
    (machine / "meminfo").write_text(MEMINFO)
    (machine / "status").write_text(f"Name:\tpython\n{used}:\t    1000 kB\nThreads:\t1\n")
    limits = {limit: 3000 * 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda one: (limits.get(one, resource.RLIM_INFINITY), 0))
    assert (free.free_bytes(), free.free_text()) == (2000 * 1024, f"2.0 MB are free under {name}")
    limits[limit] = 10 * 1024  # it can be lowered below what is there
    assert free.free_bytes() == 0
    limits.clear()
    assert free.free_bytes() == 5000 * 1024


def test_weights_beyond_a_limit_of_the_process_are_refused_by_its_name(tiny, monkeypatch):
    used = free._kilobytes(free.STATUS)["VmSize"]
    limits = {resource.RLIMIT_AS: used + 1000}
    monkeypatch.setattr(resource, "getrlimit", lambda one: (limits.get(one, resource.RLIM_INFINITY), 0))
    with pytest.raises(TooLargeError) as error:
        load_model(tiny("llama2").folder)
    one_line(error, " MB as ", ", 0.0 MB are free under ulimit -v;")


UNDER_ULIMIT = """
import resource
import torch
from modeling import free, room

soft = free._kilobytes(free.STATUS)["VmSize"] + (150 << 20)
resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
assert free.free_bytes() <= 150 << 20 and "under ulimit -v" in free.free_text()
room.require(100 << 20, torch.device("cpu"))
try:
    room.require(200 << 20, torch.device("cpu"))
except MemoryError as error:
    print(error)
"""


def test_a_real_limit_of_the_process_is_seen():
    ran = subprocess.run([sys.executable, "-c", UNDER_ULIMIT], env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0 and f"tried to allocate {200 << 20} bytes" in ran.stdout, ran.stderr[-3000:]


LIMITED = """
import resource, sys
import torch
from make.small import small_ids, small_lm
from restkv.errors import TooLargeError
from restkv.policies import FullCache, ReSTKV, SnapKV

lm = small_lm()
want = lm.generate([1, 2, 3], FullCache(), max_new_tokens=4).tokens
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (150 << 20), now + (150 << 20)))
many = [1, 2] * 500_000
for policy, options in ((FullCache(), {}), (ReSTKV(8000), {"prefill": "chunked", "chunk": 500_000}), (SnapKV(900_000), {})):
    try:
        lm.generate(many, policy, **options)
    except TooLargeError as error:
        assert "not enough memory" in str(error) and "lower" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(policy)
assert lm.generate([1, 2, 3], FullCache(), max_new_tokens=4).tokens == want
"""


@pytest.mark.slow
def test_under_a_limit_of_the_system():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED], env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize(
    "options", [{"interval": 2_000_000}, {"interval": 2_000_000, "prefill": "chunked", "chunk": 10**6}]
)
def test_what_an_eviction_remembers_grows_with_the_job(backend, options):
    """A long interval or chunk costs nothing before there are tokens, also where all queries since an eviction count."""
    lm, (interval, reading) = small_lm(backend, head_dim=16), (options["interval"], {**options})
    del reading["interval"]
    engine = eagerly(lm.engine) if backend == "flex" else lm.engine
    for policy in (H2O(budget=8, interval=interval), ExpectedAttention(budget=8, interval=interval)):
        session = Session(engine, policy, [12], 5, **reading)
        assert 17 <= session.cache.ring_size <= 512
        session.prefill([small_ids(12)])
        session.feed(torch.tensor([3]))
        assert len(session.ids[0]) == 12


def test_chunks_and_answers_beyond_every_position_are_refused():
    lm = small_lm()
    for mistake in ({"chunk": 2**31, "prefill": "chunked"}, {"max_new_tokens": 2**31}):
        with pytest.raises(PromptError, match=r"214748364[78]"):
            lm.generate(small_ids(5), **mistake)
