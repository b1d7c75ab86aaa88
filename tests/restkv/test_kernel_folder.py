"""Where kernels are kept, and machines that have no place for them: nobody's home, foreign and read-only folders, no compiler."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import restkv
from make.places import environment
from make.small import small_model
from restkv import kernels as compiling
from restkv.cli import main
from restkv.errors import CompileError, RestKVWarning
from restkv.kernels import keep_kernels, kernel_folder
from restkv.lm import LM
from restkv.policies import ReSTKV

POLICY = ReSTKV(budget=20, window=4, interval=8)
NOBODY = 54321  # a user without an entry in passwd


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Iterator[Path]:
    """A user without kernels: XDG_CACHE_HOME is this folder, and nothing else says where they go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    compiling._temporary_folder.cache_clear()
    yield tmp_path
    compiling._temporary_folder.cache_clear()


def homeless(_: type[Path]) -> None:
    raise RuntimeError("Could not determine home directory.")


def test_kernels_go_to_the_users_cache_folder(nowhere):
    assert keep_kernels() == kernel_folder() == nowhere / "restkv" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(nowhere / "restkv" / "inductor")
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(nowhere / "restkv" / "inductor")


def test_empty_libraries_of_killed_processes_are_dropped_and_no_others(nowhere):
    folder = kernel_folder() / "ab"
    folder.mkdir()
    dead, written_now, whole = (folder / f"{name}.main.so" for name in ("dead", "now", "whole"))
    for library, content, age in ((dead, b"", 3600), (written_now, b"", 0), (whole, b"code", 3600)):
        library.write_bytes(content)
        os.utime(library, (library.stat().st_mtime - age,) * 2)
    keep_kernels()
    assert sorted(folder.iterdir()) == [written_now, whole]


@pytest.mark.parametrize("named", ["", "mine"])
def test_a_folder_named_by_the_user_wins_and_an_empty_name_is_none(nowhere, monkeypatch, named):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named and str(nowhere / named))
    assert keep_kernels() == (nowhere / named if named else nowhere / "restkv" / "inductor")
    assert (nowhere / "restkv").exists() == (not named)


@pytest.mark.parametrize("wrong", ["a file", "a file, named", "foreign", "homeless", "a link in a circle"])
def test_where_nothing_can_be_kept_a_private_folder_serves_while_the_process_lives(nowhere, monkeypatch, wrong):
    if wrong.startswith("a file"):
        (nowhere / "file").write_text("")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR" if "named" in wrong else "XDG_CACHE_HOME", str(nowhere / "file"))
    elif wrong == "foreign":
        kernel_folder()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    elif wrong == "homeless":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", classmethod(homeless))
    else:
        (nowhere / "restkv").symlink_to(nowhere / "restkv")
    with pytest.raises(CompileError, match=r"cannot be kept .*; set TORCHINDUCTOR_CACHE_DIR") as refused:
        kernel_folder()
    with pytest.warns(RestKVWarning) as told:
        folder = keep_kernels()
    assert [str(one.message) for one in told] == [str(refused.value)] and "\n" not in str(refused.value)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and folder.is_relative_to(tempfile.gettempdir())
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert keep_kernels() == folder  # and no second word about it
    compiling._temporary_folder().cleanup()


def test_without_any_folder_for_temporary_files_compiling_is_refused_in_a_line(nowhere, monkeypatch):
    (nowhere / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere / "gone"))
    with (
        pytest.warns(RestKVWarning, match="going on with sdpa") as told,
    ):
        lm = LM(small_model(), None, "flex", named=False)
    assert lm.backend == "sdpa" and "'decode' cannot be compiled here" in str(told[-1].message)
    with pytest.raises(CompileError, match="'decode' cannot be compiled here"):
        LM(small_model(), None, "flex")


def test_an_eager_answer_looks_for_no_folder(nowhere, rambler, monkeypatch):
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "cache"))
    said = restkv.load(rambler).generate("a story", POLICY, max_new_tokens=40)
    assert len(said.tokens) == 40 and said.stats.graphs == 0
    assert not (nowhere / "cache").exists() and "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_warming_up_for_nobody_is_refused(nowhere, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert main(["warmup"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("restkv: error: compiled kernels cannot be kept (")


# A user whom passwd does not know, without HOME and with little else in the environment, in a folder that is not theirs. The
# interpreter may lie where only the first user can read, so that user runs the same lines before, and what they need is imported.
STRANGER = """
import contextlib, io, os, sys, tempfile
import torch, torch._inductor.compile_fx
from restkv.cli import main

def be_nowhere():
    os.environ.clear()
    os.environ.update({environment!r})
    os.chdir("/")

be_nowhere()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for words in {lines!r}:
        main(words)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({uid})
    os.setuid({uid})
be_nowhere()
tempfile.tempdir = None
for words in {lines!r}:
    print(chr(0), main(words), flush=True)
    print(chr(0), file=sys.stderr, flush=True)
"""


def stranger(lines: list[list[str]], **environment: str) -> tuple[list[str], list[str]]:
    """Of each command line: what it wrote to stdout and its exit code after it; and what it wrote to stderr."""
    script = STRANGER.format(uid=NOBODY, environment=environment, lines=lines)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\0"), ran.stderr.split("\0")


@pytest.fixture
def public(rambler) -> Iterator[Path]:
    """A copy of the rambler that everybody may read."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(rambler, Path(place) / "model")
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(place) / "model"


def test_a_stranger_gets_eager_answers_and_a_line_where_there_is_no_compiler(public):
    ask = ["generate", str(public), "-p", "a story", "-n", "20"]
    out, err = stranger([ask, ["warmup", str(public)], [*ask, "--backend", "flex"]], PATH="/nowhere", TMPDIR="/nowhere")
    assert [part.split()[0] for part in out[1:]] == ["0", "2", "2"] and len(out[0]) > 20, (out, err)
    assert "error" not in err[0] and "kernels" not in err[0]
    *notes, line = err[2].split("\n")[1:-1]
    assert line.startswith("restkv: error: ") and "there is no working C++ compiler (g++)" in line
    assert [note.startswith("restkv: note: compiled kernels cannot be kept (") for note in notes] == [True]
    (line,) = err[1].split("\n")[1:-1]
    assert line.startswith("restkv: error: compiled kernels cannot be kept (")


@pytest.mark.slow  # compiles without kernels
def test_a_command_compiles_without_a_place_to_keep_its_kernels(public):
    """A process with hardly any environment; its kernels go to a folder of its own, and that folder goes with it."""
    temporary = public.parent / "temporary"
    temporary.mkdir()
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), "XDG_CACHE_HOME": "/proc/nowhere"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    command = "import sys; from restkv.cli import main; sys.exit(main())"
    ask = [sys.executable, "-c", command, "generate", str(public), "-p", "a story", "-n", "20"]
    eager, compiled = (
        subprocess.run([*ask, *more], env=environment, capture_output=True, text=True, timeout=600)
        for more in ([], ["--backend", "flex"])
    )
    assert eager.returncode == compiled.returncode == 0, compiled.stderr
    assert eager.stdout == compiled.stdout and len(eager.stdout) > 20
    assert "kernels" not in eager.stderr
    assert "compiled kernels cannot be kept" in compiled.stderr and "the step is compiled" in compiled.stderr
    assert not list(temporary.glob("restkv-*"))


WITHOUT_COMPILER = """
import warnings
from make.small import small_ids, small_model
from restkv.errors import CompileError
from restkv.lm import LM
from restkv.policies import ReSTKV

policy = ReSTKV(budget=20, window=4, interval=8)
model, ids = small_model(group=3, head_dim=16), small_ids(33)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    lm = LM(model, None, "flex", named=False)
    said = [lm.generate(ids, policy, max_new_tokens=30) for _ in range(2)]
told = [str(one.message) for one in seen if "compiled" in str(one.message)]
assert len(told) == 1 and "there is no working C++ compiler (g++)" in told[0] and "\\n" not in told[0], told  # tried once
want = LM(model, None).generate(ids, policy, max_new_tokens=30)
assert [one.tokens for one in said] == [want.tokens] * 2 and said[0].stats.kept == want.stats.kept
try:
    LM(model, None, "flex").generate(ids, policy, max_new_tokens=3)
except CompileError as error:
    assert "'decode' cannot be compiled here: there is no working C++ compiler (g++)" in str(error), error
else:
    raise AssertionError("compiled without a compiler")
"""


def test_without_a_compiler_a_default_gives_way_and_a_name_is_refused(tmp_path):
    without = environment(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "kernels"))
    without.pop("CXX", None)
    ran = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=without, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
