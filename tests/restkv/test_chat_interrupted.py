"""Chats that are broken off: an interruption leaves no trace; and chats on disk."""

from __future__ import annotations

import pytest

from laws.chats import holds_what_was_said
from laws.kept import engine_kept
from make.chats import SYSTEM, TURNS, say, session_of, stats_of
from restkv.chat import Chat
from restkv.context import CompressedContext
from restkv.errors import OutputError, PolicyError, PromptError
from restkv.policies import H2O, FullCache, LaCache, ReSTKV, SnapKV, StreamingLLM

# -- interruptions


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("pieces", [1, 4])
def test_an_answer_broken_off_is_kept_as_far_as_it_came(stops, pieces, lm):
    chat = Chat(lm, FullCache())
    whole = say(Chat(lm, FullCache()), TURNS[0], max_new_tokens=30)
    stream = chat.send(TURNS[0], max_new_tokens=30)
    words = iter(stream)
    heard = "".join(next(words) for _ in range(pieces))
    assert chat.stats is None
    if stops:
        chat.stop()
        holds_what_was_said(chat)
    say(chat, TURNS[1])
    assert chat.messages[1]["content"] == heard
    assert whole.text.startswith(heard) and heard != whole.text
    holds_what_was_said(chat)
    assert list(words) == []
    with pytest.raises(RuntimeError, match="not ended yet"):
        _ = stream.generation


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("before", [0, 1])
def test_a_message_whose_answer_nobody_hears_is_read(stops, before, lm):
    chat = Chat(lm, FullCache())
    for _ in range(before):
        say(chat, TURNS[2])
    chat.send(TURNS[0])
    if stops:
        chat.stop()
        chat.stop()
        holds_what_was_said(chat)
    assert say(chat, TURNS[1]).stats.question == "agnostic"
    assert [m["content"] for m in chat.messages[2 * before :][:3]] == [TURNS[0], "", TURNS[1]]
    holds_what_was_said(chat)


def test_a_message_never_heard_that_cannot_be_read_is_not_said(lm):
    chat = Chat(lm, ReSTKV(20, window=8), SYSTEM)
    chat.send(TURNS[0])
    with pytest.raises(PolicyError, match="no room for the system prompt"):
        chat.change(ReSTKV(64))
    chat.change(ReSTKV(64))
    say(chat, TURNS[1])
    assert [m["content"] for m in chat.messages[:2]] == [SYSTEM, TURNS[1]]


@pytest.mark.parametrize("failing", [1, 2, 5])
@pytest.mark.parametrize("policy", [FullCache(), StreamingLLM(40), ReSTKV(40, window=8, interval=4)])
def test_an_interruption_within_a_step_leaves_no_trace(failing, policy, lm, monkeypatch):
    """Layers that hold different tokens are thrown away: the next turn reads everything anew."""
    chat = Chat(lm, policy)
    first = say(chat, TURNS[0])
    said = list(chat.tokens)
    step, calls = lm.engine.decode, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        result = step(*arguments)  # all layers have written the tokens, but nobody has counted them
        if calls == failing:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(lm.engine, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(chat, TURNS[1])
    monkeypatch.undo()
    assert chat.session is None
    assert chat.tokens[: len(said)] == said
    drawn = failing - 1  # the first call reads the turn, the others what was drawn before
    assert len(chat.messages) == (4 if drawn else 2)
    new = lm.encode_continuation("\n" + TURNS[1] + "\n") if drawn else []
    assert len(chat.tokens) == len(said) + len(new) + drawn
    answer = say(chat, TURNS[2])
    assert answer.stats.question == "aware"  # it was read together with all the rest
    before = chat.tokens[: len(chat.tokens) - len(answer.tokens)]
    assert answer.tokens == lm.generate(before, policy, max_new_tokens=10).tokens
    if policy.budget is None:
        holds_what_was_said(chat)
    assert first.tokens == chat.tokens[len(lm.tokenizer.encode(TURNS[0] + "\n")) :][: len(first.tokens)]


# -- on disk


@pytest.mark.parametrize("name", [None, "chatml"])
@pytest.mark.parametrize("policy", [ReSTKV(48, window=8, interval=8), H2O(48, recent=8), LaCache(48)])
def test_a_saved_chat_goes_on(name, policy, lm, templated, tmp_path):
    lm = lm if name is None else templated(name)
    chat = Chat(lm, policy, SYSTEM, prefill="chunked", chunk=64)
    for turn in TURNS[:2]:
        say(chat, turn)
    chat.save(tmp_path / "chat")
    loaded = Chat.load(str(tmp_path / "chat"), lm)
    assert (loaded.messages, loaded.tokens, loaded.policy) == (chat.messages, chat.tokens, chat.policy)
    assert stats_of(loaded).kept == stats_of(chat).kept
    for turn in TURNS:
        assert say(loaded, turn).tokens == say(chat, turn).tokens
    assert engine_kept(session_of(loaded), 0) == engine_kept(session_of(chat), 0)
    loaded.change(SnapKV(52, window=4))
    chat.change(SnapKV(52, window=4))
    assert loaded.policy == chat.policy
    assert engine_kept(session_of(loaded), 0) == engine_kept(session_of(chat), 0)


def test_chats_and_contexts_are_not_mixed_up(lm, tmp_path):
    chat = Chat(lm, ReSTKV(48))
    with pytest.raises(PromptError, match="nothing has been said yet"):
        chat.save(tmp_path / "chat")
    assert not list(tmp_path.iterdir())
    say(chat, "Tom")
    chat.save(tmp_path / "chat")
    lm.compress("Tom", ReSTKV(48)).save(tmp_path / "context")
    with pytest.raises(PromptError, match=f"^{tmp_path}/chat: holds a chat, not a context"):
        CompressedContext.load(tmp_path / "chat", lm)
    with pytest.raises(PromptError, match=f"^{tmp_path}/context: holds a context, not a chat"):
        Chat.load(tmp_path / "context", lm)
    with pytest.raises(OutputError, match="cannot be written"):
        chat.save(tmp_path / "no" / "chat")
    assert say(chat, "Lily").text  # it goes on


def test_saving_ends_an_answer_and_mends_a_failed_turn(lm, tmp_path, monkeypatch):
    chat = Chat(lm, FullCache())
    for _ in chat.send(TURNS[0]):
        chat.save(tmp_path / "chat")
        break
    loaded = Chat.load(tmp_path / "chat", lm)
    assert loaded.messages == chat.messages and len(chat.messages) == 2
    holds_what_was_said(loaded)
    monkeypatch.setattr(lm.engine, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        say(chat, TURNS[1])
    monkeypatch.undo()
    chat.save(tmp_path / "chat")
    holds_what_was_said(Chat.load(tmp_path / "chat", lm))
