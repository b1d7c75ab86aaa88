"""Names of the hub, `org/name` and `org/name@revision`, and their download through huggingface_hub.

The library keeps what it has downloaded, resumes within a run, and turns to its cache when the network is away. Added
here: no request waits for ever, and whatever it raises, in any of its versions, is one line with the mend.
"""

from __future__ import annotations

import contextvars
import errno
import importlib
import os
import queue
import re
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from modeling.checkpoint.folders import find_shards
from modeling.environment import first_line, mend
from modeling.errors import CheckpointError, RestKVWarning
from modeling.files import shortened

PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
IGNORED = ["*/*", "consolidated*"]  # Mistral's folders hold all weights a second time in their own layout
PATIENCE = 3  # requests in a row that may go unanswered
WHOLE = 6  # times the wait for one byte, HF_HUB_DOWNLOAD_TIMEOUT: for a whole answer, and for a look at how fast a file comes
LEAST = 1000  # bytes a second
LISTING = 32 << 20  # bytes of an answer that is no file
PACKED = 64 << 10  # bytes of one that came compressed
QUESTIONS = 10_000  # in one download
BODY = "restkv.body"  # the extension of a request that holds its _Body
NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>\w[\w.+/-]*))?", re.ASCII)
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, and the branch, tag or commit that is wanted of it (None: its main branch)."""

    repo: str
    revision: str | None


def hub_name(text: str) -> HubName | None:
    """`org/name` or `org/name@revision`, None for anything else."""
    match = NAME.fullmatch(text)
    if match is None or ".." in text or text.endswith(("/", ".lock")):
        return None
    return HubName(match["repo"], match["revision"])


def download(name: HubName) -> Path:
    """The folder with a repository's configuration, tokenizer and safetensors, downloaded unless it is in the cache.

    Raises CheckpointError when huggingface_hub is not installed or the download fails.
    """
    try:
        with redirect_stdout(StringIO()):  # it prints there why it cannot be imported
            from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f'{name.repo}: no such folder; to download it as a hub name, pip install "restkv[hub]" first'
        ) from None
    except Exception as error:  # it reads its environment variables when imported
        raise CheckpointError(
            f"{name.repo}: huggingface_hub cannot be used ({first_line(error)}); {mend('huggingface_hub', error)}"
        ) from None
    revision = {} if name.revision is None else {"revision": name.revision}

    def folder(**options: Any) -> Path:
        options |= {"allow_patterns": PATTERNS, "ignore_patterns": IGNORED, **revision}
        return Path(snapshot_download(name.repo, **options))

    try:
        with _ONE_AT_A_TIME, _patiently():
            return folder()
    except CheckpointError:
        raise
    except Exception as error:  # of huggingface_hub, requests, httpx, the file system, by version
        what, remedy, cached = _explained(error, name)
        if cached:
            try:
                kept = folder(local_files_only=True)
                find_shards(kept)  # older versions also return what an earlier run left unfinished
            except Exception:
                pass
            else:
                warnings.warn(f"{name.repo}: taken from the cache ({what}; {remedy})", RestKVWarning, stacklevel=3)
                return kept
        raise CheckpointError(f"{name.repo}: no such folder, and not downloaded ({what}); {remedy}") from None


# -- limits of time and size


@contextmanager
def _patiently() -> Iterator[None]:
    """The library's HTTP client gets limits of time and size where it sets none: it lists repositories without.

    Both of its clients, that of requests before version 1 and that of httpx since, hand every request to `send`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, logging

    client: Any = get_session()
    impatient = _Impatient(client.send, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    client.send = impatient  # on this object, while it downloads
    hooks = getattr(client, "event_hooks", None)
    if hooks is not None:  # httpx: every response, of redirects too, before its body is read
        client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _limit_body]}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of every single attempt in several lines
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        del client.send
        if hooks is not None:
            client.event_hooks = hooks
        if impatient.abandoned:
            getattr(
                client, "close", lambda: None
            )()  # ends the thread that still reads; the library makes another client
            getattr(importlib.import_module("huggingface_hub"), "close_session", lambda: None)()


class _Impatient:
    """`send` of an HTTP client that waits at most `seconds` for a byte, and repeats a request in vain PATIENCE times.

    The library by itself repeats some requests for minutes. One that goes on with a file asks for another range. An answer,
    or the head of a file, has to be there in WHOLE times `seconds`, and what follows is bounded by _Body.

    Attributes:
        abandoned: a request has been given up that still runs.
    """

    def __init__(self, send: Callable[..., Any], seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._last = threading.local()  # files are downloaded in threads
        self._largest = 0  # of the sizes of files that the server has named
        self._asked = 0
        self.abandoned = False

    def __call__(self, request: Any, **options: Any) -> Any:
        extensions = getattr(request, "extensions", None)
        if extensions is None:  # requests
            options["timeout"] = options.get("timeout") or self._seconds
        else:  # httpx
            asked = extensions.get("timeout", {})
            parts = ("connect", "read", "write", "pool")
            extensions["timeout"] = {part: min(asked.get(part) or self._seconds, self._seconds) for part in parts}
            extensions[BODY] = self._body(request, options)
        last, this = self._last, (request.method, str(request.url), request.headers.get("Range"))
        last.times = last.times + 1 if getattr(last, "request", None) == this else 1
        last.request = this
        if last.times > PATIENCE:
            raise _GivenUp(last.response) from last.error
        last.response = last.error = None
        try:
            last.response = self._in_time(request, options)
        except Exception as error:
            last.error = error
            raise
        return last.response

    def _body(self, request: Any, options: dict[str, Any]) -> _Body:
        """The limits of what a request brings. A file goes on with its own when the connection has dropped."""
        if not options.get("stream"):
            self._asked += 1
            if self._asked > QUESTIONS:
                raise _TooMuch("more pages of its list of files than any repository has")
            request.headers["Accept-Encoding"] = "identity"
            return _Body(LISTING)
        last, url = self._last, str(request.url)
        if getattr(last, "url", None) != url:
            last.url, last.body = url, _Body(self._largest or None, WHOLE * self._seconds)
        return last.body

    def _in_time(self, request: Any, options: dict[str, Any]) -> Any:
        """The answer, from a thread of its own: only that can be left when single bytes come for ever."""
        extensions = getattr(request, "extensions", None) or {}
        seconds = WHOLE * extensions.get("timeout", {}).get("read", self._seconds)  # less where the library waits less
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        context = contextvars.copy_context()

        def ask() -> None:
            try:
                answers.put((context.run(self._send, request, **options), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            response, error = answers.get(timeout=seconds)
        except queue.Empty:
            self.abandoned = True
            raise _TooSlow(f"the server did not come to an end of its answer in {seconds:g} s") from None
        if error is not None:
            raise error
        if not options.get("stream"):
            self._note_sizes(request, response)
        return response

    def _note_sizes(self, request: Any, response: Any) -> None:
        named = [response.headers.get(name, "") for name in ("X-Linked-Size", "Content-Length")]
        if request.method != "HEAD":
            named = re.findall(r'"size"\s*:\s*(\d{1,18})\b', response.text)
        self._largest = max([self._largest, *(int(size) for size in named if re.fullmatch(r"\d{1,18}", size))])


class _Body:
    """How much may come, and how slowly: less than LEAST bytes a second in every `window` seconds is too slow."""

    def __init__(self, limit: int | None, window: float | None = None) -> None:
        self.limit, self._window = limit, window
        self._start, self._come = time.monotonic(), 0

    def check(self, total: int, count: int) -> None:
        """`count` bytes more have come, `total` in this response."""
        if self.limit is not None and total > self.limit:
            raise _TooMuch(f"more than {self.limit:,} bytes for a file or list that has to be smaller")
        self._come += count
        if self._window is not None and (passed := time.monotonic() - self._start) >= self._window:
            if self._come < LEAST * passed:
                raise _TooSlow(f"the server sends less than {LEAST:,} bytes a second")
            self._start, self._come = time.monotonic(), 0


def _limit_body(response: Any) -> None:
    """A hook of httpx's clients: what comes is counted as it comes."""
    body: _Body | None = response.request.extensions.get(BODY)
    if body is None:
        return
    stream = response.stream
    if body.limit == LISTING and response.headers.get("Content-Encoding", "identity") != "identity":
        body = _Body(PACKED)  # not asked for, and a thousand times as large when it is unpacked
    check = body.check

    class Counted(type(stream)):  # type: ignore[misc]  # the client wants a stream of its own kind
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            total = 0
            for piece in stream:
                total += len(piece)
                check(total, len(piece))
                yield piece

        def close(self) -> None:
            stream.close()

    response.stream = Counted()


class _GivenUp(Exception):
    """None of the errors after which the library tries again. `response`: the server's last one, if any."""

    def __init__(self, response: Any) -> None:
        super().__init__("no progress")
        self.response = response


class _TooSlow(Exception):
    """Nor is this one. Says what took too long."""


class _TooMuch(Exception):
    """Nor this one. Says what came."""


# -- why it failed


def _explained(error: BaseException, name: HubName) -> tuple[str, str, bool]:
    """What happened, the mend, and whether a copy in the cache, where there is one, will do."""
    from huggingface_hub import constants

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    numbers = {one.errno for one in chain if isinstance(one, OSError) and not isinstance(one, ssl.SSLError)}
    responses = [getattr(one, "response", None) for one in chain]
    status = next((r.status_code for r in responses if r is not None and r.status_code >= 400), None)
    text = " ".join(map(str, chain))
    again = "run again, which goes on with the files that are missing"
    network = "the network" + (f" and HF_ENDPOINT ({constants.ENDPOINT})" if "HF_ENDPOINT" in os.environ else "")
    log_in = "log in (`hf auth login`, or set HF_TOKEN)"

    if slow := next((one for one in chain if isinstance(one, _TooSlow)), None):
        return str(slow), f"check {network} and {again}; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer", True
    if much := next((one for one in chain if isinstance(one, _TooMuch)), None):
        return f"the server sends {much}", f"check {network}", True
    if numbers & {errno.ENOSPC, errno.EDQUOT} or "No space left" in text:
        return "the disk is full", f"free space or set HF_HOME to a folder on another disk, and {again}", False
    if place := next((one for one in chain if isinstance(one, OSError) and one.errno and one.filename), None):
        return f"the cache, {place.filename}: {place.strerror}", "set HF_HOME to a folder of your own", True
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"the cache {constants.HF_HUB_CACHE} cannot be written", "set HF_HOME to a folder of your own", True
    if "RevisionNotFoundError" in kinds:
        return f"no revision {name.revision or 'main'!r} there", "give a branch, tag or commit of it", False
    if "GatedRepoError" in kinds or status == 403:
        return "access is gated", f"accept its terms on its page, then {log_in}", False
    if "RepositoryNotFoundError" in kinds or status in (401, 404):
        return "no such repository, or a private one", f"check the name; for a private one {log_in}", False
    if "OfflineModeIsEnabled" in kinds or constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE forbids to download", "unset it, or give a folder", False
    if "SSLCertVerificationError" in kinds or "CERTIFICATE_VERIFY_FAILED" in text:
        mend = "set SSL_CERT_FILE and REQUESTS_CA_BUNDLE to your network's certificates"
        return "the server's certificate is not trusted", mend, True
    if "ProxyError" in kinds:
        return "the proxy does not answer", "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY", True
    # By their own names: a connection that is refused is a kind of timeout to urllib3.
    if any("Timeout" in type(one).__name__ for one in chain):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return f"the server was silent for {seconds} s", f"{again}; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer", True
    if status == 429:
        return "too many requests", f"wait a few minutes and {again}", True
    if status is not None and status >= 500:
        return f"the server fails, status {status}", f"{again}, later", True
    words = ("Connect", "Protocol", "ReadError", "ChunkedEncoding", "SSLError", "_GivenUp")
    if any(word in kind for kind in kinds for word in words):
        return "the connection failed or broke off", f"check {network} and {again}", True
    if status is not None:
        return f"the server answers with status {status}", "check name, network and access", True
    if "Consistency check failed" in text:
        return "a file came incomplete", again, True
    return shortened(str(error), 300) or type(error).__name__, "check name, network and access", False
