"""The mask of a cache as lines, as a picture, as JSON and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import restkv
from bench.quality.mask import Mask, masks, terminal
from make.small import small_ids, small_lm
from modeling.occupancy import Blocks, PageList
from restkv.cli import main


def example() -> Mask:
    """Two layers of one head over nine pages: one list that holds a dead, a full and a half page, and one with a single entry."""
    first = PageList((3, 1, 2, 5), (4, 4, 4, 0), (0, 4, 2, 0), 4, 9)
    return Mask("some", 30, 5, ((first,), (PageList((8,), (1,), (1,), 4, 9),)))


def test_the_map_has_a_line_per_head_over_the_pages_of_the_pool() -> None:
    title, head, first, second = (line.plain for line in terminal(example(), 80))
    assert title == (
        "some, 30 tokens read and 5 decoded: 3 of 5 pages on the lists are read (4 slots each), 83% of the pool's blocks are "
        "skipped, 46% of the slots written are dead, 4 entries alive per KV head"
    )
    assert head.split() == ["pages", "read/held", "dead", "alive", "skipped"]
    assert first == "L0  h0   █▒· ·            2/4   50%       6     78%"
    assert second == "L1  h0          ░         1/1    0%       1     89%"


def test_a_narrow_line_stands_for_several_pages_a_letter() -> None:
    *_, first, second = (line.plain for line in terminal(example(), 8 + 34 + 3))
    assert (
        first[8:13] == "▓·   "
    )  # pages 0 to 2, of which two are held, at three quarters; 3 to 5, two held, nothing alive
    assert second[8:13] == "  ░  "
    assert all(len(line) <= 45 + 2 for line in (first, second))


def test_json_has_every_page_and_the_counts_of_all() -> None:
    told = json.loads(json.dumps(example().as_json()))
    assert (told["method"], told["prompt_tokens"], told["decoded_tokens"]) == ("some", 30, 5)
    assert told["blocks"] == {
        "pool": 18,
        "held": 5,
        "read": 3,
        "written": 13,
        "alive": 7,
        "skipped": 15,
        "skipped_held": 2,
        "dead_share": pytest.approx(6 / 13),
    }
    assert told["layers"][0][0]["pages"] == [3, 1, 2, 5] and told["layers"][1][0]["blocks"]["skipped"] == 8


def test_masks_are_of_the_cache_that_decoding_would_go_on_with() -> None:
    policies = [("h2o", restkv.H2O(budget=16, recent=4)), ("all", restkv.FullCache())]
    marked, full = masks(small_lm(), small_ids(30), policies, 7)
    assert marked.blocks.alive == 16 * len(marked.lists) and marked.blocks.written == 23 * len(marked.lists)
    assert full.blocks == Blocks(full.blocks.pool, full.blocks.held, full.blocks.read, *[37 * len(full.lists)] * 2)


def test_inspect_mask_shows_lines_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "mask.png"
    command = ["--length", "200", "--budget", "20", "--methods", "h2o,snapkv", "--tokens", "9"]
    assert main(["inspect", "--mask", *command, "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("L3  h1") == 2 and "h2o, " in shown and "9 decoded" in shown and "blank: not on" in shown
    with Image.open(picture) as image:
        assert image.format == "PNG" and (np.asarray(image.convert("L")) < 90).mean() > 0.01
    assert main(["bench", "mask", *command, "--json"]) == 0
    h2o, snapkv = json.loads(capsys.readouterr().out)["masks"]
    assert h2o["blocks"]["dead_share"] == pytest.approx(9 / 29) and snapkv["blocks"]["dead_share"] == 0
    assert main(["inspect", "--mask", "--tokens", "-1"]) == 2
    assert "--tokens" in capsys.readouterr().err
    assert main(["inspect", "--mask", "--out", str(tmp_path / "no" / "mask.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
