"""A conversation over one cache: every turn is appended, what does not fit the budget is evicted, the system prompt stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restkv.errors import PromptError
from restkv.generate import Session
from restkv.memory import Meter
from restkv.policies import Policy
from restkv.results import Decoding, Generation, Stats, TextStream
from restkv.store import load_session, save_session

if TYPE_CHECKING:
    from restkv.lm import LM

Message = dict[str, str]


class Chat:
    """Turns between a user and the model.

    With a chat template in the checkpoint turns are rendered by it; without one they are joined as they are, line by line.

    Args:
        lm: the model.
        policy: what is evicted as the conversation grows.
        system: instructions; their tokens are protected from eviction.
    """

    def __init__(self, lm: LM, policy: Policy, system: str | None = None) -> None:
        self.lm, self._base = lm, policy
        self.policy = policy
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._session: Session | None = None
        self._text = ""  # everything in the cache, as the template wrote it and the model answered
        self._unfed: list[int] = []  # the answer's last token, which has not been through the model

    def send(self, text: str, **options: Any) -> TextStream:
        """Say something; the answer comes as pieces of text. A turn that is broken off is kept as far as it came.

        Args:
            options: the fields of Decoding.
        """
        if not text.strip():
            raise PromptError("the message is empty; say something")
        results: list[Generation] = []
        return TextStream(self._turn(text, results, Decoding(**options)), results)

    def _turn(self, text: str, results: list[Generation], decoding: Decoding) -> Iterator[tuple[int, str]]:
        lm = self.lm
        new = self._rendered([*self.messages, {"role": "user", "content": text}])
        ids = [*self._unfed, *lm.encode_continuation(new)] if self._session else lm.encode(new)
        self.messages.append({"role": "user", "content": text})
        self._text, self._unfed = self._text + new, []
        meter = Meter(lm.device)
        if self._session is None:
            self.policy = self._protecting()
            self._session = Session(lm.engine, self.policy, [len(ids)], decoding.max_new_tokens, extends=True)
            self._session.prefill([ids])
        else:
            self._session.resume(decoding.max_new_tokens)
            self._session.extend([ids])
        stats = Stats(self.policy.name, self.policy.budget, [int(self._session.cache.next_pos[0])], question="agnostic")
        answer: list[str] = []
        try:
            for row, piece in lm.decode(self._session, decoding, stats, meter, results):
                answer.append(piece)
                yield row, piece
        finally:
            # Also when the answer is broken off: the last drawn token is not in the cache, an end of sequence never will be.
            last = self._session.last_ids
            self._unfed = [token for token in last if token not in lm.config.eos_token_ids]
            self._text += "".join(answer)
            self.messages.append({"role": "assistant", "content": "".join(answer)})

    def _rendered(self, messages: list[Message]) -> str:
        """The text that has to be appended to what the cache holds for the model to answer the last message."""
        tokenizer = self.lm.tokenizer
        assert tokenizer is not None, "a chat needs a tokenizer"
        if not tokenizer.has_chat_template:
            fresh = messages if self._session is None else messages[-1:]
            return ("\n" if self._session else "") + "\n".join(message["content"] for message in fresh) + "\n"
        whole = tokenizer.render(messages, add_generation_prompt=True)
        if whole.startswith(self._text):
            return whole[len(self._text) :]
        # The template rewrites what was said (it strips spaces, say); the new message alone is what is left to add.
        before = tokenizer.render(messages[:-1])
        after = tokenizer.render(messages, add_generation_prompt=True)
        if not after.startswith(before):
            raise PromptError("this chat template rewrites earlier turns; start the chat anew, or use --no-chat")
        return after[len(before) :]

    def _protecting(self) -> Policy:
        """The policy with the system prompt's positions among its protected spans."""
        tokenizer = self.lm.tokenizer
        if not self.messages or self.messages[0]["role"] != "system" or self._base.budget is None:
            return self._base
        assert tokenizer is not None
        plain = self.messages[0]["content"] + "\n"
        text = tokenizer.render(self.messages[:1]) if tokenizer.has_chat_template else plain
        return replace(self._base, protect=(*self._base.protect, (0, len(self.lm.encode(text)))))

    @property
    def session(self) -> Session | None:
        """The cache and its schedule; None before the first turn."""
        return self._session

    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to one safetensors file.

        Raises:
            PromptError: nothing has been said yet.
            OutputError: the file cannot be written.
        """
        if self._session is None:
            raise PromptError("nothing has been said yet; there is nothing to save")
        about = {"messages": self.messages, "text": self._text, "unfed": self._unfed}
        save_session(self._session, path, about)

    @classmethod
    def load(cls, path: str | Path, lm: LM) -> Chat:
        """Go on with a saved conversation.

        Raises:
            PromptError: no such file, not a chat, or one of another model, which is named.
        """
        session, about = load_session(lm.engine, path)
        if "messages" not in about:
            raise PromptError(f"{path}: a compressed context, not a chat; ask it with CompressedContext")
        chat = cls(lm, session.policy)
        chat.messages, chat._text, chat._unfed = about["messages"], about["text"], about["unfed"]
        chat._session = session
        return chat
