"""A conversation over one cache: every turn is appended, what does not fit the budget is evicted, the system prompt stays."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from inspect import GEN_CREATED, getgeneratorstate
from pathlib import Path
from typing import Any

from modeling.modes import own_modes
from modeling.room import enough_memory
from restkv.budgets import LONGEST
from restkv.errors import PolicyError, PromptError, RestKVWarning
from restkv.lm import LM
from restkv.meter import Meter
from restkv.patterns import Pattern, parse_prefill
from restkv.policies import Policy
from restkv.policies.base import require_policy
from restkv.results import Decoding, Generation, Stats, TextStream
from restkv.saving.checks import require_chat
from restkv.saving.store import load_session, refused, save_session
from restkv.session import CHUNK, Session

Message = dict[str, str]


class Chat:
    """Turns between a user and the model.

    A chat template renders each new turn, and only that: what earlier turns became in the cache stays, even where the template
    would now write them differently (some drop old reasoning). Without a template, turns are lines.

    Args:
        lm: the model.
        policy: what is evicted as the conversation grows; its budget is a number of entries.
        system: instructions; their tokens, and those that come before the user's first words, are never evicted.
        template: use the checkpoint's chat template. None: if there is one.
        template_name: which of its templates; None: its default.
        template_args: variables of the template, such as {"enable_thinking": False}: what JSON can hold.
        prefill, chunk: how the first turn is read, and everything again after a change of policy (see Session).
    Raises:
        PolicyError: a fractional budget, or no policy at all.
        PromptError: the model has no tokenizer, or there is no such prefill; or a template is asked for where there is none.
        TokenizerError: there is no template of that name, or it takes no such variable.
    Attributes:
        lm, policy: from the first turn on, the policy protects the system prompt.
        messages: what was said.
        tokens: ids of all that was said, as they were read and drawn. The cache holds what was kept of them, less the last one
            drawn, which the next turn reads. An end-of-sequence id that ends an answer is left out: templates write their own.
    """

    def __init__(
        self,
        lm: LM,
        policy: Policy,
        system: str | None = None,
        *,
        template: bool | None = None,
        template_name: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        prefill: str | Pattern = "dense",
        chunk: int = CHUNK,
    ) -> None:
        self.lm, self.policy = lm, _unbroken(policy)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.tokens: list[int] = []
        self._tokenizer = lm.tokenizer
        self._template = lm.tokenizer.has_chat_template if template is None else template
        self._rendering: dict[str, Any] = {"template_name": template_name, "template_args": template_args or {}}
        self._check_template()
        parse_prefill(str(prefill))  # refused now, not at the first turn
        self._reading: dict[str, Any] = {"prefill": str(prefill), "chunk": chunk}
        self._spared = 0  # leading tokens that are never evicted
        self._session: Session | None = None  # None before the first turn, during each, and after one that failed
        self._turn: Generator[tuple[int, str]] | None = None

    def _check_template(self) -> None:
        """Refuse a template that is not there, and what is meant for one where none is used."""
        name, variables = self._rendering["template_name"], self._rendering["template_args"]
        if self._template and not self._tokenizer.has_chat_template:
            raise PromptError(
                "the model has no chat template; leave out template=True (--template), and turns are plain lines"
            )
        if (name or variables) and not self._template:
            given = f"template_name {name!r}" if name else f"template_args {', '.join(variables)}"
            raise PromptError(f"{given}: this chat uses no chat template, its turns are plain lines; leave it out")
        if name or variables:
            self._tokenizer.check_template(variables, name)
            self._rendering["template_args"] = dict(variables)

    def check(self) -> None:
        """Refuse now what the first turn would refuse whatever is said.

        Raises:
            PolicyError: the system prompt does not fit into the budget. TokenizerError: there is no chat template, or it fails.
        """
        if self.tokens:
            return
        with warnings.catch_warnings(action="ignore"):  # the first turn says again what there is to say
            spared = self._system_tokens(self._rendered("1"), "1")
        self._sparing(self.policy, spared)

    # -- talking

    def send(self, text: str, **options: Any) -> TextStream:
        """Say something; the answer comes as pieces of text. One that is broken off is kept as far as it came.

        The message is read when the first piece is asked for; if none ever is, when the answer is broken off.

        Args:
            options: the fields of Decoding. A stop string that ends an answer stays in the cache.
        A turn that fails is no part of the chat: what was said before stays, and is read anew for the next turn if need be.

        Raises:
            PromptError: an empty message, an impossible option, or a template that cannot show this turn.
            PolicyError: the system prompt does not fit into the budget.
            NumericError: the model's logits are no numbers. What was said and answered in this turn is not part of the chat then.
        """
        if not isinstance(text, str):
            raise PromptError(f"the message {text!r} is no text; give a string")
        if not text.strip():
            raise PromptError("the message is empty; say something")
        self.stop()
        results: list[Generation] = []
        self._turn = self._answer(text, results, Decoding(**options))
        return TextStream(self._turn, results)

    def stop(self) -> None:
        """Break off the answer under way, if there is one; a message whose answer nobody has asked for is read first.

        Raises:
            PromptError, PolicyError: such a message cannot be read (see send); it is not part of the chat then.
        """
        if self._turn is not None:
            if getgeneratorstate(self._turn) == GEN_CREATED:
                next(self._turn)
            self._turn.close()

    @own_modes
    def _answer(self, text: str, results: list[Generation], decoding: Decoding) -> Generator[tuple[int, str]]:
        lm, meter, answer = self.lm, Meter(self.lm.device), self.lm.answer(decoding)
        new = lm.encode(self._rendered(text))
        self._remark(len(new) + decoding.max_new_tokens)
        known = "agnostic" if self._session else "aware"  # whether the turn itself was there when the rest was evicted
        session = self._read(new, text, decoding.max_new_tokens)
        said, heard = len(self.messages), len(self.tokens)
        self.messages.append({"role": "user", "content": text})
        self.tokens += new
        stats = Stats(self.policy.name, self.policy.budget, [len(self.tokens)], question=known)
        try:
            yield 0, ""  # the message is read, and an answer can be broken off before its first token
            yield from lm.decode(session, decoding, stats, meter, results, [answer])
            self._session = session
        except GeneratorExit:  # nobody listens any more; we are between two tokens
            self._session = session
            raise
        except KeyboardInterrupt:  # the answer is kept as far as it came, the session is not
            raise
        except (
            BaseException
        ):  # numbers that are none, a policy, a library: nobody has answered, and the turn is not part of the chat
            del self.messages[said:], self.tokens[heard:]
            raise
        finally:
            if len(self.messages) > said:
                ended = answer.tokens[-1:] and answer.tokens[-1] in lm.config.eos_token_ids
                self.tokens += answer.tokens[:-1] if ended else answer.tokens
                self.messages.append({"role": "assistant", "content": answer.text})

    def _read(self, new: list[int], text: str, max_new_tokens: int) -> Session:
        """A session that has read the new tokens after all others.

        While it works, self._session is None. An exception within a step leaves layers with different tokens: then it stays
        None, and the next turn reads everything anew.
        """
        if self._session is None:
            spared = self._spared if self.tokens else self._system_tokens(new, text)
            policy = self._sparing(self.policy, spared)
            session = self._prefilled(policy, self.tokens + new, max_new_tokens)
            self.policy, self._spared = policy, spared
            return session
        session, self._session = self._session, None
        session.resume(max_new_tokens)
        read = int(session.cache.next_pos[0])  # sync: once per turn
        session.ids = [self.tokens[:read]]
        session.extend([self.tokens[read:] + new])
        return session

    def _prefilled(self, policy: Policy, ids: list[int], max_new_tokens: int) -> Session:
        session = Session(self.lm.engine, policy, [len(ids)], max_new_tokens, extends=True, **self._reading)
        session.prefill([ids])
        return session

    # -- what a turn adds

    def _rendered(self, text: str) -> list[int]:
        """Token ids to append to all others for the model to answer `text`."""
        tokenizer, user = self._tokenizer, {"role": "user", "content": text}
        if not self._template:
            lines = [] if self.tokens else [message["content"] for message in self.messages]
            written = "\n".join([*lines, text, ""])
            return tokenizer.encode_more("\n" + written) if self.tokens else tokenizer.encode(written)
        if not self.tokens:
            return tokenizer.chat([*self.messages, user], **self._rendering)
        mark = "3141592653589793"
        while any(mark in message["content"] for message in [*self.messages, user]):
            mark += "2"
        whole = tokenizer.render([*self.messages[:-1], {"role": "assistant", "content": mark}, user], **self._rendering)
        if whole.count(mark) != 1:
            raise PromptError(
                "the chat template does not repeat the last answer, so the next turn cannot be appended; "
                "talk without it (template=False, or --no-template)"
            )
        return tokenizer.encode_more(whole.partition(mark)[2])

    def _remark(self, more: int) -> None:
        """Warn once, when positions run out."""
        most = self.lm.config.max_positions
        if not self.policy.slot_positions and len(self.tokens) <= most < len(self.tokens) + more:
            warnings.warn(
                f"the conversation outgrows the model's {most} positions; the text may degrade (streamingllm and lacache "
                "count slots instead)",
                RestKVWarning,
                stacklevel=2,
            )

    # -- the system prompt

    def _system_tokens(self, new: Sequence[int], text: str) -> int:
        """How many of the first turn's tokens are there whatever the user says; 0 without a system prompt."""
        if not self.messages:
            return 0
        other = self._rendered("1" if text.lstrip().startswith("0") else "0")
        same = next((i for i, (a, b) in enumerate(zip(new, other, strict=False)) if a != b), min(len(new), len(other)))
        shown = self._tokenizer.decode(new[:same], skip_special=False)
        if self.messages[0]["content"].strip().casefold() not in shown.casefold():
            warnings.warn(
                "the chat template does not put the system prompt first; it can be evicted", RestKVWarning, stacklevel=2
            )
        return same

    def _sparing(self, policy: Policy, spared: int) -> Policy:
        """The policy with the system prompt, so many leading tokens, among its protected spans.

        Raises:
            PolicyError: it does not fit into the budget.
        """
        span = (0, spared)
        if policy.budget is None or not spared or span in policy.protect:
            return policy
        policy = replace(policy, protect=(*policy.protect, span))
        least = min(policy.layer_budgets(LONGEST, self.lm.config.num_layers))
        newest = policy.newest(least)
        if spared + newest > least:
            raise PolicyError(
                f"budget {policy.budget}: no room for the system prompt's {spared} tokens and the {newest} newest entries "
                f"in a layer of {least}; raise the budget, or shorten the prompt"
            )
        return policy

    # -- another policy, another day

    @own_modes
    def change(self, policy: Policy) -> None:
        """Go on under another policy: all that was said is read anew, and evicted as it says.

        Raises:
            PolicyError: a fractional budget, or one without room for the system prompt; the chat stays as it was.
        """
        self.stop()
        policy = self._sparing(_unbroken(policy), self._spared)
        if self.tokens:
            self._session = self._prefilled(policy, self.tokens, 1)
        self.policy = policy

    def anew(self) -> Chat:
        """A conversation that begins like this one did, with nothing said but the system prompt."""
        spans = tuple(span for span in self.policy.protect if span != (0, self._spared))
        system = next((message["content"] for message in self.messages[:1] if message["role"] == "system"), None)
        policy = replace(self.policy, protect=spans)
        with warnings.catch_warnings(action="ignore"):  # this chat has said what there is to say
            return Chat(self.lm, policy, system, template=self._template, **self._rendering, **self._reading)

    @property
    @own_modes
    def stats(self) -> Stats | None:
        """What the cache holds now, its timings zero; None while nothing has been said, and during a turn."""
        if self._session is None:
            return None
        stats = Stats(self.policy.name, self.policy.budget, [len(self.tokens)])
        self.lm.measure(self._session, stats)
        return stats

    @property
    def session(self) -> Session | None:
        """The cache and its schedule; None while nothing has been said, and during a turn."""
        return self._session

    @own_modes
    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to one safetensors file.

        Raises:
            PromptError: nothing has been said yet.
            OutputError: the file cannot be written.
        """
        self.stop()
        if not self.tokens:
            raise PromptError("nothing has been said yet; there is nothing to save")
        if self._session is None:
            self.change(self.policy)
        assert self._session is not None
        about = {
            "kind": "chat",
            "messages": self.messages,
            "tokens": self.tokens,
            "template": self._template,
            "rendering": self._rendering,
            "reading": self._reading,
            "spared": self._spared,
        }
        save_session(self._session, path, about)

    @classmethod
    @own_modes
    def load(cls, path: str | Path, lm: LM) -> Chat:
        """Go on with a saved conversation.

        Raises:
            PromptError: no such file, a damaged one, not a chat, or one of another model (both are named).
        """
        with enough_memory(f"read {path}", "free some, or save it under a smaller budget"):
            session, about = load_session(lm.engine, path)
        if about.get("kind") == "context":
            raise PromptError(f"{path}: holds a context, not a chat; ask it questions with CompressedContext.load")
        with refused(path):
            require_chat(about, session.cache.next_pos.tolist(), lm.config.vocab_size)  # sync: once per file
            chat = cls(lm, session.policy, template=about["template"], **about["rendering"], **about["reading"])
            if about["template"] and not lm.tokenizer.has_chat_template:
                raise PromptError("its turns are rendered by a chat template, and this model has none")
        chat.messages, chat.tokens, chat._spared = about["messages"], about["tokens"], about["spared"]
        chat._session = session
        return chat


def _unbroken(policy: Policy) -> Policy:
    """The policy, unless its budget is a fraction: a conversation has no length to take it of."""
    if isinstance(require_policy(policy).budget, float):
        raise PolicyError(
            f"budget {policy.budget}: a chat grows, and has no length to keep a fraction of; give a number of entries"
        )
    return policy
