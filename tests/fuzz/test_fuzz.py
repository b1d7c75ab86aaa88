"""Whatever somebody brings, the command answers, or says in one line what is wrong with it.

Every case begins with something valid, changes it, and runs a command on it in a process of its own (confined.py). With
`-m slow` 300 cases run, the same every time, and 20,000 new ones; RESTKV_FUZZ_COUNTS=FILE has the outcomes counted.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import Case, Target
from confined import ANSWERED, FAILED, REFUSED, Limits, Outcome, confined
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from targets import TARGETS

CASES = {"quick": 300, "slow": 20_000}
# A chat answers several turns and a bench several cells, on cores that others use too.
LIMITS = Limits(seconds=60, memory=1 << 30)


def share(cases: int, target: Target) -> int:
    """Of one target, by its weight; rounded up, so that all together are at least so many."""
    return math.ceil(cases * target.weight / sum(one.weight for one in TARGETS))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which targets keep the valid things that cases start from."""
    return tmp_path_factory.mktemp("valid")


@pytest.fixture(scope="module", autouse=True)
def warm(ground: Path) -> Iterator[None]:
    """What a command imports and does at its first call is done here, so that no fork pays for it."""
    import restkv.chat
    import restkv.cli.talk  # noqa: F401
    from restkv.cli import main

    case = TARGETS[0].unchanged(TARGETS[0].prepare(ground))[0]
    with contextlib.chdir(place(case, ground / "warm")):
        assert main(list(case.command)) == 0
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    yield
    gc.unfreeze()


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Outcomes of this test's cases, added to the file that RESTKV_FUZZ_COUNTS names."""
    seen: Counter[str] = Counter()
    yield seen
    if place := os.environ.get("RESTKV_FUZZ_COUNTS"):
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": request.node.name, **seen}) + "\n")


def place(case: Case, folder: Path) -> Path:
    """Write a case's files into a folder, which it makes if need be."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name, source in case.links.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)
    return folder


def run(case: Case, folder: Path) -> Outcome:
    """Run a case's command in a folder that is its own."""
    from restkv.cli import main

    place(case, folder)

    def work() -> int:
        os.chdir(folder)
        return main(list(case.command))

    return confined(work, case.stdin, LIMITS, talk=case.command[0] == "chat")


def check(target: Target, ground: Path, cases: int, counts: Counter[str], anew: bool) -> None:
    valid = target.prepare(ground)

    @settings(
        max_examples=cases,
        derandomize=not anew,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        case = data.draw(target.cases(valid), label="case")
        folder = Path(tempfile.mkdtemp(dir=ground))
        try:
            outcome = run(case, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        counts[outcome.kind] += 1
        event(outcome.kind)
        assert outcome.kind != FAILED, f"{outcome}\n--- command: {case.command}"

    one()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_some_cases(target: Target, ground: Path, counts: Counter[str]) -> None:
    check(target, ground, share(CASES["quick"], target), counts, anew=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_cases(target: Target, ground: Path, counts: Counter[str]) -> None:
    check(target, ground, share(CASES["slow"], target), counts, anew=True)
    ends = (ANSWERED,) if target.name == "chat" else (ANSWERED, REFUSED)  # a chat goes on after a refusal
    assert all(counts[end] for end in ends), "cases all end alike: the valid one is not, or the edits do nothing"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_cases_start_from_is_answered(target: Target, ground: Path, tmp_path: Path) -> None:
    for number, case in enumerate(target.unchanged(target.prepare(ground))):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = run(case, folder)
        assert outcome.kind == ANSWERED, str(outcome)


def _forever() -> int:
    while True:
        pass


def _fill_memory() -> int:
    return len(bytearray(2 << 30))


def _say(text: str, code: int) -> Callable[[], int]:
    def work() -> int:
        os.write(2, text.encode())
        return code

    return work


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (_forever, "still running"),
        (_fill_memory, "exit code 70"),
        (os.abort, "ended by signal 6"),
        (lambda: 1, "exit code 1"),
        (_say("", 2), "0 lines of error"),
        (_say("restkv: error: a\nrestkv: error: b\n", 2), "2 lines of error"),
        (_say("restkv: error: a\nTraceback\n", 2), "beside the error"),
        (_say("Traceback (most recent call last):\n", 0), "a traceback"),
        (_say("restkv: note: \x1b[31m\n", 0), "reached stderr"),
    ],
)
def test_a_wrong_end_is_seen(work: Callable[[], int], why: str) -> None:
    outcome = confined(work, limits=Limits(seconds=1, memory=512 << 20))
    assert outcome.kind == FAILED and why in outcome.why


def test_right_ends_are_told_apart() -> None:
    assert confined(_say("restkv: note: a\nkept 3\n", 0)).kind == ANSWERED
    assert confined(_say("restkv: note: a\nrestkv: error: b\n", 2)).kind == REFUSED
