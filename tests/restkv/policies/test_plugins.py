"""Policies of other packages: the walk through docs/policies.md, run, and every way a plugin can be broken."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from make.places import ROOT
from restkv.cli import main
from restkv.errors import PolicyError
from restkv.policies import POLICIES, get_policy, known_policies, policy_class
from restkv.testing.observed import observation, prepared

DOCS = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
CODE, USE, TEST = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
(TOML,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(package, entry points, source): a package as pip would leave it, importable for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def add(package, points, source=""):
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = (f"{name} = {place}" for name, place in points.items())
        (info / "entry_points.txt").write_text("[restkv.policies]\n" + "\n".join(lines))
        (tmp_path / f"{package}.py").write_text(source)

    yield add
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


def refused(name):
    with pytest.raises(PolicyError) as caught:
        get_policy(name, budget=64)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_documented_policy_is_twenty_lines_and_scores_as_it_says(install):
    install("vatp", tomllib.loads(TOML)["project"]["entry-points"]["restkv.policies"], CODE)
    assert sum(bool(line.strip()) for line in CODE.splitlines()) <= 20
    assert known_policies() == (*POLICIES, "vatp") and "vatp" not in sys.modules
    policy = get_policy("vatp", budget=12, window=4, power=2.0)
    obs, w_o = observation(queries=4, columns=40, group=3, ragged=True, rows=2)
    obs = prepared(policy, obs, w_o)
    mass = get_policy("h2o", budget=12, granularity="query")
    value = obs.v.abs().sum(-1).repeat_interleave(3, 1) ** 2
    collected = prepared(mass, obs, w_o).mass
    assert collected is not None
    want = (collected * value).unflatten(1, (2, 3)).mean(2)
    torch.testing.assert_close(policy.score(obs)[obs.pos >= 0], want[obs.pos >= 0])
    assert (policy.keep(obs).sum(-1) == (obs.pos >= 0).sum(-1).clamp_max(12)).all()


def test_the_documented_use_runs(install, rambler, capsys):
    install("vatp", {"vatp": "vatp:VATP"}, CODE)
    folder = str(rambler)
    exec(USE.replace("path/to/checkpoint", folder), {})
    assert "[[" in capsys.readouterr().out
    (command,) = re.findall(r"```\nrestkv (generate .*--method vatp.*)\n", DOCS)
    words = re.findall(r'"([^"]*)"|(\S+)', command)
    arguments = [quoted or plain for quoted, plain in words]
    assert main([*arguments, folder, "-n", "2"]) == 0
    assert "vatp: kept" in capsys.readouterr().err


def test_the_documented_test_runs(install, capsys):
    install("vatp", {"vatp": "vatp:VATP"}, CODE)
    exec(TEST.replace("examples=100", "examples=5"), {})
    assert capsys.readouterr().out.startswith("vatp: kept every law (shapes 5, ")
    assert main(["fuzz", "vatp", "--examples", "3"]) == 0
    assert capsys.readouterr().out.startswith("vatp: keeps all ")


def test_an_unknown_name_lists_plugins_without_importing_them(install):
    install("broken", {"broken": "broken:Policy"}, "raise RuntimeError('no')")
    assert refused("nothing").endswith("random, full, broken")


@pytest.mark.parametrize(
    ("points", "source", "words"),
    [
        (
            {"mine": "other:Mine"},
            "raise ValueError('two\\nlines')",
            r"other:Mine of the package other cannot.*ValueError: two lines",
        ),
        ({"mine": "other:Mine"}, "", r"other:Mine of the package other cannot be imported \(AttributeError"),
        ({"mine": "nowhere:Mine"}, "", r"nowhere:Mine of the package other cannot be imported \(ModuleNotFoundError"),
        ({"mine": "other:Mine"}, "Mine = 3", "is not a subclass of restkv.Policy"),
        ({"mine": "other:Mine"}, "class Mine: name = 'mine'", "is not a subclass of restkv.Policy"),
        ({"mine": "restkv.policies:SnapKV"}, "", "calls itself 'snapkv'; make the names equal"),
    ],
)
def test_a_broken_plugin_is_named_in_one_line(install, capsys, points, source, words):
    install("other", points, source)
    message = refused("mine")
    assert message.startswith("method 'mine': ") and re.search(words, message)
    assert main(["methods"]) == 0
    shown = capsys.readouterr()
    assert "snapkv" in shown.out and f"restkv: note: {message}" in shown.err


def test_two_packages_of_one_name(install):
    install("one", {"mine": "one:Mine"})
    install("two", {"mine": "two:Mine"})
    assert re.search("registered by one:Mine of the package one and two:Mine of the package two", refused("mine"))


def test_a_plugin_cannot_take_one_of_our_names(install):
    install("other", {"snapkv": "other:Mine"}, "raise RuntimeError")
    assert policy_class("snapkv") is POLICIES["snapkv"] and known_policies() == tuple(POLICIES)


def test_a_preset_with_a_budget_needs_none_on_the_command_line(rambler, capsys):
    arguments = ["generate", str(rambler), "-p", "Lily", "-n", "1", "--json"]
    assert main([*arguments, "--method", "h2o", "--preset", "official"]) == 0
    assert '"budget": 516' in capsys.readouterr().out
    assert main([*arguments, "--method", "h2o", "--preset", "official", "--budget", "600"]) == 0
    assert '"budget": 600' in capsys.readouterr().out
