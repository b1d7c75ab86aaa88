"""Contexts compressed once and asked often: asking changes nothing, saving loses nothing, and nothing piles up.

Letters: R page lists of a layer, C entries of the longest, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import os
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import restkv
from laws.kept import engine_kept
from make.effort import IN_CI
from make.policies import FOUR, POLICY
from make.small import small_ids, small_model
from modeling.layers import Decoder
from restkv.budgets import Allocation
from restkv.context import CompressedContext
from restkv.errors import OutputError, PolicyError, PromptError
from restkv.lm import LM
from restkv.policies import H2O, POLICIES, FullCache, LaCache, ReSTKV
from restkv.saving import store
from restkv.saving.fingerprint import fingerprint
from restkv.session import Session

CONTEXT, FIRST, SECOND = small_ids(70, 1), small_ids(5, 2), small_ids(20, 3)
ANSWER = 24  # new tokens: several evictions at interval 8

every_policy = pytest.mark.parametrize("policy", POLICY.values(), ids=POLICY)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(small_model(4, windows=FOUR), None)


def frozen(session: Session) -> list[torch.Tensor]:
    """Everything a session's future depends on, as it is in memory."""
    cache = session.cache
    state = [session.logits_BV, cache.next_pos, cache.lag, session.evictor.counted_B, *cache.queries]
    state += [tensor for memory in session.evictor.states if memory is not None for tensor in vars(memory).values()]
    for layer in cache.layers:
        slot_RC, pos_RC = layer.slots()
        state += [pos_RC, layer.pool.k[0, 0, slot_RC], layer.pool.v[0, 0, slot_RC]]
        state += [slab[slot_RC] for slab in layer.pool.companions.values()]
    return [tensor.clone() for tensor in state]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


# -- asking


@every_policy
def test_asking_changes_nothing(policy, lm):
    context = lm.compress(CONTEXT, policy)
    before = frozen(context._session)
    kept, nbytes = context.kept, context.nbytes
    first = context.ask(FIRST, max_new_tokens=ANSWER)
    second = context.ask(SECOND, max_new_tokens=ANSWER)
    assert same(frozen(context._session), before)
    assert context.ask(FIRST, max_new_tokens=ANSWER).tokens == first.tokens
    assert lm.compress(CONTEXT, policy).ask(SECOND, max_new_tokens=ANSWER).tokens == second.tokens
    assert (context.kept, context.nbytes) == (kept, nbytes)
    if policy.interval and policy.budget:
        assert first.stats.evictions > 0


@pytest.mark.parametrize("how", [{}, {"prefill": "chunked", "chunk": 16}], ids=["dense", "chunked"])
def test_with_the_full_cache_it_is_the_concatenation(how, lm):
    context = lm.compress(CONTEXT, FullCache(), **how)
    for question in (FIRST, SECOND):
        whole = lm.generate(CONTEXT + question, FullCache(), max_new_tokens=ANSWER)
        answer = context.ask(question, max_new_tokens=ANSWER)
        assert answer.tokens == whole.tokens
        assert answer.stats.seen == whole.stats.seen
        assert answer.stats.prompt_tokens == whole.stats.prompt_tokens
    expected = lm.logprobs(CONTEXT, [FIRST, SECOND])
    assert context.logprobs([FIRST, SECOND]) == pytest.approx(expected, abs=1e-4)


def test_prefills_agree_when_nothing_is_evicted_between_chunks(lm):
    """A budget above the chunk: the first eviction sees what a dense prefill shows it."""
    dense = lm.compress(CONTEXT, ReSTKV(20, window=4))
    chunked = lm.compress(CONTEXT, ReSTKV(20, window=4), prefill="chunked", chunk=len(CONTEXT))
    assert engine_kept(dense._session, 0) == engine_kept(chunked._session, 0)


def test_every_result_says_what_was_known_when_it_was_evicted(lm):
    policy = ReSTKV(20, window=4)
    context = lm.compress(CONTEXT, policy)
    assert lm.generate(CONTEXT + FIRST, policy, max_new_tokens=1).stats.question == "aware"
    assert context.ask(FIRST, max_new_tokens=1).stats.question == "agnostic"
    stream = context.stream(FIRST, max_new_tokens=3)
    assert list(stream) == []  # no tokenizer, no text
    assert stream.generation.stats.question == "agnostic"
    assert stream.generation.stats.asdict()["question"] == "agnostic"


def test_sampling_is_repeatable(lm):
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    draw = [context.ask(FIRST, max_new_tokens=12, temperature=1.5, seed=seed).tokens for seed in (1, 2, 1)]
    assert draw[0] == draw[2] != draw[1]


def tensors() -> int:
    gc.collect()
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


def test_fifty_questions_leave_no_page_behind(lm):
    context = lm.compress(CONTEXT, ReSTKV(20, window=4, interval=8))
    pools = [layer.pool for layer in context._session.cache.layers]
    context.ask(SECOND, max_new_tokens=60)  # the longest: pools may grow once
    sizes = [(pool.num_pages, pool.free_pages) for pool in pools]
    alive = tensors()
    for seed in range(50):
        context.ask(small_ids(1 + seed % 20, seed), max_new_tokens=1 + seed)
    assert [(pool.num_pages, pool.free_pages) for pool in pools] == sizes
    assert tensors() <= alive + 5


# Under CI one policy of each kind of cache; others are compiled in the test below.
ASKED = ["restkv query", "full", "h2o", "pyramidkv", *([] if IN_CI else ["restkv", "restkv once", "streamingllm"])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_questions_compile_once(name, tmp_path):
    """Compiled for the first question; others, also of other lengths and after loading, find their graphs ready."""
    torch._dynamo.reset()  # caches of several policies have one shape, and share their graphs
    lm = LM(small_model(4, windows=FOUR), None, backend="flex")
    context = lm.compress(CONTEXT, POLICY[name])
    assert context.ask(FIRST, max_new_tokens=ANSWER).stats.graphs > 0
    context.ask(SECOND, max_new_tokens=ANSWER)
    for question in (FIRST, SECOND, small_ids(11, 5)):
        assert context.ask(question, max_new_tokens=ANSWER - 3).stats.graphs == 0
    assert lm.compress(small_ids(64, 9), POLICY[name]).ask(FIRST, max_new_tokens=ANSWER).stats.graphs == 0
    context.save(tmp_path / "context")
    loaded = CompressedContext.load(tmp_path / "context", lm)
    assert loaded.ask(FIRST, max_new_tokens=ANSWER).stats.graphs == 0


@pytest.mark.slow
def test_a_compiled_context_answers_as_an_eager_one():
    model = small_model(4, windows=FOUR)
    for name in ("restkv", "h2o", "streamingllm", "restkv query"):
        answers = [
            LM(model, None, backend).compress(CONTEXT, POLICY[name]).ask(SECOND, max_new_tokens=ANSWER).tokens
            for backend in ("sdpa", "flex")
        ]
        assert answers[0] == answers[1], name


# -- on disk


@every_policy
def test_a_saved_context_is_the_same(policy, lm, tmp_path):
    context = lm.compress(CONTEXT, policy)
    context.save(tmp_path / "context")
    loaded = CompressedContext.load(str(tmp_path / "context"), lm)
    assert loaded.policy == policy
    assert (loaded.kept, loaded.nbytes, loaded.tokens) == (context.kept, context.nbytes, context.tokens)
    assert engine_kept(loaded._session, 0) == engine_kept(context._session, 0)
    assert same(frozen(loaded._session), frozen(context._session))
    for question in (FIRST, SECOND):
        mine, theirs = (c.ask(question, max_new_tokens=ANSWER) for c in (loaded, context))
        assert mine.tokens == theirs.tokens
        assert mine.stats.kept == theirs.stats.kept
        assert mine.stats.evictions == theirs.stats.evictions
    assert list(tmp_path.iterdir()) == [tmp_path / "context"]  # no half-written file beside it


@pytest.mark.parametrize(
    "name", ["restkv", "h2o every step", "streamingllm every step", "lacache every step", "h2o query"]
)
def test_a_session_saved_in_mid_answer_goes_on(name, lm, tmp_path):
    """With entries marked dead between the live ones, and an interval half over."""
    policy = POLICY[name]
    session = Session(lm.engine, policy, [70], 40, extends=True)
    session.prefill([CONTEXT])
    for token in small_ids(13, 8):
        session.feed(torch.tensor([token]))
    store.save_session(session, tmp_path / "session", {"note": "ü"})
    loaded, about = store.load_session(lm.engine, tmp_path / "session")
    assert about == {"note": "ü"}
    for token in small_ids(20, 9):
        session.feed(torch.tensor([token]))
        loaded.feed(torch.tensor([token]))
        assert (session.logits_BV - loaded.logits_BV).abs().max() < 1e-4
        assert engine_kept(loaded, 0) == engine_kept(session, 0)


def test_half_precision_survives(tmp_path):
    lm = LM(small_model(4, windows=FOUR).bfloat16(), None)
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    context.save(tmp_path / "context")
    assert same(frozen(CompressedContext.load(tmp_path / "context", lm)._session), frozen(context._session))


def test_a_context_belongs_to_its_model(lm, tmp_path):
    place = tmp_path / "context"
    lm.compress(CONTEXT, ReSTKV(20, window=4)).save(place)
    ours = fingerprint(lm.model)
    tweaked = small_model(4, windows=FOUR)
    tweaked.blocks[2].o_proj.weight[0, 0] += 1e-3
    retrained = small_model(4, windows=FOUR)  # in a few rows, which no sample of its numbers need touch
    retrained.embed_tokens.weight[-3:] += 1
    others: list[Decoder] = [
        small_model(5, windows=FOUR),
        small_model(4, windows=(None, 9, None, None)),
        small_model(4, windows=FOUR).bfloat16(),
        tweaked,
        retrained,
    ]
    for other in others:
        with pytest.raises(
            PromptError, match=f"made with the model {ours}, this one is {fingerprint(other)};"
        ) as error:
            CompressedContext.load(place, LM(other, None))
        assert str(place) in str(error.value)
        assert "\n" not in str(error.value)
    again = small_model(4, windows=FOUR)  # built anew, the same model
    assert CompressedContext.load(place, LM(again, None)).tokens == len(CONTEXT)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def edited(place, **changes):
    """Rewrite a saved file with other metadata."""
    with safe_open(place, "pt") as file:
        labels = dict(file.metadata())
    save_file(load_file(place), place, labels | changes)


DAMAGE = {
    "empty": (lambda place: place.write_bytes(b""), "cannot be read as a saved context"),
    "text": (lambda place: place.write_text("once upon a time, there was a file"), "cannot be read as a saved context"),
    "cut": (lambda place: place.write_bytes(place.read_bytes()[:-100]), "cannot be read as a saved context"),
    "cut in the header": (
        lambda place: place.write_bytes(place.read_bytes()[:60]),
        "cannot be read as a saved context",
    ),
    "a flipped bit": (lambda place: place.write_bytes(flipped(place.read_bytes(), -200)), "damaged since it was saved"),
    "weights": (lambda place: save_file({"w": torch.ones(3)}, place), "not written by restkv"),
    "a later format": (lambda place: edited(place, restkv="7"), "has format '7', this version of restkv reads 3"),
    "edited": (lambda place: edited(place, about=json.dumps({"model": "mine"})), "damaged since it was saved"),
    "gone": (lambda place: place.unlink(), "no such file"),
    "a folder": (lambda place: place.unlink() or place.mkdir(), "is a folder"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_no_context_is_named(damage, words, lm, tmp_path):
    place = tmp_path / "context.safetensors"
    lm.compress(CONTEXT, ReSTKV(20, window=4)).save(place)
    damage(place)
    with pytest.raises(PromptError, match=words) as error:
        CompressedContext.load(place, lm)
    assert str(error.value).startswith(f"{place}: ")
    assert "\n" not in str(error.value)


def test_places_that_cannot_be_written_are_named(lm, tmp_path):
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for place in (
        tmp_path / "no" / "such",
        tmp_path / "folder",
        tmp_path / "file" / "inside",
        "/proc/context",
        "",
        "/",
        tmp_path / "pipe",
        "/dev/null",
        tmp_path / "loop",
    ):
        with pytest.raises(OutputError, match=f"^{place or repr('')}: cannot be written") as error:
            context.save(place)
        assert "\n" not in str(error.value) and "tmp" not in str(error.value).partition(": ")[2]
        assert ".part" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop", "pipe"]


def test_a_saved_file_follows_links_and_has_the_mode_of_any_other(lm, tmp_path):
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to("real")
    umask = os.umask(0o027)
    try:
        context.save(link)
        assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
        real.chmod(0o604)
        context.save(link)
    finally:
        os.umask(umask)
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o604
    assert CompressedContext.load(link, lm).kept == context.kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_failed_save_costs_nothing(lm, tmp_path, monkeypatch):
    place = tmp_path / "context"
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    context.save(place)
    before = place.read_bytes()

    def full_disk(number):
        raise OSError(28, "No space left on device", ".part", None, "elsewhere")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match=f"^{place}: cannot be written \\(No space left on device\\);"):
        lm.compress(SECOND, ReSTKV(20, window=4)).save(place)
    assert place.read_bytes() == before
    assert list(tmp_path.iterdir()) == [place]


@every_policy
def test_policies_survive_json(policy):
    assert store.policy_from_dict(json.loads(json.dumps(store.policy_to_dict(policy)))) == policy


def test_policies_that_this_version_does_not_know_are_refused():
    saved = store.policy_to_dict(ReSTKV(20, window=4))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"name": "nothing"}, "'nothing' is unknown"),
        ({"budget_by": {"name": "lottery"}}, "'lottery' is unknown"),
        ({"colour": 3}, "do not fit this version.*colour"),
    ]
    for change, words in changes:
        with pytest.raises(PolicyError, match=words):
            store.policy_from_dict(saved | change)


def test_a_memory_that_cannot_be_saved_is_refused(lm, tmp_path, monkeypatch):
    class Diary(ReSTKV):
        name = "diary"

        def start(self):
            return ["dear diary"]

    monkeypatch.setitem(POLICIES, "diary", Diary)
    context = lm.compress(CONTEXT, Diary(20, window=4))
    with pytest.raises(PolicyError, match="diary: its memory is no dataclass of tensors"):
        context.save(tmp_path / "context")


def test_what_would_be_read_back_as_something_else_is_refused(lm, tmp_path):
    class Mine(ReSTKV):
        name = "mine"

    class Other(ReSTKV):
        def importance(self, obs):
            return -super().importance(obs)

    class Flat(Allocation):
        pass

    for policy, words in (
        (Mine(20, window=4), "method 'mine' is unknown"),
        (Other(20, window=4), "Other is not what the name 'restkv' stands for"),
        (ReSTKV(20, window=4, budget_by=Flat()), "Flat is not what the name 'uniform' stands for"),
    ):
        with pytest.raises(PolicyError, match=words):
            lm.compress(CONTEXT, policy).save(tmp_path / "context")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", [ReSTKV(20, window=4), LaCache(24, window=4)], ids=lambda policy: policy.name)
def test_what_was_loaded_does_not_change_with_the_file(lm, tmp_path, policy):
    path = tmp_path / "context"
    lm.compress(CONTEXT, policy).save(path)
    loaded = CompressedContext.load(path, lm)
    want = CompressedContext.load(path, lm).logprobs([SECOND])
    path.write_bytes(bytes(path.stat().st_size))
    assert loaded.logprobs([SECOND]) == want
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()  # and the file's memory is given back


def test_one_continuation_that_is_not_in_a_list_is_refused(lm):
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    for one in ("text", SECOND):
        with pytest.raises(PromptError, match="is one text; give a list of them"):
            context.logprobs(one)
        with pytest.raises(PromptError, match="is one text; give a list of them"):
            lm.logprobs(CONTEXT, one)


def test_a_judgement_that_is_broken_off_gives_its_pages_back(lm, monkeypatch):
    context = lm.compress(CONTEXT, ReSTKV(20, window=4))
    pool = context._session.cache.layers[0].pool
    free, feed = pool.free_pages, Session.feed

    def broken(self, ids_B):
        feed(self, ids_B)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "feed", broken)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            context.logprobs([SECOND])
    assert pool.free_pages == free


STORY = " ".join(
    ["Once upon a time, there was a girl named Lily. She loved to play with her red ball in the park."] * 4
)


def test_text_contexts(stories260k, tmp_path):
    """With a tokenizer: what text says, in pieces, from a context on disk."""
    lm = restkv.load(stories260k)
    context = lm.compress(STORY, ReSTKV(40, window=8))
    context.save(tmp_path / "story")
    loaded = CompressedContext.load(tmp_path / "story", lm)
    stream = loaded.stream(" One day, she", max_new_tokens=20)
    pieces = list(stream)
    answer = context.ask(" One day, she", max_new_tokens=20)
    assert "".join(pieces) == stream.generation.text == answer.text
    assert len(pieces) > 1
    assert sum(context.kept) / len(context.kept) == 40
    whole = lm.compress(STORY, FullCache()).ask(" One day, she", max_new_tokens=20)
    assert whole.tokens == lm.generate(STORY + " One day, she", FullCache(), max_new_tokens=20).tokens


def test_an_answer_broken_off_changes_nothing(stories260k):
    lm = restkv.load(stories260k)
    context = lm.compress(STORY, H2O(40))
    before, whole = frozen(context._session), context.ask(" She", max_new_tokens=12).tokens
    pages = [layer.pool.free_pages for layer in context._session.cache.layers]
    for piece in context.stream(" She", max_new_tokens=12):
        assert piece
        break
    refused: list[tuple[Any, dict[str, Any]]] = [("", {}), (" She", {"max_new_tokens": 0}), ([99999], {})]
    for question, options in refused:
        with pytest.raises(PromptError):
            context.ask(question, **options)
    assert [layer.pool.free_pages for layer in context._session.cache.layers] == pages
    assert same(frozen(context._session), before)
    assert context.ask(" She", max_new_tokens=12).tokens == whole
