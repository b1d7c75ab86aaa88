"""Commands that load and write quantised weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import restkv
from make.commands import Ran


def test_commands_take_weights_and_quantised_folders(run: Callable[..., Ran], rambler: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ran = run("quantize", rambler, made, "--weights", "int4")
    assert ran.code == 0 and ran.out.startswith(f"{made}: int4, ") and ran.err == ""
    model = restkv.load(rambler, weights="int4").model
    size = sum(p.nbytes for p in model.parameters())
    for words in (("inspect", rambler, "--weights", "int4"), ("inspect", made)):
        assert re.search(rf"parameters .*\({size / 1e6:.3g} MB as int4\)", run(*words).out)
    answers = [
        run("generate", *words, "-p", "one two three", "-n", 8, "--method", "full").out
        for words in ((made,), (rambler, "--weights", "int4"), (rambler, "--weights", "int8"))
    ]
    assert answers[0] == answers[1] and answers[0].strip() and answers[2].strip()
    ran = run("generate", rambler, "--weights", "int2", "-p", "one")
    assert ran.code == 2 and ran.lines() == ["restkv: error: weights 'int2' are not known; give auto, int8, int4"]
