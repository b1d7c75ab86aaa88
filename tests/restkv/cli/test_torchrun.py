"""`torchrun -m restkv generate`: rank 0 speaks, all ranks end together, and what goes wrong is said once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore

import restkv
from make.commands import COMMAND, STORY
from make.places import ROOT, environment
from restkv.cli.options import RECALL

SECONDS = 120
OPTIONS = ("-p", STORY, "-n", "12", "--budget", "24", "--window", "8", "--interval", "4", "--probe", "window")
UNDER_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def finish(process: subprocess.Popen[str], stdin: str | None = None) -> tuple[int, str, str]:
    """A hang is a failure, of which nothing is left running."""
    try:
        out, err = process.communicate(stdin, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"still running after {SECONDS} s") from None
    return process.returncode, out, err


def start(command: tuple[str, ...], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1", **variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_torchrun_gives_the_answer_of_one_process() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("-m", "restkv", "generate", *OPTIONS[2:], "--json")
    code, out, err = finish(start((*torchrun, *words)), STORY)  # of one standard input, which rank 0 reads
    assert code == 0, err
    lm = restkv.load(RECALL)
    policy = restkv.get_policy("restkv", budget=24, window=8, interval=4)
    alone = lm.generate(STORY, policy, max_new_tokens=12)
    said = json.loads(out)  # once: rank 1 says nothing
    assert (said["text"], said["tokens"]) == (alone.text, alone.tokens)
    entries = said["stats"]["rank_entries"]
    assert len(entries) == 2 and [sum(entries)] == alone.stats.rank_entries
    assert err.count("kept") == 1 and "2 ranks, the fullest holds" in err


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A checkpoint in which what only rank 1 reads is no number."""
    folder = tmp_path / "torn"
    shutil.copytree(RECALL, folder)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.down_proj.weight"][0, -1] = torch.nan
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_goes_wrong_on_one_rank_ends_all_with_one_line(torn: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=SECONDS), wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as of torchrun's agent, whose part this test plays
    }
    words = (*COMMAND, "generate", str(torn), *OPTIONS, "--check-weights")
    processes = [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    (code, out, err), (other_code, other_out, other_err) = map(finish, processes)
    assert code != 0 and other_code != 0 and out == other_out == ""
    lines = [line for line in (err + other_err).splitlines() if "error" in line]
    (line,) = lines
    assert line.startswith("restkv: error: rank 1 of 2: ") and "NaN or Inf" in line and "down_proj" in line


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_other_commands_are_refused_once(run, monkeypatch, rank: str, lines: int) -> None:
    values = (rank, "2", rank, "127.0.0.1", "1", "test")
    for name, value in zip(UNDER_TORCHRUN, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("restkv.cli.terminal.hushed", False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # rank 1 gives its own up
    monkeypatch.setattr(
        "restkv.cli.ranks._begun", lambda: False
    )  # in a process of its own nothing has been imported yet
    ran = run("chat", "-n", "4")
    assert ran.code == 2
    assert ran.err.count("chat: runs in one process, and torchrun has started 2") == lines == len(ran.lines())


def test_processes_that_do_the_same_are_refused(run, monkeypatch) -> None:
    for name, value in zip(UNDER_TORCHRUN, ("0", "2", "0", "127.0.0.1", "1", "test"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("restkv.cli.ranks._begun", lambda: False)
    ran = run("generate", "-p", "a", "--parallel", "none")
    assert ran.code == 2 and "--parallel none: 2 processes would all do the same" in ran.err
    assert "give auto, tensor or none" in run("generate", "-p", "a", "--parallel", "pipeline").err


def test_tensor_parallel_alone_says_how_to_start() -> None:
    for name in ("RANK", "WORLD_SIZE"):
        assert name not in os.environ
    with pytest.raises(restkv.RestKVError, match=r"RANK is not set.*torchrun --nproc-per-node N"):
        restkv.load(RECALL, parallel="tensor")
    with pytest.raises(restkv.RestKVError, match="parallel 'pipeline' is not known; give none or tensor"):
        restkv.load(RECALL, parallel="pipeline")
