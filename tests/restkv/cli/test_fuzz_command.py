"""`restkv fuzz`: any installed policy under the laws, plugins included; what breaks one is a script that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from make.commands import COMMAND
from make.places import environment
from restkv.cli import main
from restkv.testing import LAWS

PLUGIN = """
from dataclasses import dataclass
from restkv.policies import SnapKV

@dataclass(frozen=True)
class Shifty(SnapKV):
    name = "shifty"
    power: float = 1.0

    def importance(self, obs):
        return super().importance(obs).roll(1, -1) ** self.power
"""


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment in which a package with a policy that goes by columns is installed."""
    info = tmp_path / "shifty_of_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shifty_of_tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[restkv.policies]\nshifty = shifty_of_tests:Shifty\n")
    (tmp_path / "shifty_of_tests.py").write_text(PLUGIN)
    around = environment()
    return around | {"PYTHONPATH": os.pathsep.join([str(tmp_path), around["PYTHONPATH"]])}


def test_a_method_of_ours_keeps_every_law(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--examples", "5", "--seed", "3", "--budget", "0.5", "--set", "granularity=query"]
    assert main(["fuzz", "h2o", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out == f"h2o: keeps all {len(LAWS)} laws in 53 cases\n"
    assert [line.split()[0] for line in err.splitlines()] == list(LAWS)
    assert err.splitlines()[4] == "columns     kept in 5 cases: Where an entry lies changes nothing."


def test_a_plugin_that_breaks_one_is_shown_as_a_script_that_runs(plugin: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, "fuzz", "shifty", "--examples", "50", "--set", "power=2"]
    ran = subprocess.run(command, env=plugin, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("restkv: shifty: law 'columns' is broken: ") and "power=2" in line
    assert "from shifty_of_tests import Shifty\n" in ran.stdout
    script = tmp_path / "case.py"
    script.write_text(ran.stdout)
    again = subprocess.run([sys.executable, script], env=plugin, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].endswith(line.removeprefix("restkv: "))


def test_without_hypothesis_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None\nfrom restkv.cli import run; run()"
    command = [sys.executable, "-c", code, "fuzz", "snapkv"]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "restkv: error: restkv fuzz needs hypothesis; pip install 'restkv[testing]'\n"


def test_importing_restkv_does_not_import_hypothesis() -> None:
    code = "import sys, restkv, restkv.lm, restkv.policies, restkv.cli.app; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "method 'nothing' is unknown; choose from restkv, "),
        (["snapkv", "--set", "alpha=1"], "snapkv: option 'alpha' is unknown"),
        (["snapkv", "--examples", "0"], "'--examples'"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["fuzz", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("restkv: error: ") and words in line
