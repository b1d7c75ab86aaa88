"""Folders of results: what is written stays, what was half written goes, and two runs never mix. And the statistics of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.report.stats import Estimate, grouped, mean_interval, paired_difference
from bench.runs import folder as runs
from bench.runs.folder import MANIFEST, SAMPLES, TIMINGS, RunError, open_run, read_manifest, read_rows

ARGUMENTS = {"samples": 3, "lengths": [256, 512], "methods": ["full", "restkv"]}


def fill(folder: Path, keys: str, **changes: Any) -> list[str]:
    """Run "a b c" into a folder, as a bench does; returns what was not there yet."""
    with open_run(folder, "ruler", {**ARGUMENTS, **changes}, {"model": "m"}) as run:
        new = [key for key in keys.split() if key not in run.done]
        for key in new:
            run.add(key, {"score": 0.5, "text": f"line\n{key}\u2028é"})
    return new


def test_rows_are_one_line_each_and_come_back_as_they_were(tmp_path: Path) -> None:
    fill(tmp_path / "new" / "run", "a b")
    lines = (tmp_path / "new" / "run" / SAMPLES).read_bytes().split(b"\n")
    assert len(lines) == 3 and lines[2] == b""
    rows = read_rows(tmp_path / "new" / "run")
    assert rows == [{"key": key, "score": 0.5, "text": f"line\n{key}\u2028é"} for key in "ab"]
    timings = [json.loads(line) for line in (tmp_path / "new" / "run" / TIMINGS).read_text().splitlines()]
    assert [timing["key"] for timing in timings] == ["a", "b"] and all(timing["seconds"] >= 0 for timing in timings)


def test_a_row_is_on_the_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(runs.os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    with open_run(tmp_path, "ruler", ARGUMENTS, {}) as run:
        run.add("a", {"score": 1})
        assert str(tmp_path / SAMPLES) in synced
        assert [row["key"] for row in read_rows(tmp_path)] == ["a"]


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "whole", "a b c d")
    assert fill(tmp_path / "parts", "a b") == ["a", "b"]
    manifest = (tmp_path / "parts" / MANIFEST).read_bytes()
    assert fill(tmp_path / "parts", "a b c d") == ["c", "d"]
    assert fill(tmp_path / "parts", "a b c d") == []
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    assert (tmp_path / "parts" / MANIFEST).read_bytes() == manifest


def test_what_a_kill_left_of_a_line_is_cut_off_wherever_it_came(tmp_path: Path) -> None:
    fill(tmp_path / "whole", "a b")
    whole = (tmp_path / "whole" / SAMPLES).read_bytes()
    second = whole.index(b"\n") + 1
    fill(tmp_path / "torn", "a b")
    for size in range(second, len(whole)):
        (tmp_path / "torn" / SAMPLES).write_bytes(whole[:size])
        assert [row["key"] for row in read_rows(tmp_path / "torn")] == ["a"]
        assert fill(tmp_path / "torn", "a b") == ["b"]
        assert (tmp_path / "torn" / SAMPLES).read_bytes() == whole


def test_the_manifest_says_how_results_were_made(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    manifest = read_manifest(tmp_path)
    assert manifest["kind"] == "ruler" and manifest["arguments"] == ARGUMENTS and manifest["model"] == "m"
    assert set(manifest["versions"]) == {"restkv", "torch", "tokenizers", "numpy"}
    assert manifest["machine"]["cores"] == os.cpu_count() and manifest["machine"]["memory_bytes"] > 1e9
    assert manifest["machine"]["processor"] and manifest["started"].startswith("20")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": 4}, r"samples 3, this one has 4"),
        ({"methods": ["full", "snapkv"]}, r'methods \["full", "restkv"\], this one has \["full", "snapkv"\]'),
        ({"seed": 1}, r"seed null, this one has 1"),
    ],
)
def test_another_runs_folder_is_refused_naming_the_difference(tmp_path: Path, changes: dict, named: str) -> None:
    fill(tmp_path, "a")
    with pytest.raises(RunError, match=f"holds a run with {named}; choose another --out") as error:
        fill(tmp_path, "a b", **changes)
    assert "\n" not in str(error.value)
    assert len(read_rows(tmp_path)) == 1


def test_a_number_that_may_grow_may_not_shrink_and_hides_no_other_difference(tmp_path: Path) -> None:
    def run(samples: int, seed: int = 0) -> None:
        arguments = {**ARGUMENTS, "samples": samples, "seed": seed}
        with open_run(tmp_path, "ruler", arguments, {"model": "m"}, may_grow="samples"):
            pass

    run(3)
    before = read_manifest(tmp_path)
    run(5)
    assert read_manifest(tmp_path) == {**before, "arguments": {**before["arguments"], "samples": 5}}
    with pytest.raises(RunError, match="samples 5, this one has 4; choose another"):
        run(4)
    with pytest.raises(RunError, match="seed 0, this one has 1"):
        run(6, seed=1)
    assert read_manifest(tmp_path)["arguments"]["samples"] == 5


def test_an_argument_that_is_gone_another_kind_and_another_version_are_differences_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a", seed=1)
    with pytest.raises(RunError, match="seed 1, this one has null"):
        fill(tmp_path, "a")
    with (
        pytest.raises(RunError, match='kind "ruler", this one has "needle"'),
        open_run(tmp_path, "needle", {**ARGUMENTS, "seed": 1}, {}),
    ):
        pass
    monkeypatch.setattr(runs, "__version__", "99")
    with pytest.raises(RunError, match=r'restkv ".*", this one has "99"'):
        fill(tmp_path, "a", seed=1)


@pytest.mark.parametrize(
    ("policy", "source", "named"),
    [
        ({"power": 3.0}, "abc", "vatp's power 1.0, this one has 3.0"),
        ({"power": 1.0, "floor": 0}, "abc", "vatp's floor null, this one has 0"),
        ({"power": 1.0}, "def", """vatp's source "abc", this one has "def\""""),
    ],
)
def test_a_policy_whose_defaults_or_code_have_changed_is_another_run(
    tmp_path: Path, policy: dict, source: str, named: str
) -> None:
    def run(policy: dict, source: str) -> None:
        with open_run(tmp_path, "ruler", ARGUMENTS, {"methods": {"vatp": {"policy": policy, "source": source}}}):
            pass

    run({"power": 1.0}, "abc")
    run({"power": 1.0}, "abc")
    with pytest.raises(RunError, match=f"holds a run with {named}; choose another --out"):
        run(policy, source)


def test_tuples_and_lists_are_the_same_arguments(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    assert fill(tmp_path, "a b", lengths=(256, 512)) == ["b"]


def test_two_processes_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with (
        open_run(tmp_path, "ruler", ARGUMENTS, {}),
        pytest.raises(RunError, match="another run is writing there"),
        open_run(tmp_path, "ruler", ARGUMENTS, {}),
    ):
        pass
    assert fill(tmp_path, "a") == ["a"]


def test_results_without_a_manifest_are_nobodys_and_stay(tmp_path: Path) -> None:
    (tmp_path / SAMPLES).write_text('{"key": "a"}\n')
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        fill(tmp_path, "a")
    assert (tmp_path / SAMPLES).read_text() == '{"key": "a"}\n'


def test_broken_folders_are_named_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(RunError, match=r"samples\.jsonl: cannot be read"):
        read_rows(tmp_path)
    for content in ("{", "[]", '{"format": 0}'):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(RunError, match="not a manifest"):
            read_manifest(tmp_path)
    for line in ("{", "3", "{}"):
        (tmp_path / SAMPLES).write_text(f'{{"key": "a"}}\n{line}\n{{"key": "b"}}\n')
        with pytest.raises(RunError, match=r"samples\.jsonl: line 2 is not a result"):
            read_rows(tmp_path)
    (tmp_path / SAMPLES).write_text('{"key": "a"}\n{"key": "b"}\n{"key": "a"}\n')
    with pytest.raises(RunError, match=r"samples\.jsonl: line 3 repeats the result 'a'; delete it"):
        read_rows(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/run: cannot be written \(Not a directory\)"):
        fill(tmp_path / "file" / "run", "a")


# -- statistics


def test_a_mean_and_its_interval() -> None:
    values = [0.0] * 30 + [1.0] * 70
    estimate = mean_interval(values)
    assert estimate.mean == pytest.approx(0.7) and estimate.n == 100
    # Binomial: 1.96 * sqrt(0.7 * 0.3 / 100) = 0.0898
    assert estimate.low == pytest.approx(0.61, abs=0.02) and estimate.high == pytest.approx(0.79, abs=0.02)
    assert mean_interval(values) == estimate
    uneven = list(np.random.default_rng(3).exponential(size=30))
    assert mean_interval(uneven) == mean_interval(uneven) != mean_interval(uneven, seed=1)
    assert mean_interval(values, confidence=0.5).low > estimate.low
    assert estimate.show(1) == f"0.7 [{estimate.low:.1f}, {estimate.high:.1f}]"


def test_groups_count_alike_whatever_their_size() -> None:
    estimate = mean_interval([1.0] * 90, [0.0] * 10)
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 100)
    assert Estimate(0.5, 0.25, 0.75, 4).show(2, sign="+") == "+0.50 [+0.25, +0.75]"


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = mean_interval(rng.exponential(size=60).tolist(), seed=trial, draws=400)
        covered += estimate.low <= 1 <= estimate.high
    assert 0.86 <= covered / 200 <= 0.99


def test_large_groups_are_drawn_in_blocks_with_the_same_meaning() -> None:
    values = np.random.default_rng(1).normal(size=50_000).tolist()
    estimate = mean_interval(values, draws=200)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / 50_000**0.5, rel=0.2)


def test_pairing_removes_what_both_have_in_common() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=50)
    full = {f"{i}": 5 * x for i, x in enumerate(hard)}
    ours = {key: value - 0.1 for key, value in full.items()}
    difference = paired_difference({"a": ours}, {"a": full})
    assert difference and difference.high - difference.low < 1e-9 and difference.mean == pytest.approx(-0.1)
    apart = mean_interval(list(ours.values()))
    assert apart.high - apart.low > 1
    partial = paired_difference({"x": {"a": 1.0, "b": 2.0}, "y": {}}, {"x": {"b": 1.0, "c": 9.0}, "y": {"z": 1.0}})
    assert partial and (partial.mean, partial.n) == (1.0, 1)
    assert paired_difference({"x": {"a": 1.0}}, {"x": {"b": 1.0}}) is None


def test_grouping_keeps_the_order_of_rows() -> None:
    rows = [{"a": 2, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 3}]
    assert grouped(rows, "a") == {(2,): [rows[0], rows[2]], (1,): [rows[1]]}
    assert list(grouped(rows, "a", "b")) == [(2, 1), (1, 2), (2, 3)]
