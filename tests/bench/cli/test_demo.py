"""`restkv demo`: what it shows, and that what it shows is what the public API answers."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

import restkv
from bench.cli.demo import Contender, _answers, _marked
from bench.quality.tasks import Frame, make_sample
from bench.runs.methods import parse_methods
from restkv.cli import main
from restkv.cli.options import RECALL

SMALL = ["demo", "--context", "512", "--compression", "8"]


def table(shown: str) -> dict[str, list[str]]:
    """The final table, by method."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows if len(row) == 5 and " of " in row[2]}


def test_it_tells_the_needles_the_answers_and_what_they_cost(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["restkv", "h2o", "snapkv:granularity=query"]
    assert main([*SMALL, "--seed", "2", "--methods", ",".join(methods)]) == 0
    shown = capsys.readouterr().out
    lm = restkv.load(RECALL)
    frame = Frame(lm.tokenizer)
    sample = make_sample("niah_multiquery", 512, 2, 0, frame)
    assert all(needle in shown for needle, _ in sample.meta["needles"]) and sample.question in shown
    rows = table(shown)
    assert list(rows) == ["full", *methods]
    prompt = [token for part in frame.ids(sample.context, sample.question, sample.answer_prefix) for token in part]
    for method in parse_methods("restkv,h2o", once=True):
        said = lm.generate(prompt, method.policy(64), max_new_tokens=sample.max_new_tokens, stop=".")
        right = sum(answer in said.text for answer in sample.answers)
        assert rows[method.label][0] == f"{right} of 4"
    kept = {label: int(row[1].split()[0].replace(",", "")) for label, row in rows.items()}
    assert kept["full"] > 490 and all(kept[label] < 64 + 64 for label in methods)
    assert all(re.fullmatch(r"[\d.]+ [kM]B", row[2]) and float(row[3]) > 0 for row in rows.values())


def test_a_text_that_is_read_sparsely_is_answered_from_what_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    prefill = "a-shape:sinks=16:local=16:block=32"
    assert main([*SMALL, "--seed", "1", "--methods", "restkv", "--prefill", prefill]) == 0
    rows = table(capsys.readouterr().out)
    lm = restkv.load(RECALL)
    frame = Frame(lm.tokenizer)
    sample = make_sample("niah_multiquery", 512, 1, 0, frame)
    prompt = [token for part in frame.ids(sample.context, sample.question, sample.answer_prefix) for token in part]
    for label, policy in (("full", restkv.FullCache()), ("restkv", restkv.ReSTKV(budget=64, interval=None))):
        said = lm.generate(prompt, policy, max_new_tokens=sample.max_new_tokens, stop=".", prefill=prefill)
        right = sum(answer in said.text for answer in sample.answers)
        assert rows[label][0] == f"{right} of 4"
    assert rows["full"][0] != "4 of 4"  # which it finds when it reads all


def test_other_tasks_and_many_methods(capsys: pytest.CaptureFixture[str]) -> None:
    methods = "restkv,snapkv,keynorm,keydiff,random,tova,caote,expected-attention"
    assert main([*SMALL, "--task", "cwe", "--methods", methods]) == 0  # without needles, and too many for columns
    assert list(table(capsys.readouterr().out)) == ["full", *methods.split(",")]


def test_what_cannot_be_is_refused_before_anything_is_loaded_or_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--methods", "restkv,magic"]) == 2
    assert "'magic'" in capsys.readouterr().err
    assert main(["demo", "--context", "512", "--compression", "300"]) == 2  # two entries
    assert "entries per head" in capsys.readouterr().err
    assert main([*SMALL, "--task", "magic"]) == 2
    assert "'magic'" in capsys.readouterr().err


def test_right_codes_stand_out_from_wrong_ones_and_narrow_screens_get_rows() -> None:
    frame = Frame(restkv.load(RECALL).tokenizer)
    sample = make_sample("niah_single", 300, 0, 0, frame)
    text = _marked(f" {sample.answers[0]} and 12", sample)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles[sample.answers[0]] == "bold green" and styles["12"] == "red"
    contenders = [Contender(f"method{i}", None, None, f"word{i}") for i in range(5)]  # type: ignore[arg-type]
    for width, lines in ((120, 1), (40, 5)):
        console = Console(width=width, record=True)
        with console.capture() as capture:
            console.print(_answers(console, contenders, sample))
        assert sum("word" in line for line in capture.get().splitlines()) == lines
