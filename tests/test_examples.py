"""Every file of examples/ runs, and says what it is there to show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import restkv

ROOT = Path(restkv.__file__).parents[1]
SHOWN = {
    "own_policy.py": ["vatp: 84669", "streamingllm: "],
    "ask_often.py": ["iron latch: 84669", "black belt: 58983", "noisy pipe: 85713", "light box: 65797", "bytes: 65797"],
    "chat.py": ["> Which code does the red hat have?\nThe code of the red hat is 48213.", "kettle is 90752."],
    "batch.py": ["58983.\n65797.\n48213.\n", "layer 0: 130 of 501", "layer 3: 34 of 501"],
}


def test_there_is_nothing_else() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    out = capsys.readouterr().out
    assert all(text in out for text in SHOWN[name]), out
