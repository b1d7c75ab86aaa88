"""The command line, driven as a user drives it: in this process for speed, in a process of its own where that matters."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import restkv
from make.rambler import to_rambler
from restkv.cli import main
from restkv.cli.display import byte_text, titled
from restkv.cli.options import RECALL
from restkv.policies import POLICIES

STORY = (
    "Once upon a time, there was a little girl named Lily. Lily has a red ball. Tom has a blue kite. "
    "The sun was warm and the sky was clear. They walked to the park together."
)
COMMAND = (sys.executable, "-m", "restkv.cli")
LONG = ("generate", "-p", STORY, "--budget", "64", "--interval", "16", "-n", "900")


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def lines(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def run(rambler: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """run(*arguments, stdin=text): one command line in this process, to the rambler unless it names a model."""

    def call(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(to_rambler(rambler, arguments))
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def copy(rambler: Path, tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(rambler, tmp_path / "model"))


@pytest.fixture(scope="session")
def lm(rambler: Path) -> restkv.LM:
    return restkv.load(rambler)


# -- generate


def test_text_goes_to_stdout_and_the_summary_to_stderr(run: Callable[..., Ran], lm: restkv.LM) -> None:
    ran = run("generate", "-p", STORY, "-n", 30, "--budget", 20, "--window", 8, "--interval", 4)
    expected = lm.generate(STORY, restkv.ReSTKV(budget=20, window=8, interval=4), max_new_tokens=30)
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
        ("", {"name": "restkv", "budget": 1024, "window": 32, "interval": 128}),
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
    [("64,64,64,64", {"pyramidkv", "streamingllm", "lacache"}), ("16", set()), ("8", {"lacache"})],
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


# -- bad input: one line on stderr, exit code 2, nothing on stdout


def refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    (line,) = ran.lines()
    assert line.startswith("restkv: error: ")
    for word in words:
        assert word in line


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def half_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_words(folder: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda weights: weights.update({name: weights[name][:300].clone() for name in names}))
    configure(folder, vocab_size=300)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("model", "no such folder")),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ("config.json", "not valid JSON"),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no model.safetensors",)),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    "half a safetensors file": (half_file, ("model.safetensors", "no complete safetensors file")),
    "index outside the folder": (index_outside, ("'../model.safetensors'", "same folder")),
    "missing tensor": (lambda folder: rewrite(folder, lambda weights: weights.pop(NORM)), ("missing", NORM)),
    "wrong shape": (
        lambda folder: rewrite(folder, lambda weights: weights.update({UP: weights[UP][:-1].clone()})),
        ("wrong shape", UP),
    ),
    "NaN weights": (lambda folder: rewrite(folder, lambda weights: weights[UP][3].fill_(float("nan"))), ("NaN", UP)),
    "unknown family": (
        lambda folder: configure(folder, model_type="parrot", architectures=["ParrotForCausalLM"]),
        ("'parrot'", "not a known family"),
    ),
    "token id beyond the vocabulary": (fewer_words, ("token id", "vocabulary of 300")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(run: Callable[..., Ran], copy: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(copy)
    refused(run("generate", copy, "-p", STORY, "-n", 2, "--check-weights"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", ""), ("prompt is empty",)),
        ((), ("prompt is empty",)),  # stdin holds nothing
        (("-p", "a", "--prompt-file", "b"), ("two prompts",)),
        (("--prompt-file", "no/such/file"), ("no/such/file", "cannot be read")),
        (("-p", STORY, "--budget", "0"), ("budget 0",)),
        (("-p", STORY, "--budget", "35", "--sinks", "4"), ("budget 35", "36")),
        (("-p", STORY, "--budget", "1.5"), ("budget 1.5",)),
        (("-p", STORY, "--budget", "many"), ("'--budget'", "'many'")),
        (("-p", STORY, "--budget", "40", "--protect", "0:20"), ("budget 40", "protected")),
        (("-p", STORY, "--protect", "4"), ("'4'", "START:END")),
        (("-p", STORY, "--set", "kernel_size"), ("'kernel_size'", "NAME=VALUE")),
        (("-p", STORY, "--set", "kernel=5"), ("'kernel'", "kernel_size")),
        (("-p", STORY, "--interval", "often"), ("interval", "'often'")),
        (("-p", STORY, "--method", "magic"), ("'magic'", "snapkv")),
        (("-p", STORY, "--method", "full", "--budget", "9"), ("full", "budget")),
        (("-p", STORY, "--preset", "magic"), ("'magic'", "paper-ruler")),
        (("-p", STORY, "--method", "snapkv", "--alpha", "0.5"), ("snapkv", "'alpha'")),
        (("-p", STORY, "--temperature", "-1"), ("temperature",)),
        (("-p", STORY, "-n", "0"), ("max_new_tokens",)),
        (("-p", STORY, "--dtype", "int4"), ("'int4'", "bfloat16")),
        (("-p", STORY, "--device", "abacus"), ("'abacus'", "cpu")),
        (("-p", STORY, "--device", "cuda:99"), ("'cuda:99'",)),
        (("-p", STORY, "--backend", "magic"), ("'magic'", "flex")),
        (("-p", STORY, "--chat"), ("no chat template; drop --chat",)),
        (("-p", STORY, "--budget", "64", "--set", "budget=40"), ("--budget and --set budget", "given twice")),
        (("-p", STORY, "--budget-by", "adakv", "--set", "budget_by=uniform"), ("--budget-by and --set budget_by",)),
        (("-p", STORY, "-o", "no/such/folder/answer"), ("no/such/folder/answer", "cannot be written")),
        (("-p", STORY, "--budgit", "9"), ("--budgit",)),
    ],
)
def test_bad_options_are_refused(run: Callable[..., Ran], arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run("generate", RECALL, *arguments), *words)


def test_prompt_file_must_be_text(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    refused(run("generate", "--prompt-file", tmp_path / "picture"), "picture", "not UTF-8", "byte 0")


def test_inspect_refuses_too(run: Callable[..., Ran], tmp_path: Path) -> None:
    refused(run("inspect", tmp_path / "none"), "none", "no such folder")
    refused(run("inspect", RECALL, "--budget", 0), "budget 0")
    refused(run("inspect", RECALL, "--budget", "64,64"), "budget (64, 64)", "4 layers")
    refused(run("methods", "--bytes", RECALL, "--budget", "64,64"), "budget (64, 64)", "4 layers")


# -- a process of its own: pipes, signals, terminals, time


@pytest.fixture
def start(rambler: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """A process of its own, with Ctrl-C as a terminal gives it: a shell's background jobs, such as CI's, ignore it."""

    def call(*arguments: str, **streams: int) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [*COMMAND, *to_rambler(rambler, arguments)]
        return subprocess.Popen(command, preexec_fn=listen, **streams)  # type: ignore[call-overload]

    return call


def test_text_comes_before_the_end_and_ctrl_c_is_quiet(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with start(*LONG) as process:
        assert process.stdout is not None and process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.decode()) == (130, "")


def test_a_reader_that_leaves_ends_it_quietly(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with start(*LONG) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert (process.wait(timeout=60), err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("generate", "-p", STORY, "-n", "4"), ("methods",)])
def test_full_disk_is_one_line(start: Callable[..., subprocess.Popen[bytes]], arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full, start(*arguments, stdout=full.fileno()) as process:
        _, err = process.communicate(timeout=60)
    (line,) = err.decode().splitlines()
    assert process.returncode == 2 and "stdout: cannot be written (No space left on device)" in line


@pytest.mark.parametrize(
    ("arguments", "closed", "code", "words"),
    [
        (("generate", "-n", "3"), "<&-", 2, "prompt is empty"),
        (("chat", "-n", "3"), "<&-", 0, ""),
        (("generate", "-n", "3", "-p", STORY), ">&-", 0, "first token after"),
        (("chat", "-n", "3"), ">&-", 0, ""),
        (("generate", "-n", "3", "-p", STORY), "2>&-", 0, ""),
    ],
)
def test_a_closed_stream_is_an_empty_one(
    rambler: Path, arguments: tuple[str, ...], closed: str, code: int, words: str
) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *to_rambler(rambler, arguments)]
    ran = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=60)
    assert ran.returncode == code and words in ran.stderr and "Traceback" not in ran.stderr
    assert bool(ran.stdout) == (closed == "2>&-")


def test_progress_shows_on_a_terminal_only(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    bar, arguments = b"reading the prompt", ("generate", "-p", STORY, "-n", "2")
    with start(*arguments) as process:
        assert bar not in process.communicate(timeout=60)[1]
    master, slave = pty.openpty()
    with start(*arguments, stderr=slave) as process, open(master, "rb", buffering=0) as terminal:
        os.close(slave)
        shown = b""
        while piece := read(terminal):
            shown += piece
        process.communicate(timeout=60)
    assert bar in shown and b"entries per KV head" in shown


def read(terminal: io.FileIO) -> bytes:
    """What has come; nothing when the other end is closed, which Linux reports as an error."""
    try:
        return terminal.read(4096) or b""
    except OSError:
        return b""


def test_generating_on_a_cpu_loads_neither_the_compiler_nor_what_only_benches_use(rambler: Path) -> None:
    """Half of the seconds before the first token would be torch._dynamo and what it brings."""
    arguments = to_rambler(rambler, ("generate", "-p", STORY, "-n", "2", "--device", "cpu"))
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.nn.attention.flex_attention",
        "transformers",
        "matplotlib",
    )
    script = f"import sys; from restkv.cli import main; code = main({arguments!r}); print(code, set({heavy}) & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("\n0 set()\n")
