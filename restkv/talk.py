"""`restkv chat`: the loop between a person and a Chat. Lines that begin with / are commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from restkv.chat import Chat
from restkv.display import summary
from restkv.errors import PromptError, RestKVError
from restkv.policies import Policy
from restkv.results import Generation

HELP = """\
/stats                          what the cache keeps after the last answer
/method NAME [OPTION=VALUE ...] start anew under another method
/save FILE, /load FILE          write the conversation with its cache, or go on with a saved one
/help, /quit                    Ctrl-C stops an answer, Ctrl-D ends the chat"""


class Talk:
    """One person's conversation on stdin, stdout and stderr.

    Args:
        chat: the conversation to go on with.
        policy_of: builds a policy from a method's name and texts such as "budget=64".
        decoding: options of Chat.send.
    """

    def __init__(self, chat: Chat, policy_of: Callable[[str, list[str]], Policy], decoding: dict[str, Any]) -> None:
        self._chat, self._policy_of, self._decoding = chat, policy_of, decoding
        self._system = next((m["content"] for m in chat.messages if m["role"] == "system"), None)
        self._last: Generation | None = None

    def run(self) -> None:
        """Answer line after line until /quit or the end of input. A user's error costs one line, not the conversation."""
        for line in _lines():
            if line.strip() == "/quit":
                break
            try:
                if line.startswith("/"):
                    self._command(*line[1:].split())
                elif line.strip():
                    self._answer(line)
            except RestKVError as error:
                _remark(f"restkv: error: {error}")

    def _answer(self, line: str) -> None:
        stream = self._chat.send(line, **self._decoding)
        with _noted_interrupt() as interrupted:
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
                if interrupted():
                    break
            else:
                self._last = stream.generation
        del stream  # ends a broken-off answer, which the chat keeps as far as it came
        print(flush=True)

    def _command(self, name: str = "help", *words: str) -> None:
        if name == "stats":
            _remark("nothing has been answered yet" if self._last is None else summary(self._last))
        elif name == "method" and words:
            policy = self._policy_of(words[0], list(words[1:]))
            self._chat, self._last = Chat(self._chat.lm, policy, self._system), None
            _remark(f"a new conversation, with {policy.name}")
        elif name in ("save", "load") and len(words) == 1:
            if name == "save":
                self._chat.save(words[0])
            else:
                self._chat, self._last = Chat.load(words[0], self._chat.lm), None
            _remark(f"{name}: {words[0]}, {len(self._chat.messages)} messages, {self._chat.policy.name}")
        elif name == "help":
            _remark(HELP)
        else:
            raise PromptError(f"/{' '.join((name, *words))}: no such command; /help lists them")


def _lines() -> Iterator[str]:
    """The person's lines, without their ends. Ctrl-C at the prompt discards what has been typed."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - importing it gives input() editing and history
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if not terminal and not line:
            return
        yield line.removesuffix("\n")


@contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C is noted instead of raised: broken off within a step, layers would hold different tokens."""
    interrupted = False

    def note(*_: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
