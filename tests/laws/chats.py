"""What holds for every chat."""

from __future__ import annotations

from laws.kept import engine_kept
from make.chats import session_of
from restkv.chat import Chat


def holds_what_was_said(chat: Chat) -> None:
    """With a full cache: its entries are those of chat.tokens, all but an unread last one."""
    session = session_of(chat)
    read = int(session.cache.next_pos[0])
    assert len(chat.tokens) - 1 <= read <= len(chat.tokens)
    assert all(held == list(range(read)) for layer in engine_kept(session_of(chat), 0) for held in layer)
    expected = chat.lm.logits(chat.tokens[:read])[-1]
    assert (session.logits_BV[0] - expected).abs().max() < 1e-3
