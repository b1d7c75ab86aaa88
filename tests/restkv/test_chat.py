"""Chats: the cache holds what was said and nothing else, the system prompt stays, and no interruption leaves a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import restkv
from laws.chats import holds_what_was_said
from laws.kept import engine_kept
from make.chats import CHATML, SYSTEM, TEMPLATES, TURNS, say, session_of, stats_of
from restkv.budgets import Pyramid
from restkv.chat import Chat
from restkv.errors import PolicyError, PromptError, RestKVWarning, TokenizerError
from restkv.lm import LM
from restkv.policies import H2O, POLICIES, FullCache, LaCache, ReSTKV, SnapKV, StreamingLLM, get_policy


def with_eos(lm: LM, *tokens: int) -> LM:
    """The same model, ending its answers at other tokens."""
    twin = LM(lm.model, lm.tokenizer)
    twin.config = replace(lm.config, eos_token_ids=tokens)
    return twin


# -- what the cache holds


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_lines_without_a_template(lm, system):
    chat, encode = Chat(lm, FullCache(), system), lm.tokenizer.encode
    expected = encode(f"{system}\n" if system else "")
    for number, turn in enumerate(TURNS):
        expected += encode(("\n" if number else "") + turn + "\n", bos=False)
        answer = say(chat, turn)
        expected += answer.tokens
        assert chat.tokens == expected
        holds_what_was_said(chat)
    assert [m["role"] for m in chat.messages] == ["system"] * bool(system) + ["user", "assistant"] * 3
    assert lm.tokenizer.decode(chat.tokens) == "\n".join(
        m["content"] + "\n" * (m["role"] == "user" and m is not chat.messages[0]) for m in chat.messages
    ).replace("\n\n", "\n")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_turns_rendered_by_a_template(templated, name, system):
    lm = templated(name)
    chat, tokenizer = Chat(lm, FullCache(), system), lm.tokenizer
    user = [{"role": "user", "content": turn} for turn in TURNS]
    first = ([{"role": "system", "content": system}] if system else []) + user[:1]
    assert len(say(chat, TURNS[0]).tokens) == 10
    assert chat.tokens[: len(tokenizer.chat(first))] == tokenizer.chat(first)
    for turn in TURNS[1:]:
        before = list(chat.tokens)
        answer = say(chat, turn)
        assert chat.tokens[: len(before)] == before
        new = tokenizer.decode(chat.tokens[len(before) : len(chat.tokens) - len(answer.tokens)], skip_special=False)
        assert (
            new
            == {
                "chatml": f"</s>\n<|user|>{turn}</s>\n<|assistant|>",
                "stripping": f" </s><s>[INST] {turn.strip()} [/INST]",
                "rewriting": f"\n<user>{turn.upper()}\n<assistant>",
                "moving": f"</s>[INST]{system + chr(10) if system else ''}{turn}[/INST]",
            }[name]
        )
        holds_what_was_said(chat)
    if name == "chatml":
        said = tokenizer.render(chat.messages, add_generation_prompt=False).removesuffix("</s>\n")
        assert tokenizer.decode(chat.tokens, skip_special=False) == said


def test_sentencepiece_gets_no_space_between_turns(stories260k):
    """Its tokenizer puts a space before every text; in the middle of a conversation there is none."""
    lm = restkv.load(stories260k)
    chat = Chat(lm, FullCache())
    first, second = say(chat, "Lily ran."), say(chat, "Tom sat.")
    written = lm.tokenizer.encode("Lily ran.\n") + first.tokens
    between = chat.tokens[len(written) : len(chat.tokens) - len(second.tokens)]
    assert lm.tokenizer.encode("Lily ran.\nTom sat.\n")[len(lm.tokenizer.encode("Lily ran.")) :] == between
    assert lm.encode_continuation("Tom") == lm.tokenizer.encode("\nTom", bos=False)[2:]
    assert lm.tokenizer.decode(lm.tokenizer.encode("Lily") + lm.encode_continuation("'s dog")) == "Lily's dog"
    holds_what_was_said(chat)


@pytest.mark.parametrize("name", ["chatml", None])
def test_an_end_of_sequence_is_not_read(lm, templated, name):
    """The next turn writes its own, if its template has one."""
    lm = lm if name is None else templated(name)
    drawn = say(Chat(lm, FullCache()), TURNS[0]).tokens
    ending = with_eos(lm, drawn[4])
    chat = Chat(ending, FullCache())
    answer = say(chat, TURNS[0])
    end = drawn.index(drawn[4])
    assert (answer.finish_reason, answer.tokens) == ("eos", drawn[: end + 1])
    assert chat.tokens[-end:] == drawn[:end]
    holds_what_was_said(chat)
    say(chat, TURNS[1])
    holds_what_was_said(chat)
    instantly = Chat(with_eos(lm, *range(lm.config.vocab_size)), FullCache())
    for turn in TURNS:  # answers without a token
        assert say(instantly, turn).text == ""
        holds_what_was_said(instantly)


def test_other_ends_of_an_answer(lm):
    chat = Chat(lm, FullCache())
    whole = say(Chat(lm, FullCache()), TURNS[0]).text
    stop = whole[5:9]
    answer = say(chat, TURNS[0], stop=stop)
    assert (answer.finish_reason, answer.text) == ("stop", whole[: whole.index(stop)])
    assert chat.messages[-1]["content"] == answer.text
    holds_what_was_said(chat)
    say(chat, TURNS[1], ignore_eos=True, temperature=2.0, seed=3)
    holds_what_was_said(chat)


def test_turns_that_cannot_be_said(lm, templated):
    chat = Chat(lm, ReSTKV(64))
    cases: list[tuple[Any, str]] = [
        ("", "is empty"),
        ("  \n", "is empty"),
        (b"Tom", "b'Tom' is no text"),
        (None, "None is no text"),
    ]
    for text, words in cases:
        with pytest.raises(PromptError, match=f"the message {words}"):
            chat.send(text)
    with pytest.raises(PromptError, match="max_new_tokens=0"):
        chat.send("Tom", max_new_tokens=0)
    with pytest.raises(PromptError, match="no tokenizer"):
        Chat(LM(lm.model, None), ReSTKV(64))
    assert (chat.messages, chat.tokens, chat.session, chat.stats) == ([], [], None, None)
    deaf = Chat(templated("{{ messages[-1].content }}"), ReSTKV(64))
    say(deaf, "Tom")
    said = list(deaf.tokens)
    with pytest.raises(PromptError, match=r"does not repeat the last answer.*--no-template"):
        say(deaf, "Lily")
    assert deaf.tokens == said and len(deaf.messages) == 2
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(TokenizerError, match="no system role"):
        say(Chat(templated(no_system), ReSTKV(64), SYSTEM), "Tom")
    plain = Chat(templated("chatml"), ReSTKV(64), template=False)
    say(plain, "Tom")
    assert plain.tokens[:-10] == lm.tokenizer.encode("Tom\n")


def test_positions_that_run_out_are_remarked_on_once(lm):
    lm = LM(lm.model, lm.tokenizer)
    lm.config = replace(lm.config, max_positions=50)
    with pytest.warns(RestKVWarning, match="outgrows the model's 50 positions"):
        chat = Chat(lm, ReSTKV(40))
        for turn in TURNS:
            say(chat, turn)
    assert len(chat.tokens) > 60


@pytest.mark.filterwarnings("error::restkv.errors.RestKVWarning")
def test_slots_do_not_run_out(lm):
    lm = LM(lm.model, lm.tokenizer)
    lm.config = replace(lm.config, max_positions=50)
    chat = Chat(lm, StreamingLLM(40))
    for turn in TURNS:
        say(chat, turn)
    assert len(chat.tokens) > 60


# -- eviction


POLICY = {
    name: get_policy(name, None, budget=48, interval=8, **({"window": 8} if POLICIES[name].window > 8 else {}))
    for name in POLICIES
    if name not in ("full", "pyramidkv")
} | {
    "pyramidkv": SnapKV(48, window=8, interval=8, budget_by=Pyramid(beta=2)),  # the usual 20 starves the last layer
    "restkv query": ReSTKV(48, window=8, interval=8, granularity="query"),
    "restkv global": ReSTKV(48, window=8, interval=8, gqa="joint", budget_by="global"),
    "restkv once": ReSTKV(48, window=8, interval=None),
    "h2o every step": H2O(48, recent=8),
    "streamingllm every step": StreamingLLM(48),
}


@pytest.mark.parametrize("policy", POLICY.values(), ids=POLICY)
def test_the_system_prompt_is_never_evicted(policy, lm, tmp_path):
    chat = Chat(lm, policy, SYSTEM)
    spared = len(lm.tokenizer.encode(SYSTEM + "\n"))
    for number, turn in enumerate(TURNS * 3):
        answer = say(chat, turn, max_new_tokens=12)
        assert answer.stats.question == ("agnostic" if number else "aware")
        for layer in engine_kept(session_of(chat), 0):
            for held in layer:
                assert held[:spared] == list(range(spared))
        if number == 4:
            chat.save(tmp_path / "chat")
            chat = Chat.load(tmp_path / "chat", lm)
            chat.change(replace(policy, interval=policy.interval and 5))
    assert (0, spared) in chat.policy.protect
    assert len(chat.tokens) > 200
    assert stats_of(chat).seen == [int(session_of(chat).cache.next_pos[0])]
    if policy.interval:
        assert max(map(max, stats_of(chat).kept)) <= 2 * 48 + 12 < 150  # query heads may hold disjoint sets
    assert lm.tokenizer.decode(chat.tokens[:spared]) == SYSTEM + "\n"


@pytest.mark.parametrize("name", ["chatml", "stripping", "moving"])
def test_the_template_around_the_system_prompt_stays_too(templated, name):
    lm = templated(name)
    chat = Chat(lm, SnapKV(64, window=8, interval=8), SYSTEM)
    for turn in TURNS * 2:
        say(chat, turn)
    ((start, spared),) = chat.policy.protect
    before = lm.tokenizer.render([*chat.messages[:1], {"role": "user", "content": "?"}]).partition("?")[0]
    assert start == 0 and lm.tokenizer.decode(chat.tokens[:spared], skip_special=False) == before
    assert all(held[:spared] == list(range(spared)) for layer in engine_kept(session_of(chat), 0) for held in layer)


def test_a_system_prompt_that_does_not_come_first_is_remarked_on(templated):
    backward = "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"
    with pytest.warns(RestKVWarning, match="does not put the system prompt first"):
        say(Chat(templated(backward), ReSTKV(64), SYSTEM), "Hello")


def test_a_budget_too_small_for_the_system_prompt(lm):
    chat = Chat(lm, ReSTKV(20, window=8), SYSTEM)
    spared = len(lm.tokenizer.encode(SYSTEM + "\n"))
    with pytest.raises(
        PolicyError, match=f"no room for the system prompt's {spared} tokens and the 8 newest .* of 20;"
    ):
        say(chat, "Tom")
    assert (chat.tokens, len(chat.messages)) == ([], 1)
    chat.change(ReSTKV(8 + spared, window=8))
    assert say(chat, "Tom").stats.budget == 8 + spared
    before, session = chat.policy, chat.session
    starved = SnapKV(48, window=8, budget_by="pyramid")
    for policy in (ReSTKV(20, window=8), LaCache(16), H2O(24), starved):
        with pytest.raises(PolicyError):
            chat.change(policy)
        assert chat.policy is before and chat.session is session


@pytest.mark.parametrize("policy", [ReSTKV(0.5), get_policy("h2o", preset="ratio"), LaCache(1.0)])
def test_a_fraction_of_a_conversation_is_refused(policy, lm):
    with pytest.raises(PolicyError, match=r"budget \d\.\d: a chat grows"):
        Chat(lm, policy)
    chat = Chat(lm, ReSTKV(64))
    with pytest.raises(PolicyError, match="a chat grows"):
        chat.change(policy)


def test_another_policy_reads_everything_anew(lm):
    chat = Chat(lm, ReSTKV(40, window=8), SYSTEM)
    for turn in TURNS:
        say(chat, turn)
    policy = SnapKV(44, window=4, interval=8)
    chat.change(policy)
    expected = lm.compress(chat.tokens, chat.policy)
    assert replace(chat.policy, protect=()) == policy
    assert engine_kept(session_of(chat), 0) == engine_kept(expected._session, 0)
    assert (session_of(chat).logits_BV - expected._session.logits_BV).abs().max() < 1e-5
    answer = say(chat, TURNS[0])
    asked = expected.ask("\n" + TURNS[0] + "\n", max_new_tokens=10)
    assert answer.tokens == asked.tokens
    chat.change(FullCache())
    holds_what_was_said(chat)
    untold = Chat(lm, ReSTKV(40), SYSTEM)
    untold.change(policy)
    assert (untold.policy, untold.session) == (policy, None)


def test_a_first_turn_in_chunks(lm):
    long = " ".join(TURNS * 8)
    chat = Chat(lm, ReSTKV(48, window=8), SYSTEM, prefill="chunked", chunk=32)
    say(chat, long)
    assert (0, len(lm.tokenizer.encode(SYSTEM + "\n"))) in chat.policy.protect
    assert stats_of(chat).max_kept <= 48 + 32 + 10
    with pytest.raises(PromptError, match="prefill 'sideways'"):
        say(Chat(lm, ReSTKV(48), prefill="sideways"), "Tom")


def test_starting_anew(lm, templated):
    chat = Chat(templated("chatml"), ReSTKV(64, window=8, protect=((3, 5),)), SYSTEM, template=False)
    first = say(chat, TURNS[0])
    again = chat.anew()
    assert (again.messages, again.tokens, again.policy.protect) == (chat.messages[:1], [], ((3, 5),))
    assert say(again, TURNS[0]).tokens == first.tokens


@pytest.mark.slow
def test_a_compiled_chat_compiles_for_its_first_turn_only(lm):
    eager, compiled = (Chat(LM(lm.model, lm.tokenizer, backend), H2O(48, interval=8)) for backend in ("sdpa", "flex"))
    for number, turn in enumerate(TURNS * 2):
        answer = say(compiled, turn)
        assert answer.tokens == say(eager, turn).tokens
        assert number < 2 or answer.stats.graphs == 0  # the first turn compiles single tokens, the second whole chunks
