"""Names of the hub, `org/name` and `org/name@revision`, and their download through huggingface_hub.

The library keeps what it has downloaded, resumes within a run, and turns to its cache when the network is away. Added
here: no request waits for ever, and whatever it raises, in any of its versions, is one line with the mend.
"""

from __future__ import annotations

import errno
import os
import re
import ssl
import threading
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


# -- time limits


@contextmanager
def _patiently() -> Iterator[None]:
    """The library's HTTP client gets time limits where it sets none: it lists repositories without.

    Both of its clients, that of requests before version 1 and that of httpx since, hand every request to `send`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, logging

    client: Any = get_session()
    client.send = _Impatient(client.send, constants.HF_HUB_DOWNLOAD_TIMEOUT)  # on this object, while it downloads
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of every single attempt in several lines
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        del client.send


class _Impatient:
    """`send` of an HTTP client that waits at most `seconds` for a byte, and repeats a request in vain PATIENCE times.

    The library by itself repeats some requests for minutes. One that goes on with a file asks for another range.
    """

    def __init__(self, send: Callable[..., Any], seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._last = threading.local()  # files are downloaded in threads

    def __call__(self, request: Any, **options: Any) -> Any:
        extensions = getattr(request, "extensions", None)
        if extensions is None:  # requests
            options["timeout"] = options.get("timeout") or self._seconds
        else:  # httpx
            asked = extensions.get("timeout", {})
            parts = ("connect", "read", "write", "pool")
            extensions["timeout"] = {part: min(asked.get(part) or self._seconds, self._seconds) for part in parts}
        last, this = self._last, (request.method, str(request.url), request.headers.get("Range"))
        last.times = last.times + 1 if getattr(last, "request", None) == this else 1
        last.request = this
        if last.times > PATIENCE:
            raise _GivenUp(last.response) from last.error
        last.response = last.error = None
        try:
            last.response = self._send(request, **options)
        except Exception as error:
            last.error = error
            raise
        return last.response


class _GivenUp(Exception):
    """None of the errors after which the library tries again. `response`: the server's last one, if any."""

    def __init__(self, response: Any) -> None:
        super().__init__("no progress")
        self.response = response


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
