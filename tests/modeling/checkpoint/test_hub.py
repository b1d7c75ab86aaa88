"""Names of the hub: revisions, downloads that end, and one line for whatever goes wrong on the way."""

from __future__ import annotations

import errno
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import modeling.checkpoint.hub
from make.hub_server import BRANCH, TAG, Hub, serving
from modeling.checkpoint.hub import HubName, download, hub_name
from modeling.checkpoint.loading import load_outline, resolve
from modeling.errors import CheckpointError, RestKVWarning

huggingface_hub = pytest.importorskip("huggingface_hub")
PATIENT, IMPATIENT = 10, 0.3  # seconds


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with one repository, and a cache of its own. What the library reads from the environment is set directly."""
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        wait_for(PATIENT, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has come of a chunk is lost with it
        monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        _forget_client()
        hub.files = {
            BRANCH: {"config.json": b'{"of": "main"}', "model.safetensors": bytes(range(250)) * 4000},
            TAG: {"config.json": b'{"of": "v1"}', "model.safetensors": b"short"},
        }
        yield hub
    _forget_client()


def _forget_client() -> None:
    """The library keeps one client, which knows the environment of its birth; before version 1 one for each thread."""
    close = getattr(huggingface_hub, "close_session", None)
    if close is not None:
        close()


def wait_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the library waits for a server that says nothing."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", seconds)


def failure(name: str, within: float = 20.0) -> str:
    """The one line in which a download ends, which must not take long."""
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert time.monotonic() - start < within
    message = str(caught.value)
    assert "\n" not in message and message.count("org/name") == 1 and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name-1.5_b@v1.0", "org/name-1.5_b", "v1.0"),
        ("org/name@refs/pr/7", "org/name", "refs/pr/7"),
        ("org/name@feature/x+y", "org/name", "feature/x+y"),
        (f"org/name@{BRANCH}", "org/name", BRANCH),
    ],
)
def test_names_with_revisions(text, repo, revision):
    assert hub_name(text) == HubName(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "name@v1", "org/", "org/name/", "org/name@", "org/name@/x", "org/name@x/", "org/name@../../etc",
        "org/name@a..b", "org/name@a@b", "org/a b", "./name", "../name", "/org/name", "~/name", "org\\name", "a/b/c",
        "org/name@v 1", "org/name@x.lock", "org/name\n", "org/..", "https://hub/org/name", "örg/name",
    ],
)  # fmt: skip
def test_what_is_no_name_of_the_hub(text):
    assert hub_name(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "./mistyped", "../mistyped", "/no/such", "~/mistyped", "~nobody-of-that-name/x",
        "checkpoints/mistyped", "checkpoints/mistyped@v1", "checkpoints/mistyped/",
        "mistyped/", "org/name/", "checkpoints\\mistyped", "org\\name", "a/b/c", "C:/x", "name",
        "x" * 300, f"org/{'x' * 300}/y", "a\0b", "https://hub/org/name", "file:///org/name",
    ],
)  # fmt: skip
def test_a_mistyped_path_is_never_looked_for_on_the_hub(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()

    def never(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    with pytest.raises(CheckpointError, match=r"no such folder|cannot be looked at") as caught:
        resolve(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("org/name", "main"), ("org/name@main", "main"), ("org/name@v1", "v1"),
        (f"org/name@{TAG}", "v1"), ("org/name@refs/pr/7", "v1"),
    ],
)  # fmt: skip
def test_the_revision_that_was_asked_for_comes(hub, name, of):
    assert (resolve(name) / "config.json").read_text() == f'{{"of": "{of}"}}'


def test_a_whole_checkpoint_loads_by_its_name(hub, tiny):
    hub.add(BRANCH, tiny("llama2").folder)
    assert load_outline(resolve("org/name")).config == load_outline(tiny("llama2").folder).config


def test_a_local_folder_comes_before_the_hub_even_with_an_at_sign(hub, tmp_path):
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert resolve("org/name@v1") == Path("org/name@v1")
    assert not hub.asked


def test_a_dropped_connection_is_taken_up_where_it_broke_off(hub):
    hub.drops = 2
    folder = resolve("org/name")
    assert (folder / "model.safetensors").read_bytes() == hub.files[BRANCH]["model.safetensors"]
    assert any(asked_range for _, _, asked_range in hub.asked)


def test_a_connection_that_always_drops_ends_in_one_line_and_a_rerun_goes_on(hub):
    hub.drops = 10**6
    assert "run again, which goes on" in failure("org/name")
    hub.drops = 0
    hub.asked.clear()
    assert (resolve("org/name") / "model.safetensors").stat().st_size == 1_000_000


@pytest.mark.parametrize("stage", ["info", "tree", "head", "body"])
def test_a_silent_server_ends_in_one_line(hub, stage, monkeypatch):
    hub.silent = {stage}
    wait_for(IMPATIENT, monkeypatch)
    if stage == "tree" and not _lists_trees():
        pytest.skip("this version of huggingface_hub asks for no tree")
    message = failure("org/name")
    assert "silent" in message and "run again" in message and "HF_HUB_DOWNLOAD_TIMEOUT" in message


def _lists_trees() -> bool:
    return hasattr(huggingface_hub, "get_cached_repo_tree")


def test_a_server_that_falls_silent_is_met_with_the_cache(hub, monkeypatch):
    folder = resolve("org/name")
    hub.silent = {"info"}
    wait_for(IMPATIENT, monkeypatch)
    assert resolve("org/name") == folder


SLOWLY = 0.3 * modeling.checkpoint.hub.WHOLE  # seconds for a whole answer, where IMPATIENT


@pytest.mark.parametrize("stage", ["info", "tree", "start"])
def test_a_server_that_drips_an_answer_is_left(hub, stage, monkeypatch):
    if stage == "tree" and not _lists_trees():
        pytest.skip("this version of huggingface_hub asks for no tree")
    hub.drips = {stage: 1}
    wait_for(IMPATIENT, monkeypatch)
    threads = threading.active_count()
    message = failure("org/name", within=SLOWLY + 5)
    assert "did not come to an end of its answer in 1.8 s" in message and "HF_HUB_DOWNLOAD_TIMEOUT" in message
    until = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < until:
        threading.Event().wait(0.05)  # the thread that was left ends, as its connection is closed
    assert threading.active_count() <= threads


def test_a_server_that_drips_is_met_with_the_cache(hub, monkeypatch):
    folder = resolve("org/name")
    hub.drips = {"info": 1}
    wait_for(IMPATIENT, monkeypatch)
    with pytest.warns(RestKVWarning, match="taken from the cache .*did not come to an end"):
        assert resolve("org/name") == folder


def test_a_file_that_drips_is_left_and_a_rerun_goes_on(hub, monkeypatch):
    hub.drips = {"body": 1}
    wait_for(IMPATIENT, monkeypatch)
    message = failure("org/name", within=SLOWLY + 10)
    assert "sends less than 1,000 bytes a second" in message and "run again" in message
    hub.drips = {}
    assert (resolve("org/name") / "model.safetensors").stat().st_size == 1_000_000


def test_a_slow_download_goes_on_while_it_lives(hub, monkeypatch):
    hub.files[BRANCH]["model.safetensors"] = bytes(range(250)) * 120
    hub.drips = {"body": 500}  # 10 kB a second: three seconds
    wait_for(IMPATIENT, monkeypatch)
    start = time.monotonic()
    assert (resolve("org/name") / "model.safetensors").stat().st_size == 30_000
    assert time.monotonic() - start > SLOWLY


@pytest.mark.parametrize("stage", ["info", "tree", "body", "packed"])
def test_a_server_that_floods_is_left(hub, stage, monkeypatch, tmp_path):
    if stage == "tree" and not _lists_trees():
        pytest.skip("this version of huggingface_hub asks for no tree")
    monkeypatch.setattr(modeling.checkpoint.hub, "LISTING", 1 << 20)
    hub.floods = {stage}
    assert "the server sends more than" in failure("org/name")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 4_000_000


def test_a_list_of_files_without_end_is_left(hub, monkeypatch):
    if not _lists_trees():
        pytest.skip("this version of huggingface_hub asks for no tree")
    monkeypatch.setattr(modeling.checkpoint.hub, "QUESTIONS", 20)
    hub.floods = {"pages"}
    assert "the server sends more pages of its list of files" in failure("org/name")


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_that_fails_is_met_with_the_cache_or_one_line(hub, status):
    hub.status = status
    assert "run again" in failure("org/name", within=30)
    hub.status = None
    folder = resolve("org/name")
    hub.status = status
    assert resolve("org/name") == folder


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, "", ("no such repository, or a private one", "HF_TOKEN")),
        (404, "RepoNotFound", ("no such repository", "check the name")),
        (403, "GatedRepo", ("gated", "accept its terms", "HF_TOKEN")),
        (403, "", ("gated", "HF_TOKEN")),
        (418, "", ("418",)),
    ],
)
def test_refusals_of_the_hub_are_one_line_with_the_mend(hub, status, error, words):
    hub.status, hub.error = status, error
    message = failure("org/name")
    assert all(word in message for word in words), message


def test_an_unknown_revision_is_named(hub):
    assert "(no revision 'v9' there); give a branch" in failure("org/name@v9")
    assert f"no revision '{'9' * 40}' there" in failure(f"org/name@{'9' * 40}")


def test_without_network_the_cache_is_used_or_one_line_says_so(hub, monkeypatch):
    from huggingface_hub import constants

    folder = resolve("org/name@v1")
    closed = hub.url.rpartition(":")[0] + ":9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert resolve("org/name@v1") == folder
    assert "connection failed" in failure("org/name")


def test_offline_mode_uses_the_cache_or_says_how_to_leave_it(hub, monkeypatch):
    from huggingface_hub import constants

    folder = resolve("org/name@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _forget_client()
    assert resolve("org/name@v1") == folder
    assert "HF_HUB_OFFLINE forbids" in failure("org/name")


class Unheard(Exception):
    """A kind of error that no version raises today."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), ("disk is full", "HF_HOME", "run again")),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ("disk is full",)),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), ("the cache, /cache: Permission", "HF_HOME")),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/cache"), ("/cache: Not a directory", "HF_HOME")),
        (OSError(errno.EROFS, "Read-only file system"), ("cannot be written", "HF_HOME")),
        (ssl.SSLCertVerificationError("certificate verify failed"), ("certificate is not trusted", "SSL_CERT_FILE")),
        (type("ProxyError", (Exception,), {})("407"), ("proxy does not answer", "HTTPS_PROXY")),
        (type("ReadError", (Exception,), {})(""), ("connection failed or broke off", "run again")),
        (type("ChunkedEncodingError", (OSError,), {})("x"), ("broke off", "run again")),
        (Unheard("what\nis this" + 1000 * "!"), ("what is this!", "check name, network and access")),
        (AttributeError("'NoneType'"), ("'NoneType'",)),
        (RuntimeError(), ("RuntimeError",)),
    ],
)
def test_whatever_the_library_raises_is_one_line(error, words, hub, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = failure("org/name")
    assert all(word in message for word in words), message


def test_a_failure_is_explained_by_what_caused_it(hub, monkeypatch):
    def fail(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("a worker died") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "disk is full" in failure("org/name")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (type("ProxyError", (Exception,), {})("407"), "proxy does not answer"),
        (type("ReadError", (Exception,), {})("reset"), "broke off"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "/cache: Permission denied"),
    ],
)
def test_what_the_library_does_not_meet_with_the_cache_we_do(error, words, hub, monkeypatch):
    folder = resolve("org/name")
    real = huggingface_hub.snapshot_download

    def fail(*names, local_files_only=False, **options):
        if local_files_only:
            return real(*names, local_files_only=True, **options)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.warns(RestKVWarning, match=f"taken from the cache .*{words}"):
        assert resolve("org/name") == folder


def test_the_client_is_as_it_was_afterwards(hub, monkeypatch):
    from huggingface_hub.utils import get_session

    send = get_session().send
    resolve("org/name")
    assert get_session().send == send
    hub.silent = {"info"}
    wait_for(IMPATIENT, monkeypatch)
    failure("org/name@v1")
    assert get_session().send == send


def test_two_downloads_at_once_both_end(hub):
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda name=name: folders.append(download(name))) for name in
               (HubName("org/name", None), HubName("org/name", "v1"))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(folders)) == 2
    assert modeling.checkpoint.hub._ONE_AT_A_TIME.acquire(timeout=1)
    modeling.checkpoint.hub._ONE_AT_A_TIME.release()
