"""Environment variables that torch and others cannot parse, and too little memory to import them: one line, never a traceback."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from make.commands import COMMAND, Ran
from make.places import environment
from modeling.environment import blamed, cannot_import


def under(*arguments: object, limit: int | None = None, variables: dict[str, str] | None = None) -> Ran:
    """A command in a process of its own, with these variables, and with so many bytes of addresses."""

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [*COMMAND, *map(str, arguments)]
    ran = subprocess.run(
        command,
        env=environment(**(variables or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=confine,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def refusal(ran: Ran) -> str:
    (line,) = ran.lines()
    assert ran.code == 2 and line.startswith("restkv: error: ") and not ran.out
    return line


@pytest.mark.parametrize(
    ("name", "value"), [("PYTORCH_JIT", "x"), ("TORCH_LOGS", "bogus"), ("TORCH_DISTRIBUTED_DEBUG", "bogus")]
)
def test_a_variable_that_torch_cannot_parse_is_named(rambler: Path, name: str, value: str) -> None:
    line = refusal(under("generate", rambler, "-p", "hi", "-n", 2, variables={name: value}))
    assert "torch cannot be imported (ValueError: " in line and f"correct or unset {name}={value}" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("TORCHINDUCTOR_COMPILE_THREADS", "abc"), ("TORCHINDUCTOR_WORKER_START", "bogus")]
)
def test_a_variable_that_the_compiler_cannot_parse_is_named(rambler: Path, name: str, value: str) -> None:
    arguments = ("generate", rambler, "-p", "hi", "-n", 2)
    line = refusal(under(*arguments, "--backend", "flex", variables={name: value}))
    assert "cannot be compiled here" in line and f"correct or unset {name}={value}, or use the backend sdpa" in line
    assert under(*arguments, variables={name: value}).code == 0  # nothing is compiled


UNNAMED = """
import warnings
from make.small import small_model
from restkv.engine import Engine

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    engine = Engine(small_model(), "flex", named=False)
print(engine.backend, *[one.message for one in said])
"""


def test_a_default_of_flex_gives_way_to_sdpa() -> None:
    env = environment(TORCHINDUCTOR_COMPILE_THREADS="abc")
    ran = subprocess.run([sys.executable, "-c", UNNAMED], env=env, capture_output=True, text=True)
    assert ran.stdout.startswith("sdpa ") and "TORCHINDUCTOR_COMPILE_THREADS=abc" in ran.stdout, ran.stderr[-2000:]


def test_a_variable_that_matplotlib_cannot_parse_is_named(rambler: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "kept.png"
    line = refusal(under("inspect", "--kept", rambler, "--length", 64, "--out", out, variables={"MPLBACKEND": "bogus"}))
    assert "matplotlib cannot be imported (ValueError: " in line and "correct or unset MPLBACKEND=bogus" in line


def test_a_variable_that_huggingface_hub_cannot_parse_is_named() -> None:
    pytest.importorskip("huggingface_hub")
    line = refusal(under("generate", "org/name", "-p", "hi", variables={"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}))
    assert "huggingface_hub cannot be used" in line and "correct or unset HF_HUB_DOWNLOAD_TIMEOUT=abc" in line


@pytest.mark.parametrize("limit", [40, 100, 300, 450, 520, 600])
def test_too_few_addresses_for_torch_is_one_line(rambler: Path, limit: int) -> None:
    """Of most of these the libraries that torch loads make an abort or a segmentation fault."""
    line = refusal(under("generate", rambler, "-p", "hi", "-n", 2, limit=limit * 1_000_000))
    assert "free under ulimit -v" in line or line.startswith("restkv: error: not enough memory")


def test_what_needs_no_torch_works_under_the_same_limit() -> None:
    assert under("--version", limit=300_000_000).code == 0


def test_the_first_line_of_the_reason_is_said_and_advice_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        try:
            raise OSError("x.so: failed to map segment from shared object\nand more")
        except OSError as error:
            raise ImportError("\n\nIMPORTANT: PLEASE READ THIS\n") from error
    except ImportError as error:
        said = cannot_import("numpy", error)
    assert said.startswith(
        "numpy cannot be imported (OSError: x.so: failed to map segment from shared object); free memory"
    )
    monkeypatch.setenv("TORCH_X", "17")
    monkeypatch.setenv("HF_X", "17")
    assert blamed("torch", ValueError("17 is bad")) == ["TORCH_X"]
    assert blamed("torch", ValueError("175 is bad")) == []
    assert "environment variables TORCH_* PYTORCH_*" in cannot_import("torch", ValueError("175 is bad"))


def test_a_fault_of_ours_keeps_its_traceback(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("restkv.kernels.announce_compiling", fail)
    with pytest.raises(ZeroDivisionError):
        run("generate", "-p", "hi")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_lack_of_memory_anywhere_is_one_line(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("restkv.kernels.announce_compiling", fail)
    assert "not enough memory; ask for less (" in refusal(run("generate", "-p", "hi"))
