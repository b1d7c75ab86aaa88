"""Pictures of what was kept: the masks are the cache's, the text shows what died, the picture is one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import restkv
from bench.quality.kept import Kept, find_marks, kept_masks, look, over_text, terminal
from bench.runs.together import pattern_of, prefill_together
from make.small import small_ids, small_model
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.session import Session

PROMPT = (
    "Once upon a time, there was a little girl named Lily. Lily has a red ball. Tom has a blue kite. The sun was warm."
)


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


def example() -> Kept:
    """Two layers, one head each, four tokens: the first kept by both, the second by one, the rest by none."""
    share = np.array([[[1.0, 1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]])
    return Kept("some", ("Lily ", "has ", "a ", "ball."), share, ((3, 4),))


def test_masks_say_what_each_query_head_still_has() -> None:
    lm = LM(small_model(3), None)
    ids = small_ids(30)
    policies = {
        "kv": restkv.SnapKV(budget=10, window=4),
        "query": restkv.SnapKV(budget=10, window=4, granularity="query"),
        "slots": restkv.StreamingLLM(budget=10),
        "ragged": restkv.SnapKV(budget=10, window=4, budget_by="adakv"),
        "full": restkv.FullCache(),
    }
    for name, policy in policies.items():
        session = Session(lm.engine, policy, [30], 4)
        prefill_together(lm, [session], ids)
        masks = kept_masks(session, 30)
        counts = torch.stack(masks).sum(-1)
        if name == "ragged":
            assert counts.unflatten(1, (2, 2))[:, :, 0].sum(-1).tolist() == [20, 20] and counts.unique().numel() > 1
        else:
            assert counts.unique().tolist() == [30 if name == "full" else 10]
        if name == "slots":
            assert all(
                mask[head].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(24, 30)]
                for mask in masks
                for head in range(4)
            )
        elif name != "full":
            assert torch.stack(masks)[..., -4:].all()
        for layer, mask in zip(session.cache.layers, masks, strict=True):
            _, pos_KC = layer.slots()
            for head, positions in enumerate(pos_KC.tolist()):
                union = mask.unflatten(0, (2, 2))[head].any(0).nonzero()[:, 0].tolist()
                assert union == sorted(position for position in positions if position >= 0)
        if name == "query":
            assert any((mask[0] != mask[1]).any() for mask in masks)  # a group's heads differ
        session.feed(torch.tensor([3]))
        assert all(torch.equal(a, b) for a, b in zip(kept_masks(session, 30), masks, strict=True)) or name == "slots"


def test_the_text_shows_what_is_left_of_it() -> None:
    text = over_text(example())
    assert text.plain == "Lily has · ·····"
    spans = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert spans == {"Lily ": "bold", "has ": "bold", "· ": "dim", "·····": "dim underline"}


def test_the_map_has_a_line_per_head_and_marks_above() -> None:
    title, marks, first, second, _, _ = (line.plain for line in terminal(example(), 4))
    assert title == "some: 2 of 4 entries per KV head"
    assert marks == " " * 8 + "   ▼"
    assert first == "L0  h0  ██  " and second == "L1  h0  █   "
    shaded = [line.plain for line in terminal(example(), 2)]
    assert shaded[2][8:] == "█ " and shaded[3][8:] == "▒ " and shaded[1][8:] == " ▼"


def test_what_look_sees_is_what_generation_keeps(lm: restkv.LM) -> None:
    ids = lm.encode(PROMPT)
    policies = [
        ("a", restkv.ReSTKV(budget=16, window=8, budget_by="uniform")),
        ("b", restkv.SnapKV(budget=16, window=8, granularity="query")),
    ]
    kv, query = look(lm, ids, policies)
    assert "".join(kv.pieces).removeprefix("<s>") == PROMPT and len(kv.pieces) == len(ids)
    assert (kv.share.sum(2) == 16).all() and set(np.unique(kv.share)) == {0, 1}
    assert np.allclose(query.share.sum(2), 16) and {0.5, 1} <= set(np.unique(query.share))
    assert kv.share.shape == (lm.config.num_layers, lm.config.num_kv_heads, len(ids))


def test_under_a_sparse_prefill_it_sees_what_generation_keeps_under_it(lm: restkv.LM) -> None:
    ids, policy = lm.encode((RECALL / "story.txt").read_text())[:300], restkv.ReSTKV(budget=16, window=8)
    prefill = "a-shape:sinks=16:local=16:block=32"
    session = Session(lm.engine, policy, [len(ids)], 1, prefill=prefill)
    session.prefill([ids])
    (sparse,) = look(lm, ids, [("a", policy)], pattern=pattern_of(prefill))
    (dense,) = look(lm, ids, [("a", policy)])
    masks = torch.stack(kept_masks(session, len(ids))).unflatten(1, (lm.config.num_kv_heads, -1)).double().mean(2)
    assert np.array_equal(sparse.share, masks.numpy()) and not np.array_equal(sparse.share, dense.share)


def test_marks_are_the_tokens_of_a_string(lm: restkv.LM) -> None:
    ids = lm.encode(PROMPT)
    for string, times in (("has a", 2), ("red ball", 1), ("Once", 1), ("warm.", 1)):
        spans = find_marks(lm, PROMPT, [string])
        assert len(spans) == times
        for start, stop in spans:
            assert string in lm.tokenizer.decode(ids[start:stop])
            assert stop - start <= len(lm.tokenizer.encode(string, bos=False)) + 2
    assert find_marks(lm, PROMPT, ["warm.", "Once"]) == sorted(find_marks(lm, PROMPT, ["Once", "warm."]))
    for missing in ("blue ball", ""):
        with pytest.raises(PromptError, match="does not occur in the prompt"):
            find_marks(lm, PROMPT, [missing])


def test_inspect_kept_is_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kept", "--length", "220", "--budget", "20", "--methods", "h2o", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", "--kept", "--context", "220", "--budget", "20", "--methods", "h2o", "--seed", "3"]) == 0
    assert capsys.readouterr().out == shown and "h2o: 20 of " in shown
    assert main(["bench", "kept", "--prefill", "chunked"]) == 2
    assert "methods cannot share it" in capsys.readouterr().err
    assert main(["inspect", "--methods", "h2o"]) == 2
    assert "--methods" in capsys.readouterr().err


def test_the_command_shows_needle_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "kept.png"
    sizes = "--length 220 --depth 0.5 --budget 20 --methods restkv,h2o,snapkv:granularity=query".split()
    assert main(["bench", "kept", *sizes, "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^(\S+): (?:18|19|20) of \d+ entries", shown, re.M) == [
        "restkv",
        "h2o",
        "snapkv:granularity=query",
    ]
    assert shown.count("▼") > 3 and "·" in shown and "the old anchor is" in shown
    assert shown.count("L3  h1") == 3
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 1000
        dark = np.asarray(image.convert("L")) < 90
        assert 0.002 < dark.mean() < 0.5


def test_the_command_takes_a_prompt_and_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT, encoding="utf-8")
    command = ["bench", "kept", "--prompt-file", str(prompt), "--methods", "random", "--budget", "12"]
    assert main([*command, "--mark", "red ball"]) == 0
    shown = capsys.readouterr().out
    assert "random: 12 of" in shown and "▼" in shown
    assert main([*command]) == 0
    assert "▼" not in capsys.readouterr().out
    assert main([*command, "--mark", "green"]) == 2
    assert "mark 'green' does not occur in the prompt" in capsys.readouterr().err
    assert main([*command, "--methods", "lacache", "--budget", "7"]) == 2
    assert "lacache: 7 entries per head (a prompt of" in capsys.readouterr().err
