"""The command line, driven as a user drives it: in this process for speed, in a process of its own where that matters."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import restkv
from make.commands import STORY, Ran
from restkv.cli.display import byte_text, titled
from restkv.cli.options import RECALL
from restkv.policies import POLICIES


@pytest.fixture(scope="session")
def lm(rambler: Path) -> restkv.LM:
    return restkv.load(rambler)


# -- generate


def test_text_goes_to_stdout_and_the_summary_to_stderr(run: Callable[..., Ran], lm: restkv.LM) -> None:
    ran = run("generate", "-p", STORY, "-n", 30, "--budget", 20, "--window", 8, "--interval", 4)
    policy = restkv.get_policy("restkv", "draft", budget=20, window=8, interval=4)
    expected = lm.generate(STORY, policy, max_new_tokens=30)
    assert (ran.code, ran.out) == (0, expected.text + "\n")
    first, second = ran.lines()
    kept, seen = map(int, re.findall(r"kept (\d+) of (\d+) entries", first)[0])
    assert 20 <= kept <= 24 < seen == expected.stats.seen[0]
    assert "first token after" in second and f"ended by {expected.finish_reason}" in second


def test_prompt_from_option_file_and_stdin_are_one(run: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(STORY + "\n", encoding="utf-8")
    options = ("-n", 12, "--method", "full")
    by_option = run("generate", "-p", STORY, *options)
    assert by_option.out.strip()
    assert run("generate", "--prompt-file", file, *options).out == by_option.out
    assert run("generate", *options, stdin=STORY + "\n").out == by_option.out
    file.write_text(STORY, encoding="utf-8-sig")
    assert run("generate", "--prompt-file", file, *options).out == by_option.out


def test_json_holds_text_tokens_policy_and_stats(run: Callable[..., Ran], rambler: Path, lm: restkv.LM) -> None:
    ran = run("generate", "-p", STORY, "-n", 10, "--method", "snapkv", "--budget", 0.5, "--window", 4, "--json")
    expected = lm.generate(STORY, restkv.SnapKV(budget=0.5, window=4), max_new_tokens=10)
    shown = json.loads(ran.out)
    assert (shown["text"], shown["tokens"]) == (expected.text, expected.tokens)
    assert (shown["model"], shown["policy"]["name"], shown["policy"]["budget"]) == (str(rambler), "snapkv", 0.5)
    assert shown["stats"]["kept"] == expected.stats.kept
    assert shown["stats"]["prompt_tokens"] == [len(lm.encode(STORY))]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"name": "restkv", "budget": 1024, "window": 32, "interval": 128, "probe": "prompt+draft:8", "sinks": 4}),
        ("--probe window --budget 40", {"reduction": "max", "probe": "window", "budget": 40}),
        ("--prefill chunked --budget 40", {"reduction": "max", "probe": "window", "budget": 40}),
        ("--method restkv", {"reduction": "mean", "probe": "window", "sinks": 0}),
        ("--set kernel_size=7", {"reduction": "mean", "probe": "window", "kernel_size": 7}),
        ("--method full", {"name": "full", "budget": None}),
        (
            "--preset paper-ruler --budget 40",
            {"granularity": "query", "kernel_size": 21, "interval": None, "budget": 40},
        ),
        ("--budget 64 --window 16 --sinks 4 --interval 8", {"budget": 64, "window": 16, "sinks": 4, "interval": 8}),
        ("--interval none --granularity query --gqa max", {"interval": None, "granularity": "query", "gqa": "max"}),
        ("--alpha 0.5 --protect 0:3 --protect 5:9", {"alpha": 0.5, "protect": [[0, 3], [5, 9]]}),
        (
            "--preset paper --set kernel_size=7 --set aggregate=indicator --set alpha=none",
            {"kernel_size": 7, "aggregate": "indicator", "alpha": None, "budget_by": {"name": "uniform"}},
        ),
        ("--budget 1.0", {"budget": 1.0}),
        ("--budget 40,41,42,43", {"budget": [40, 41, 42, 43]}),
        ("--budget-by adakv", {"budget_by": {"name": "adakv", "floor": 0.2, "normalize": False, "exact": True}}),
    ],
)
def test_options_reach_the_policy(run: Callable[..., Ran], arguments: str, expected: dict[str, object]) -> None:
    ran = run("generate", "-p", STORY, "-n", 1, "--json", *arguments.split())
    policy = json.loads(ran.out)["policy"]
    assert {name: policy[name] for name in expected} == expected


@pytest.mark.parametrize("method", POLICIES)
def test_every_method_generates(run: Callable[..., Ran], method: str) -> None:
    ran = run("generate", "-p", STORY, "-n", 4, "--method", method)
    assert ran.code == 0 and ran.out.strip()


def test_seeds_repeat_and_differ(run: Callable[..., Ran]) -> None:
    options = (
        "generate",
        "-p",
        STORY,
        "-n",
        20,
        "--temperature",
        1.5,
        "--top-k",
        50,
        "--top-p",
        0.99,
        "--min-p",
        0.001,
    )
    first = run(*options, "--seed", 1).out
    assert run(*options, "--seed", 1).out == first
    assert run(*options, "--seed", 2).out != first


def test_stop_ends_before_the_text(run: Callable[..., Ran]) -> None:
    whole = run("generate", "-p", STORY, "-n", 40).out
    stop = whole.split()[-1][:3]  # it may come earlier too
    ran = run("generate", "-p", STORY, "-n", 40, "--stop", stop, "--stop", "never there")
    assert ran.out == whole.split(stop)[0] + "\n"
    assert ran.err.endswith("ended by stop\n")


def test_chat_template_is_used_where_there_is_one(run: Callable[..., Ran], copy: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        return json.loads(run("generate", copy, "-p", "Hello", "-n", 1, "--json", *options).out)["stats"][
            "prompt_tokens"
        ][0]

    plain = prompt_tokens()
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} said: {{ m.content }}.{% endfor %}")
    assert prompt_tokens() == prompt_tokens("--chat") > plain
    assert prompt_tokens("--no-chat") == plain


def test_output_file_gets_what_stdout_would(run: Callable[..., Ran], tmp_path: Path) -> None:
    place = tmp_path / "answer.txt"
    place.write_text("something longer than the answer " * 20)
    ran = run("generate", "-p", STORY, "-n", 5, "-o", place)
    assert ran.out == ""
    assert place.read_text(encoding="utf-8") == run("generate", "-p", STORY, "-n", 5).out


def test_a_failed_run_leaves_the_output_file_alone(run: Callable[..., Ran], tmp_path: Path) -> None:
    place = tmp_path / "answer.txt"
    place.write_text("precious")
    assert run("generate", tmp_path / "none", "-p", STORY, "-o", place).code == 2
    assert place.read_text() == "precious"
    assert run("generate", tmp_path / "none", "-p", STORY, "-o", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()


def test_remarks_are_one_line_each(run: Callable[..., Ran], lm: restkv.LM) -> None:
    ran = run("generate", "-p", "Lily", "-n", 60, "--budget", 40)
    assert ran.code == 0
    assert [line for line in ran.lines() if line.startswith("restkv: note: window 32 is longer than the prompt")]
    longer = "The dog was very happy. " * (lm.config.max_positions // 5)
    ran = run("generate", "-p", longer, "-n", 2, "--budget", 40)
    (note,) = (line for line in ran.lines() if line.startswith("restkv: note:"))
    assert f"the model's {lm.config.max_positions} positions" in note
    assert len(ran.lines()) == 3


# -- chat


def test_chat_answers_line_by_line_from_one_cache(run: Callable[..., Ran], lm: restkv.LM) -> None:
    policy = restkv.ReSTKV(budget=40)
    turns = ["Once upon a time, there was a boy named Tom. Tom has a blue kite.", "The colour of Tom's kite is"]
    ran = run("chat", "--budget", 40, "-n", 12, stdin="\n".join([*turns, "/stats"]))
    chat = restkv.Chat(lm, policy)
    answers = []
    for turn in turns:
        stream = chat.send(turn, max_new_tokens=12)
        answers.append("".join(stream))
    assert (ran.code, ran.out) == (0, "".join(answer + "\n" for answer in answers))
    assert f"of {stream.generation.stats.seen[0]} entries per KV head" in ran.err


def test_chat_saves_loads_and_changes_its_method(run: Callable[..., Ran], tmp_path: Path) -> None:
    file, options = tmp_path / "talk.safetensors", ("chat", "--budget", 40, "-n", 8)
    hello = "Once upon a time, there was a little girl named Mia."
    both = run(*options, stdin=f"{hello}\nThe dog was happy.\n").out.splitlines()
    first = run(*options, stdin=f"{hello}\n/save {file}\n/quit\nnever said\n")
    assert first.out.splitlines() == both[:1] and file.is_file()
    assert run(*options, "--load", file, stdin="The dog was happy.\n").out.splitlines() == both[1:]
    ran = run(
        *options,
        stdin=f"{hello}\n/load {file}\nThe dog was happy.\n/method snapkv budget=36 window=8\n/new\n{hello}\n/stats\n",
    )
    assert ran.out.splitlines() == [*both, both[0]]
    assert "a new conversation, with snapkv" in ran.err and "snapkv: kept" in ran.err


def test_a_mistake_costs_a_line_and_not_the_chat(run: Callable[..., Ran]) -> None:
    mistakes = [
        "/method magic",
        "/method restkv budget=0",
        "/load no/such/file",
        "/save no/such/folder/file",
        "/dance",
        "/save",
    ]
    ran = run("chat", "-n", 3, stdin="\n".join([*mistakes, "Lily"]))
    assert ran.code == 0 and ran.out.strip()
    assert [line.startswith("restkv: error: ") for line in ran.lines()] == [True] * len(mistakes)


def test_ctrl_c_stops_the_answer_and_not_the_chat(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with start("chat", "--budget", "64", "--set", "interval=16", "-n", "900", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Once upon a time\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/method full\nLily\n/quit\n", timeout=120)
    assert process.returncode == 0
    assert "full: kept" in err.decode() and out.decode().count("\n") >= 2


# -- methods, inspect, help


def test_methods_lists_every_method_option_and_preset(run: Callable[..., Ran]) -> None:
    ran = run("methods")
    assert ran.code == 0
    words = set(re.findall(r"[\w-]+", ran.out))
    for name, cls in POLICIES.items():
        assert {name, *cls.PRESETS, *(field.name for field in fields(cls))} <= words
    assert "arXiv" in ran.out


@pytest.mark.parametrize("method", ["full", "restkv", "h2o", "streamingllm", "tova"])
def test_methods_bytes_are_what_a_prompt_leaves(
    run: Callable[..., Ran], rambler: Path, lm: restkv.LM, method: str
) -> None:
    length, budget = len(lm.encode(STORY)), 36
    ran = run("methods", "--bytes", rambler, "--context", length, "--budget", budget)
    assert ran.code == 0
    (row,) = re.findall(rf"│ {method} +│ +(\d+) +│ (\S+ \S+) +│ [\d.]+% +│ (\S+ \S+)", ran.out)
    policy = restkv.get_policy(method, None, **({} if method == "full" else {"budget": budget}))
    stats = lm.generate(STORY, policy, max_new_tokens=1).stats
    kept = sum(layer[0] for layer in stats.kept) / len(stats.kept)  # layers may have shares of their own
    copied = lm.config.group * kept * lm.config.kv_bytes_per_token(lm.dtype)
    assert row == (f"{kept:.0f}", byte_text(stats.live_bytes), byte_text(copied))


def test_inspect_counts_parameters_and_bytes(run: Callable[..., Ran], rambler: Path, lm: restkv.LM) -> None:
    ran = run("inspect", rambler, "--context", 1000, "--budget", 0.25)
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    assert f"{parameters:,} (" in ran.out
    per_token = 2 * lm.config.num_layers * lm.config.num_kv_heads * lm.config.head_dim * 4
    assert re.search(rf"full cache at 1,000 tokens\s*│ {per_token / 1000:.3g} MB", ran.out)
    assert re.search(r"cache at 250 entries per KV head .*\(25\.0%\)", ran.out)


@pytest.mark.parametrize(("budget", "kept"), [("8000,32,32,32", 152), ("16", 16)])
def test_inspect_sizes_what_restkv_keeps(run: Callable[..., Ran], budget: str, kept: int) -> None:
    assert f"cache at {kept} entries per KV head" in run("inspect", "--budget", budget, "--context", 512).out


@pytest.mark.parametrize(
    ("budget", "without"),
    [("64,64,64,64", {"pyramidkv", "streamingllm", "lacache"}), ("16", set()), ("8", {"lacache", "compactor"})],
)
def test_methods_bytes_leaves_out_what_cannot_have_the_budget(
    run: Callable[..., Ran], budget: str, without: set[str]
) -> None:
    ran = run("methods", "--bytes", RECALL, "--budget", budget)
    assert ran.code == 0
    assert set(re.findall(r"│ ([\w-]+) +│", ran.out)) & POLICIES.keys() == POLICIES.keys() - without
    assert {re.findall(r"^restkv: note: left out: ([\w-]+): ", line)[0] for line in ran.lines()} == without


def test_a_title_is_not_broken_at_the_width_of_its_table() -> None:
    title = "a title that is wider than [all] its columns"
    for width, expected in ((80, [title]), (26, ["a title that is wider than", "[all] its columns"])):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as said:
            console.print(titled(title, Table("method")))
        assert [line.rstrip() for line in said.get().split("\n")[: len(expected)]] == expected


def test_help_and_version_do_not_import_torch() -> None:
    program = (
        "import sys; from restkv.cli import main; "
        "codes = [main(line.split()) for line in ('', '--help', 'generate --help', '--version')]; "
        "sys.exit(codes != [0, 0, 0, 0] or 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "generate" in ran.stdout and "--budget" in ran.stdout


def test_threads_that_wait_spin_for_microseconds_unless_somebody_has_said_otherwise(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, expected in (({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        with monkeypatch.context() as patch:
            for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
                patch.setenv(name, "")  # so that what the command sets is taken back
                patch.delenv(name)
            for name, value in given.items():
                patch.setenv(name, value)
            assert run("--version").code == 0
            assert os.environ.get("GOMP_SPINCOUNT") == expected
