"""A small hub on 127.0.0.1: one repository, served as huggingface_hub asks for it, with faults on demand."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BRANCH, TAG = "1" * 40, "2" * 40  # commits of main and of v1


class Hub:
    """What is served and how, to be changed while it runs.

    Attributes:
        files: commit -> name -> content.
        revisions: branch or tag -> commit.
        silent: stages that are never answered: "info", "tree", "head", "body" (which stops halfway).
        drips: stages that are answered in pieces of so many bytes, 20 of them a second: "info", "tree", "body", and "start" for
            the headers of every answer.
        floods: stages that never come to an end, as fast as they can: "info", "tree", "body", and "pages" for the list of files;
            "packed" floods "info" with what is a thousand times as large when it is unpacked.
        drops: how many more bodies break off halfway.
        status: of every answer to a question about the repository, when it is not None; `error` goes along as
            the header by which the hub tells kinds of refusals apart.
        asked: (method, path, Range header) of all requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {BRANCH: {}, TAG: {}}
        self.revisions = {"main": BRANCH, "v1": TAG, "refs/pr/7": TAG}
        self.silent: set[str] = set()
        self.drips: dict[str, int] = {}
        self.floods: set[str] = set()
        self.drops = 0
        self.status: int | None = None
        self.error = ""
        self.asked: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()
        self.url = ""

    def add(self, commit: str, folder: Path) -> None:
        """Serve the files of a folder as those of a commit."""
        self.files[commit] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs as long as the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0].replace("%2F", "/")
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/org/name(?:/revision/(.+))?", path):
            self._about("info", match[1] or "main")
        elif match := re.fullmatch(r"/api/models/org/name/tree/([^/]+)", path):
            self._about("tree", match[1])
        elif match := re.fullmatch(r"/org/name/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _about(self, stage: str, revision: str) -> None:
        hub = self.hub
        if stage in hub.silent:
            hub.closing.wait(60)
            self.close_connection = True
            return
        if hub.status is not None:
            self._send(hub.status, b"{}", {"X-Error-Code": hub.error} if hub.error else {})
            return
        commit = hub.revisions.get(revision, revision)
        if commit not in hub.files:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        files = hub.files[commit]
        answers: dict[str, Any] = {
            "info": {"id": "org/name", "sha": commit, "siblings": [{"rfilename": name} for name in files]},
            "tree": [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ],
        }
        content, headers = json.dumps(answers[stage]).encode(), {"Content-Type": "application/json"}
        if stage == "tree" and "pages" in hub.floods:
            headers["Link"] = f'<{hub.url}{self.path.partition("?")[0]}?cursor={time.monotonic_ns()}>; rel="next"'
        elif stage == "info" and "packed" in hub.floods:
            content = gzip.compress(content + b" " * (100 << 20), compresslevel=1)
            headers["Content-Encoding"] = "gzip"
        self._answer_as(stage, content, headers)

    def _answer_as(self, stage: str, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        """An answer that drips or never ends, where it is to be so; else as it should be."""
        hub = self.hub
        if stage in hub.drips and self.command != "HEAD":
            self._start(status, len(content), headers)
            self._drip(content, hub.drips[stage])
        elif stage in hub.floods and self.command != "HEAD":
            self.close_connection = True
            self._start(status, None, {**headers, "Connection": "close"})
            with suppress(OSError):
                while not hub.closing.is_set():
                    self.wfile.write(b"[" + b"1," * 50_000)
        else:
            self._send(status, content, headers)

    def _drip(self, content: bytes, size: int) -> None:
        with suppress(OSError):
            for first in range(0, len(content), size):
                self.wfile.write(content[first : first + size])
                self.wfile.flush()
                if self.hub.closing.wait(0.05):
                    break

    def _file(self, revision: str, name: str, body: bool) -> None:
        hub = self.hub
        commit = hub.revisions.get(revision, revision)
        content = hub.files.get(commit, {}).get(name)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if not body and "head" in hub.silent:
            hub.closing.wait(60)
            self.close_connection = True
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        first = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(match[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        rest = content[first:]
        if "body" in hub.drips or "body" in hub.floods:
            if not body:
                self._start(200, len(rest), headers)
            else:
                self._answer_as("body", rest, headers, 206 if first else 200)
            return
        self._start(206 if first else 200, len(rest), headers)
        if not body:
            return
        halfway = "body" in hub.silent or hub.drops > 0
        if not halfway or len(content) < 100:
            self.wfile.write(rest)
            return
        self.wfile.write(content[first : len(content) // 2])  # nothing more when it is asked for the second half
        self.wfile.flush()
        if hub.drops > 0:
            hub.drops -= 1
        else:
            hub.closing.wait(60)
        self.close_connection = True

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._start(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _start(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if "start" in self.hub.drips:
            self.flush_headers()
            self._drip(b"".join(b"X-%d: y\r\n" % number for number in range(1000)), self.hub.drips["start"])
        self.end_headers()
