"""Probes and refits on the command line: generate, chat, bench, and what is refused."""

from __future__ import annotations

import io
import json
import sys

import pytest

import restkv
from make.commands import STORY, Ran
from restkv.cli import main

PROBES = ["prompt", "draft:4", "replay", "questions", "window+draft:2+replay", "questions:2+ask:2"]


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_is_an_option_like_any_other(run, rambler, probe):
    method = ("--method", "snapkv", "--budget", 12, "--window", 4)
    ran = run("generate", "-p", STORY, "-n", 4, *method, "--probe", probe, "--json")
    expected = restkv.load(rambler).generate(STORY, restkv.SnapKV(12, window=4, probe=probe), max_new_tokens=4)
    shown = json.loads(ran.out)
    assert (ran.code, shown["tokens"], shown["policy"]["probe"]) == (0, expected.tokens, probe)


@pytest.mark.parametrize("refit", ["values", "bias", "both"])
def test_a_refit_is_one_too(run, rambler, refit):
    method = ("--method", "kvzip", "--budget", 20, "--window", 4)
    ran = run("generate", "-p", STORY, "-n", 4, *method, "--refit", refit, "--json")
    policy = restkv.get_policy("kvzip", budget=20, window=4, refit=refit)
    expected = restkv.load(rambler).generate(STORY, policy, max_new_tokens=4)
    shown = json.loads(ran.out)
    assert (ran.code, shown["tokens"], shown["policy"]["refit"]) == (0, expected.tokens, refit)


def test_kvzip_replays_unless_it_is_told_otherwise(run, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("Who is Lily?\nWhat did she find?\n")
    for extra, probe in (((), "replay"), (("--set", f"probe=questions:{questions}"), f"questions:{questions}")):
        ran: Ran = run("generate", "-p", STORY, "-n", 4, "--method", "kvzip", "--budget", 20, *extra, "--json")
        assert ran.code == 0 and json.loads(ran.out)["policy"]["probe"] == probe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--method", "snapkv", "--set", "probe=draft:0"),
            "snapkv: probe 'draft:0': give the tokens to draft, 1 to 4096",
        ),
        (
            ("--method", "snapkv", "--set", "probe=later"),
            "'later' is unknown; choose from window, prompt, draft, replay",
        ),
        (("--method", "snapkv", "--set", "probe=none"), "snapkv: probe None: give text"),
        (("--method", "h2o", "--set", "probe=replay"), "h2o: probe 'replay': the score of h2o depends on no queries"),
        (("--method", "kvzip", "--prefill", "chunked"), "choose probe=window, or prefill=dense"),
        (
            ("--method", "snapkv", "--refit", "both", "--prefill", "chunked"),
            "refit 'both': a chunked prefill evicts before all of the prompt has been read; choose refit=none, or prefill",
        ),
        (("--method", "kvzip", "--refit", "some"), "kvzip: refit 'some': choose from none, values, bias, both"),
        (("--method", "keydiff", "--refit", "both"), "keydiff: refit 'both': keydiff observes no queries"),
        (
            ("--method", "kvzip", "--set", "probe=questions:nowhere"),
            "'nowhere' cannot be read (No such file or directory)",
        ),
    ],
)
def test_a_mistake_is_one_line(run, options, words):
    ran = run("generate", "-p", STORY, "-n", 2, "--budget", 40, *options)
    assert ran.code == 2 and not ran.out
    (line,) = ran.lines()
    assert line.startswith("restkv: error: ") and words in line


def test_a_chat_takes_probes_and_changes_them(rambler, capsys, monkeypatch):
    lines = f"{STORY}\n/method snapkv probe=draft:3 budget=24 window=4\n{STORY}\n/method snapkv probe=draft:x\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
    code = main(["chat", str(rambler), "-n", "4", "--method", "kvzip", "--budget", "24"])
    shown = capsys.readouterr()
    assert code == 0 and len(shown.out.splitlines()) == 2
    assert "probe 'draft:x': give the tokens to draft" in shown.err


def test_a_bench_takes_methods_with_probes(tmp_path, capsys):
    methods = "kvzip,snapkv:probe=draft:8:reduction=max,snapkv:probe=window+replay,kvzip:refit=both,snapkv:refit=values"
    of = ["--tasks", "niah_single", "--lengths", "256", "--compression", "8", "--samples", "1"]
    assert main(["bench", "ruler", *of, "--methods", methods, "--out", str(tmp_path / "run")]) == 0
    rows = [line for path in (tmp_path / "run").rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert {json.loads(row).get("method") for row in rows} >= set(methods.split(","))
    capsys.readouterr()
    assert main(["bench", "ruler", *of, "--methods", "snapkv:probe=draft:x", "--out", str(tmp_path / "other")]) != 0
    assert "probe 'draft:x'" in capsys.readouterr().err
