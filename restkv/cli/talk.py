"""`restkv chat`: the loop between a person and a Chat. Lines that begin with / are commands."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modeling.room import lacking
from modeling.shown import one_line
from restkv.chat import Chat
from restkv.cli import interrupts
from restkv.cli.display import holdings, pace
from restkv.cli.options import reading
from restkv.cli.terminal import put, put_line, say, status
from restkv.errors import OutputError, PromptError, RestKVError
from restkv.policies import Policy
from restkv.results import Generation

HELP = """\
/stats                           what the cache keeps now, and how fast the last answer came
/method NAME [OPTION=VALUE ...]  go on under another method: all that was said is read anew and evicted by it
/save FILE, /load FILE           write the conversation with its cache, or go on with a saved one
/new                             forget everything but the system prompt
/help, /quit                     a space before the first / makes a line a message
Ctrl-C stops an answer; at the prompt it ends the chat, as Ctrl-D does."""


LONGEST_LINE = 1 << 26  # characters, more than any model reads
NEEDED = {"save": "one file", "load": "one file", "method": "NAME [OPTION=VALUE ...]"}


class _Gone(Exception):
    """Whoever read stdout has gone: nothing can be said any more."""


class Talk:
    """One person's conversation on stdin, stdout and stderr.

    Args:
        chat: the conversation to go on with.
        policy_of: builds a policy from a method's name and texts such as "budget=64".
        decoding: options of Chat.send.
    """

    def __init__(self, chat: Chat, policy_of: Callable[[str, list[str]], Policy], decoding: dict[str, Any]) -> None:
        self._chat, self._policy_of, self._decoding = chat, policy_of, decoding
        self._last: Generation | None = None
        self._unheard: OutputError | None = None  # why answers are missing on stdout

    def run(self) -> None:
        """Answer line after line until /quit or the end of input, or until nobody reads the answers any more.

        Whatever else goes wrong costs one line on stderr: the conversation is what it was before.

        Raises:
            BrokenPipeError: nobody reads them. OutputError, in the end: some could not be written.
        """
        interrupts.only_raise()
        for line in _lines():
            if line.rstrip() == "/quit":
                break
            try:
                if line.startswith("/"):
                    self._command(*_words(line[1:]))
                elif line.strip():
                    self._answer(line)
            except RestKVError as error:
                say(f"restkv: error: {error}")
            except KeyboardInterrupt:  # the second one, or one in the middle of a command
                say("stopped")
            except _Gone:
                raise BrokenPipeError from None
            except BaseException as error:  # a plugin or a library may raise anything, and exit
                say(f"restkv: error: {_unforeseen(line, error)}")
        if self._unheard is not None:
            raise self._unheard

    def _answer(self, line: str) -> None:
        stream = self._chat.send(line, **self._decoding)
        with _noted_interrupt() as interrupted:
            try:
                status.show("reading")
                for piece in stream:
                    self._put(piece)
                    if interrupted():
                        break
                else:
                    self._last = stream.generation
            finally:
                self._chat.stop()
                self._put("\n")

    def _put(self, text: str) -> None:
        """Write to stdout at once."""
        try:
            put(text)
        except BrokenPipeError:
            raise _Gone from None
        except OutputError as error:
            self._unheard = error
            raise

    def _command(self, name: str = "help", *words: str) -> None:
        if name == "stats" and not words:
            self._say_stats()
        elif name == "method" and words:
            self._chat.change(self._policy_of(words[0], list(words[1:])))
            self._last = None
            self._say_stats()
        elif name == "save" and len(words) == 1:
            self._chat.save(_file_name(words[0]))
            say(f"saved to {words[0]}")
        elif name == "load" and len(words) == 1:
            self._go_on_with(Chat.load(_file_name(words[0]), self._chat.lm))
            self._say_stats()
        elif name == "new" and not words:
            self._go_on_with(self._chat.anew())
            say(f"a new conversation, with {self._chat.policy.name}")
        elif name == "help":
            say(HELP)
        elif name in NEEDED:
            raise PromptError(f"/{' '.join((name, *words))}: give {NEEDED[name]}")
        else:
            raise PromptError(f"/{' '.join((name, *words))}: no such command; /help lists them")

    def _go_on_with(self, chat: Chat) -> None:
        chat.check()
        self._chat, self._last = chat, None

    def _say_stats(self) -> None:
        stats = self._chat.stats
        say(f"{self._chat.policy.name}: nothing said yet" if stats is None else holdings(stats))
        if self._last is not None:
            say(pace(self._last))


def _unforeseen(line: str, error: BaseException) -> str:
    """What failed in a line, in one."""
    place = line.split(maxsplit=1)[0] if line.startswith("/") else "this turn"
    try:
        if (asked := lacking(error)) is not None:
            return one_line(f"{place}: not enough memory{asked}; the conversation is what it was before")
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # its text is a stranger's work as well
        reason = type(error).__name__
    return one_line(f"{place} failed ({reason}); the conversation is what it was before")


def _words(text: str) -> list[str]:
    """As a shell splits them, for names with spaces."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PromptError(f"/{text}: {error}; close the quotation, or put a backslash before the mark") from None


def _file_name(word: str) -> str:
    """A name in a line as Python has those of files: as of its bytes in the locale."""
    try:
        return os.fsdecode(word.encode(getattr(sys.stdin, "encoding", None) or "utf-8"))
    except UnicodeEncodeError:
        return word  # which no file can have; whoever opens it says so


def _lines() -> Iterator[str]:
    """The person's lines, without their ends (a line feed, or one behind a carriage return); a prompt is shown on a terminal
    only."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 is no reason to stop
        if not sys.stdin.isatty():
            sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # some Pythons come without
            import readline  # noqa: F401 - importing it gives input() editing and history

        say("/help lists the commands, Ctrl-D ends the chat")
    while True:
        try:
            with reading("stdin"):
                line = input("> ") if terminal else sys.stdin.readline(LONGEST_LINE + 1)
        except (EOFError, KeyboardInterrupt):
            put_line("")
            return
        if not terminal and not line:
            return
        if len(line) > LONGEST_LINE:
            raise PromptError(f"stdin: a line has more than {LONGEST_LINE:,} characters; give it shorter lines")
        yield line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")  # a byte-order mark is no text


@contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C is noted, to stop between two tokens. A second one is raised: it stops at once, and what was
    said is read anew in the next turn."""
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
