"""Probes (restkv/probes.py): what they are written as, what they read, what they leave alone, and all that takes a policy.

What they keep is compared with a slow twin in tests/laws/test_probes.py.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.law import watched
from make.chats import say, session_of
from make.small import small_ids, small_lm, small_model
from modeling.attention import branched_attention
from restkv import drafting, probes, reading
from restkv.chat import Chat
from restkv.context import CompressedContext
from restkv.engine import Engine
from restkv.errors import PolicyError, RestKVError, RestKVWarning
from restkv.evict import Evictor
from restkv.lm import LM
from restkv.phrases import Phrases
from restkv.policies import POLICIES, KVzip, Policy, ReSTKV, SnapKV, get_policy
from restkv.probes import MOST_BYTES, MOST_QUESTIONS, Drafted, Replay, Side, parse_probe
from restkv.reading import side_layer
from restkv.session import Session
from restkv.testing.watch import positions, snapshot

IDS = small_ids(40)
PROBES = ("prompt", "prompt:4", "draft:5", "replay", "window+prompt+draft:3+replay")


def held(session: Session) -> list[list[list[int]]]:
    return [positions(lists) for lists in snapshot(session.cache)]


def refused(text: str, kind: type[Exception] = PolicyError) -> str:
    with pytest.raises(kind) as caught:
        SnapKV(40, probe=text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def tokens_beside() -> Iterator[list[int]]:
    """How many tokens each layer reads after a prompt, padding included."""
    read: list[int] = []

    def count(model, block, x_TE, *rest):
        read.append(len(x_TE))
        return side_layer(model, block, x_TE, *rest)

    def branched(q_BTHD, *rest, **how):
        read.append(q_BTHD.shape[0] * q_BTHD.shape[1])
        return branched_attention(q_BTHD, *rest, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "side_layer", count)
        patch.setattr(drafting, "branched_attention", branched)
        yield read


# -- as text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "nothing",
            "probe 'nothing': 'nothing' is unknown; choose from window, prompt, draft, replay, questions, ask, joined by +",
        ),
        ("", "probe '': '' is unknown"),
        ("window+", "probe 'window+': '' is unknown"),
        ("window + prompt", "'window ' is unknown"),
        ("draft:3+draft:4", "one of them is given twice"),
        ("replay:5", "probe 'replay:5': replay takes nothing after a colon"),
        ("window:", "probe 'window:': window takes nothing after a colon"),
        ("questions:", "name a file after the colon"),
        ("questions:4:", "name a file after the colon"),
        ("questions:0", "give the tokens of an answer to draft, 1 to 4096"),
        ("questions:5000:a.txt", "give the tokens of an answer to draft, 1 to 4096"),
        ("ask+ask:3", "one of them is given twice"),
        *((f"ask:{n}", "give how many questions the model is to ask, 1 to 10") for n in ("", "0", "11", "x.txt", "-1")),
        ("a\nb", r"probe 'a\nb'"),
        *((f"prompt:{n}", "give how many queries to observe, 1 to 16777216") for n in ("", "0", "x", "-1", "16777217")),
        *(
            (f"draft:{n}", "give the tokens to draft, 1 to 4096")
            for n in ("", "0", "x", "-1", "1.5", "99999", "4097", "0000000019999999", "9" * 5000, "\u0663")
        ),
    ],
)
def test_what_is_no_probe_is_refused_in_one_line(text, words):
    message = refused(text)
    assert message.startswith("snapkv: probe ") and words in message and len(message) < 400


@pytest.mark.parametrize(
    ("length", "count", "expected"), [(1, 256, [0]), (9, 256, [4, 5, 6, 7, 8]), (10, 3, [5, 7, 9]), (11, 2, [7, 10])]
)
def test_the_prompts_own_queries_lie_in_its_second_half_at_equal_distances_and_end_with_it(length, count, expected):
    assert [*probes.Own(count).own(length)] == expected


@given(st.integers(1, 10_000), st.integers(1, 5000))
def test_there_are_as_many_of_them_as_fit(length, count):
    own = probes.Own(count).own(length)
    assert min(count, length - length // 2) / 2 < len(own) <= count and own[0] >= length // 2 and own[-1] == length - 1


def test_a_probe_is_text():
    with pytest.raises(PolicyError, match=r"snapkv: probe 8: give text"):
        SnapKV(40, probe=8)  # type: ignore[arg-type]


def test_probes_are_read_as_they_are_written():
    assert [vars(one) for one in parse_probe("draft+draft:4096".split("+")[1])] == [{"count": 4096}]
    window, draft, questions = parse_probe("window+draft+questions:a:b/c.txt")
    assert (window.name, vars(draft), vars(questions)) == ("window", {"count": 8}, {"path": "a:b/c.txt", "count": 0})
    for text, path, count in (
        ("questions", None, 0),
        ("questions:12", None, 12),
        ("questions:12:a:b", "a:b", 12),
        ("questions:./12", "./12", 0),
        ("questions:a:", "a:", 0),
    ):
        assert [vars(one) for one in parse_probe(text)] == [{"path": path, "count": count}]
    assert [vars(one) for one in (*parse_probe("ask"), *parse_probe("ask:3"))] == [{"count": 10}, {"count": 3}]


@pytest.mark.parametrize("name", [name for name, cls in POLICIES.items() if not cls.observes])
def test_scores_that_observe_no_queries_take_no_probe(name):
    with pytest.raises(PolicyError, match=f"^{name}: probe 'replay': the score of {name} depends on no queries"):
        get_policy(name, None, probe="replay", **({} if name == "full" else {"budget": 64}))


def test_nor_do_scores_made_of_collected_attention():
    """A plugin that forgets to say so: attention is collected from all queries of the prompt."""

    @dataclasses.dataclass(frozen=True)
    class Mine(SnapKV):
        name = "mine"
        needs = frozenset({"mass"})

    with pytest.raises(PolicyError, match="depends on no queries"):
        Mine(40, probe="replay")


# -- a file of questions


def asked(lm: LM, path: object) -> None:
    lm.compress("Lily had a red ball, and a cat, and a small house.", SnapKV(6, window=4, probe=f"questions:{path}"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no questions; give 1 to 1024 lines"),
        (b" \n\r\n", "has no questions"),
        (b"Who?\n\xff\n", "cannot be read (it is not UTF-8)"),
        (b"Who?\n" * (MOST_QUESTIONS + 1), "has 1025 questions; give 1 to 1024 lines"),
        (b"W" * (MOST_BYTES + 1), f"is too large; give at most {MOST_BYTES} bytes"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_without_questions_is_refused_in_one_line(lm, tmp_path, content, words):
    path = tmp_path / "questions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        asked(lm, path)
    assert str(caught.value) == f"probe questions: '{path}' {words}" or words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_a_folder_nor_an_impossible_name_is_a_file(lm, tmp_path):
    for path, words in ((tmp_path, "Is a directory"), ("a\0b", "there can be no such name")):
        with pytest.raises(PolicyError) as caught:
            asked(lm, path)
        assert words in str(caught.value)


def test_every_line_that_is_not_empty_is_a_question(lm, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text(
        "\ufeffWho is it?\r\n\n" + "\n  What is red?\n" * 900, encoding="utf-8"
    )  # more lines than questions
    (probe,) = parse_probe(f"questions:{path}")
    sides = probe.sides(IDS, Phrases(lm.tokenizer))
    assert len(sides) == 901 and {side.part for side in sides} == {None}
    texts = [lm.tokenizer.decode(side.ids) for side in sides]
    assert "Question: Who is it?" in texts[0] and "Question: What is red?" in texts[-1]


@pytest.mark.parametrize("probe", ["questions", "questions:3", "ask:2"])
def test_questions_need_a_tokenizer(probe):
    """Else the probe would quietly be another one."""
    with pytest.raises(PolicyError, match="no tokenizer to ask with"):
        small_lm().generate(IDS, SnapKV(20, window=4, probe=probe), max_new_tokens=1)
    small_lm().generate(IDS, SnapKV(60, window=4, probe=probe), max_new_tokens=1)  # nothing is evicted, nor asked


# -- what is read


def test_a_request_ends_the_turn_of_a_chat_and_opens_the_answers(templated):
    lm = templated("chatml")
    sides = [
        side
        for probe in parse_probe("replay+questions")
        for side in probe.sides(lm.encode("Lily"), Phrases(lm.tokenizer))
    ]
    for side in sides:
        text = lm.tokenizer.decode(side.ids, skip_special=False)
        opening = lm.tokenizer.render([{"role": "user", "content": "X"}]).partition("X")[2]
        assert text.startswith("\n\n") and opening in text
    assert sides[0].ids[-len(lm.encode("Lily")) :] == tuple(lm.encode("Lily"))


def test_a_question_of_the_models_own_is_one_turn_and_its_answer_the_next(templated):
    lm = templated("chatml")
    (ask,) = parse_probe("ask")
    sides = ask.sides(lm.encode("Lily"), Phrases(lm.tokenizer))
    assert len({side.ids for side in sides}) == len(sides) == len(probes.BEGINNINGS)
    for side, words in zip(sides, probes.BEGINNINGS, strict=True):
        question, answer = side.drafts
        assert (question.most, answer) == (probes.ASKED, Drafted(probes.ANSWERED))
        asked, between = (lm.tokenizer.decode(ids, skip_special=False) for ids in (side.ids, question.then))
        user = lm.tokenizer.render([{"role": "user", "content": "X"}], False).partition("X")[0]
        opening = lm.tokenizer.render([{"role": "user", "content": "X"}]).partition("X")[2]
        assert asked == f"\n\nWrite a question about the text above.{opening}{words}"
        assert between.endswith(f"{user}Answer it shortly.{opening}") and "?" not in between


def test_a_text_without_a_template_asks_in_lines(lm):
    (side,) = parse_probe("ask:1")[0].sides(lm.encode("Lily"), Phrases(lm.tokenizer))
    assert lm.tokenizer.decode(side.ids) == "\n\nWrite a question about the text above.\nWhat"
    assert lm.tokenizer.decode(side.drafts[0].then) == "\nAnswer it shortly.\n"


def test_texts_are_gone_on_with_in_one_batch(lm):
    """Ten questions and their answers take as many steps as the longest of them."""
    ids = lm.encode("Lily had a red ball. " * 6)
    session = Session(lm.engine, SnapKV(20, window=4, probe="questions:3+draft:2"), [len(ids)], 1)
    lm.model.config, kept = dataclasses.replace(lm.config, eos_token_ids=()), lm.model.config
    try:
        with tokens_beside() as read:
            session.prefill([ids])
    finally:
        lm.model.config = kept
    layers, texts = lm.config.num_layers, len(probes.QUESTIONS) + 1
    longest = max(len(side.ids) for side in parse_probe("questions")[0].sides(ids, Phrases(lm.tokenizer)))
    steps = [texts * longest, texts, texts, texts - 1]
    assert read == [tokens for tokens in steps for _ in range(layers)]


def test_a_replay_beside_drafts_is_read_once_they_are_made(monkeypatch):
    """So that its keys and values are alive of one layer at a time, as without them."""
    order: list[str] = []

    def noted(owner: Any, name: str) -> None:
        run = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            order.append(name)
            return run(*arguments)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((reading, "draft"), (reading, "side_layer"), (Evictor, "store_prompt")):
        noted(owner, name)
    small_lm().compress(IDS, SnapKV(12, window=4, probe="replay+draft:3"))
    assert order == ["draft", *["side_layer", "store_prompt"] * 2]


def test_a_long_text_is_replayed_in_pieces(monkeypatch):
    monkeypatch.setattr(probes, "PIECE", 15)
    sides = Replay().sides(IDS, Phrases())
    assert sides == [
        Side(tuple(IDS[:15]), (0, 15)),
        Side((*IDS[7:15], *IDS[15:30]), (15, 30)),
        Side((*IDS[22:30], *IDS[30:]), (30, 40)),
    ]
    monkeypatch.setattr(probes, "PIECE", 40)
    assert Replay().sides(IDS, Phrases()) == [Side(tuple(IDS))]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("budget", [39, 40, 1000])
def test_nothing_is_read_besides_where_nothing_is_evicted(probe, budget):
    lm = small_lm()
    policy = SnapKV(budget, window=4, probe=probe, interval=None)
    with tokens_beside() as read:
        kept = lm.compress(IDS, policy).kept
    assert kept == [min(budget, 40)] * 2
    layers, replayed, drafted = 2, 40 * ("replay" in probe), {"draft:5": 5, PROBES[-1]: 3}.get(probe, 0)
    assert sum(read) == (layers * (replayed + drafted) if budget < 40 else 0)


def test_an_answer_that_has_ended_is_not_drafted_on():
    """With no draft at all it is the window that is observed."""
    model = small_model(3)
    first = int(LM(model, None).logits(IDS)[-1].argmax())
    model.config = dataclasses.replace(model.config, eos_token_ids=(first,))
    sessions = [
        Session(Engine(model, "sdpa"), SnapKV(12, window=4, probe=probe), [40], 1) for probe in ("draft", "window")
    ]
    with tokens_beside() as read:
        for session in sessions:
            session.prefill([IDS])
    assert not read and held(sessions[0]) == held(sessions[1])


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.filterwarnings("ignore::modeling.errors.RestKVWarning")  # the window is longer than the prompt
def test_prompts_of_a_few_tokens(probe, length):
    lm = small_lm()
    for policy in (
        KVzip(1, window=1, sinks=0, probe=probe),
        SnapKV(2, window=2, probe=probe),
        ReSTKV(2, window=1, probe=probe),
    ):
        with watched():
            done = lm.generate(IDS[:length], policy, max_new_tokens=3)
        assert len(done.tokens) == 3


@pytest.mark.parametrize("probe", PROBES)
def test_a_prompt_longer_than_the_models_positions(probe):
    lm = small_lm()
    lm.config = lm.model.config = dataclasses.replace(lm.config, max_positions=16)
    with pytest.warns(RestKVWarning, match="exceeds the model's 16 positions"):
        done = lm.generate(IDS, KVzip(20, probe=probe), max_new_tokens=2)
    assert len(done.tokens) == 2


# -- what it changes, and what not


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", ["kvzip", "kvzip-plus", "restkv", "snapkv"])
def test_rows_of_a_batch_are_the_prompts_alone_and_only_the_kept_entries_differ(probe, name):
    model, prompts = small_model(2, windows=(9, None)), [small_ids(n, n) for n in (40, 9, 1, 23)]
    policy = get_policy(name, budget=14, window=4, probe=probe, interval=5)

    def run(policy: Policy, rows: list[list[int]]) -> tuple[Any, ...]:
        session = Session(Engine(model, "sdpa"), policy, [len(row) for row in rows], 12)
        session.prefill(rows)
        first, kept = session.logits_BV, held(session)
        for token in small_ids(12, 7):
            session.feed(torch.tensor([token] * len(rows)))
        return first, kept, session.logits_BV, held(session)

    first, kept, last, later = run(policy, prompts)
    assert torch.equal(first, run(dataclasses.replace(policy, probe="window"), prompts)[0])
    heads = len(kept[0]) // len(prompts)
    for row, prompt in enumerate(prompts):
        alone = run(policy, [prompt])
        mine = slice(row * heads, (row + 1) * heads)
        assert [layer[mine] for layer in kept] == alone[1]
        assert [layer[mine] for layer in later] == alone[3]
        torch.testing.assert_close(last[row], alone[2][0], rtol=1e-4, atol=1e-4)
        assert max(p for layer in alone[1] for head in layer for p in head) < len(prompt), (
            "an entry of the probe's was kept"
        )


@pytest.mark.parametrize("probe", PROBES)
def test_budgets_are_met(probe):
    for policy in (
        SnapKV(12, window=4, probe=probe),
        SnapKV(12, window=4, granularity="query", probe=probe),
        SnapKV((20, 7), window=4, probe=probe),
        SnapKV(0.5, window=4, probe=probe),
        ReSTKV(12, window=4, probe=probe),
        KVzip(14, probe=probe),
        get_policy("adakv", budget=12, window=4, probe=probe),
        get_policy("pyramidkv", budget=12, window=4, probe=probe),
    ):
        with watched() as watch:
            small_lm().compress(IDS, policy)
        assert watch.prompts == 1 and watch.cut


@pytest.mark.parametrize("prefill", ["flexprefill", "vertical-slash", "a-shape"])
def test_a_sparse_prefill_takes_probes(prefill):
    lm = small_lm()
    for probe in PROBES:
        with watched():
            context = lm.compress(small_ids(300), KVzip(40, probe=probe), prefill=prefill)
        assert sum(context.kept) == 2 * 40


@pytest.mark.parametrize("probe", [*PROBES, "questions:3", "ask:2"])
def test_a_chunked_prefill_does_not(probe):
    lm = small_lm()
    with pytest.raises(RestKVError) as caught:
        lm.generate(IDS, KVzip(20, probe=probe), prefill="chunked", chunk=16)
    assert f"probe {probe!r}: " in str(caught.value) and "\n" not in str(caught.value)
    assert "choose probe=window, or prefill=dense" in str(caught.value)
    lm.generate(IDS, KVzip(20, probe="window"), prefill="chunked", chunk=16, max_new_tokens=1)
    lm.generate(IDS, KVzip(None, probe=probe), prefill="chunked", chunk=16, max_new_tokens=1)  # nothing is evicted


@pytest.mark.parametrize("probe", [*PROBES, "questions", "replay+ask:2", "questions:3"])
def test_everything_that_takes_a_policy_takes_one_with_a_probe(lm, tmp_path, probe):
    """Texts, streams, likelihoods, chats, contexts; and a context that was saved goes on as before."""
    policy = KVzip(20, window=4, probe=probe, interval=6)
    text, options = "Lily had a red ball. " * 4, {"max_new_tokens": 16}
    done = lm.generate(text, policy, **options)
    assert "".join(lm.stream(text, policy, **options)) == done.text
    assert lm.logprobs(text, ["The ball is red."], policy)
    context = lm.compress(text, policy)
    context.save(tmp_path / "context")
    again = CompressedContext.load(tmp_path / "context", lm)
    assert again.policy == policy
    assert again.ask("Who?", **options).tokens == context.ask("Who?", **options).tokens


@pytest.mark.parametrize("probe", [*PROBES, "questions:3", "ask:2"])
def test_a_chat(templated, probe):
    chat = Chat(templated("chatml"), KVzip(24, window=4, probe=probe, interval=6), None)
    for said in ("Lily had a red ball. " * 3, "Who had it?"):
        assert len(say(chat, said).tokens) > 1
        assert session_of(chat).policy.probe == probe


# -- of other packages


SOURCE = """
from dataclasses import dataclass
from restkv.probes import Probe, Side

@dataclass(frozen=True)
class Twice(Probe):
    name = "twice"
    def sides(self, ids, phrases):
        return [Side(tuple(ids))] * 2
"""


@pytest.fixture
def register(tmp_path, monkeypatch):
    """register(package, source, name=place, ...): a package that brings probes, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def add(package: str, source: str, **points: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = (f"{name} = {place}" for name, place in points.items())
        (info / "entry_points.txt").write_text("[restkv.probes]\n" + "\n".join(lines))
        (tmp_path / f"{package}.py").write_text(source)

    yield add
    parse_probe.cache_clear()
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


def test_a_probe_of_another_package(register):
    register("twofold", SOURCE, twice="twofold:Twice")
    sessions = []
    for probe in ("twice", "replay"):
        sessions.append(Session(Engine(small_model(1), "sdpa"), SnapKV(12, window=4, probe=probe), [40], 1))
        with tokens_beside() as read:
            sessions[-1].prefill([IDS])
        assert read == [40] * (4 if probe == "twice" else 2)
    assert held(sessions[0]) == held(sessions[1])
    assert "twice:3" in refused("twice:3") and "questions, ask, twice, joined by +" in refused("thrice")


@pytest.mark.parametrize(
    ("place", "source", "words"),
    [
        (
            "odd:Mine",
            "raise ValueError('two\\nlines')",
            "odd:Mine of the package odd cannot be imported (ValueError: two lines)",
        ),
        ("odd:Mine", "", "cannot be imported (AttributeError"),
        ("odd:Mine", "Mine = 3", "is no restkv.probes.Probe of that name"),
        ("restkv.probes:Replay", "", "is no restkv.probes.Probe of that name"),
    ],
)
def test_a_broken_probe_is_named_in_one_line(register, place, source, words):
    register("odd", source, mine=place)
    assert words in refused("window+mine")


def test_no_package_takes_one_of_our_names_nor_anothers(register):
    register("one", SOURCE, twice="one:Twice", replay="one:Twice")
    register("two", SOURCE, twice="two:Twice")
    assert parse_probe("replay") == (Replay(),)
    assert "registered by one:Twice of the package one and two:Twice of the package two" in refused("twice")


def test_a_context_is_compressed_by_a_replay_where_no_policy_is_given():
    lm = small_lm()
    ids = small_ids(1100)
    given = {
        "chunked": get_policy("restkv", "replay", budget=1024, probe="window"),
        "dense": get_policy("restkv", "replay", budget=1024, refit="both"),
    }
    for prefill, policy in given.items():
        assert lm.compress(ids, prefill=prefill).policy == policy
