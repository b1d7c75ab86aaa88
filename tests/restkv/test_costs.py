"""What a probe costs (restkv/costs.py), against what is read and alive once there is a prompt."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from make.places import ROOT
from restkv import probes
from restkv.cli import main
from restkv.costs import cost_of
from restkv.lm import LM
from restkv.phrases import Phrases
from restkv.policies import SnapKV
from restkv.reading import Layer
from restkv.session import Session

PROBES = (
    "window",
    "prompt",
    "prompt:3",
    "draft:5",
    "replay",
    "questions",
    "questions:3",
    "ask:2",
    "replay+questions:4+prompt",
)


@pytest.mark.parametrize("probe", PROBES)
def test_it_is_what_a_prompt_reads_and_holds(lm: LM, monkeypatch: pytest.MonkeyPatch, probe: str) -> None:
    """Tokens of every layer's texts, and the bytes of what the first stored layer and those held beside it are made of."""
    monkeypatch.setattr(probes, "PIECE", 30)
    ids = lm.encode("Lily had a red ball, and a cat. " * 5)
    session = Session(lm.engine, SnapKV(20, window=4, probe=probe), [len(ids)], 1)
    own = [len(one.own(len(ids))) for one in probes.parse_probe(probe)]
    stored: list[Layer] = []
    monkeypatch.setattr(
        "restkv.evict.Evictor.store_prompt", lambda self, cache, index, layer, mass: stored.append(layer)
    )
    monkeypatch.setattr(lm.model, "config", dataclasses.replace(lm.config, eos_token_ids=()))
    session.prefill([ids])
    cost = cost_of(probe, len(ids), Phrases(lm.tokenizer))
    read = [one.q_HQD.shape[1] for one in stored[0].seen]
    assert sum(read) == sum(own) + cost.read + cost.drafted
    # Of all layers where something is drafted; of what is read besides, and is not gone on with, of one all the same.
    layers = lm.config.num_layers if cost.steps else 1
    first, elements = stored[0], lm.config.hidden_size * (len(ids) + cost.read - cost.answered)
    elements += layers * (first.k_KLD.numel() + first.v_KLD.numel())
    for one in first.seen:
        once = one.probe == "replay" or not cost.steps
        parts = [x for x in (one.q_HQD, one.k_KTD, one.v_KTD) if x is not None]
        elements += (1 if once else layers) * sum(x.numel() for x in parts)
    assert cost.alive(lm.config, torch.float32) == 4 * elements


@pytest.mark.parametrize("length", [1, 29, 30, 31, 60, 95])
def test_a_replays_tokens_are_counted_without_making_it(lm: LM, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(probes, "PIECE", 30)
    phrases, (replay,) = Phrases(lm.tokenizer), probes.parse_probe("replay")
    sides = replay.sides(lm.encode("Lily had a red ball, and a cat. " * 9)[:length], phrases)
    assert replay.tokens(length, phrases) == sum(len(side.ids) for side in sides)


def test_inspect_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a prompt longer than could be made, too."""
    assert main(["inspect", str(ROOT / "restkv" / "assets" / "recall-mini"), "--context", "1000000000"]) == 0
    said = capsys.readouterr().out
    assert "what a probe costs a prompt of 1,000,000,000 tokens" in said
    rows = dict(re.findall(r"│ (\S+) +│ ([^│]+?) +│", said))
    assert rows["window"] == rows["prompt"] == "0" and rows["draft:8"] == "0 and 8 drafted"
    replayed = int(rows["replay"].replace(",", ""))
    assert 1e9 < replayed < 1.03e9, "a request for every 2,048 tokens"
    read, drafted = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", rows["questions:12"]))
    assert f"{read}" == rows["questions"] and drafted == 12 * len(probes.QUESTIONS)
    held = dict(re.findall(r"│ (\S+) +│[^│]+│[^│]+│[^│]+│ (one|all)", said))
    assert {probe for probe, layers in held.items() if layers == "all"} == {
        "draft:8",
        "questions:12",
        "ask",
        "replay+questions:12",
    }


def test_inspect_needs_no_tokenizer(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny("llama2").folder), "--context", "64"]) == 0
    rows = re.findall(r"│ (\S+) +│ [^│]+? +│", capsys.readouterr().out)
    assert {"window", "prompt", "draft:8", "replay"} <= set(rows) and "ask" not in rows
