"""Counts of pages against lists made by hand, and against the dense mask of every slot.

Letters: R = B*K lists, p slots of a page.
"""

from __future__ import annotations

import pytest
import torch

import restkv
from make.small import small_ids, small_model
from modeling.masks import visible
from modeling.occupancy import Blocks, PageList, cache_lists, page_lists, total
from modeling.pages import LayerCache
from modeling.pool import PagePool
from restkv.lm import LM
from restkv.session import Session

PAGE = 4


def layer_by_hand() -> LayerCache:
    """Two lists over six pages of four slots: [5, 2, 4], 9 slots written, and [1], none; pages 0, 3 and 6 are on neither."""
    layer = LayerCache(PagePool(6, PAGE, 2, torch.float32, torch.device("cpu")), rows=1, heads=2)
    layer.lists = [[5, 2, 4], [1]]
    layer.used.copy_(torch.tensor([9, 0]))
    pos = layer.pool.pos.view(-1, PAGE)
    pos[5] = torch.tensor([0, -1, 7, 8])
    pos[2] = torch.tensor([-1, -1, -1, -1])  # all evicted
    pos[4] = torch.tensor([12, 99, -1, -1])  # the second lies beyond the nine written
    pos[3] = torch.tensor([1, 2, 3, 4])  # somebody else's
    return layer


def test_lists_made_by_hand_are_counted() -> None:
    first, second = page_lists(layer_by_hand())
    assert first == PageList(pages=(5, 2, 4), written=(4, 4, 1), alive=(3, 0, 1), page=4, pool=7)
    assert first.blocks == Blocks(pool=7, held=3, read=2, written=9, alive=4)
    assert (first.blocks.skipped, first.blocks.skipped_held) == (5, 1)
    assert first.blocks.dead_share == pytest.approx(5 / 9)
    assert second == PageList(pages=(1,), written=(0,), alive=(0,), page=4, pool=7)
    assert second.blocks == Blocks(7, 1, 0, 0, 0) and second.blocks.dead_share == 0
    assert total(one.blocks for one in (first, second)) == Blocks(14, 4, 2, 9, 4)


def test_an_empty_list_has_nothing() -> None:
    layer = layer_by_hand()
    layer.lists[1] = []
    assert page_lists(layer)[1].blocks == Blocks(7, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "policy",
    [
        restkv.H2O(budget=20, recent=4),
        restkv.TOVA(budget=20),
        restkv.StreamingLLM(budget=20, positions="original"),
        restkv.SnapKV(budget=20, window=4, granularity="query", interval=3),
        restkv.ReSTKV(budget=20, window=4, interval=8),
    ],
    ids=lambda policy: policy.name,
)
def test_pages_read_are_those_where_the_dense_mask_has_anything(policy: restkv.Policy) -> None:
    """Two rows, after a prompt, and after tokens that were marked and compacted."""
    lm = LM(small_model(windows=(None, None, None)), None)
    session = Session(lm.engine, policy, [40, 25], 80)
    session.prefill([small_ids(40), small_ids(25, seed=1)])
    dead = []
    for decoded in (0, 11, 30):  # so many more each time
        for _ in range(decoded):
            session.feed(session.logits_BV.argmax(-1))
        for row in range(2):
            layers = cache_lists(session.cache, row)
            for layer, lists in zip(session.cache.layers, layers, strict=True):
                for head, one in enumerate(lists):
                    assert one == dense_list(layer, row * layer.heads + head, int(session.cache.next_pos[row]))
            blocks = total(one.blocks for lists in layers for one in lists)
            assert blocks.alive == int(sum(layer.live_counts()[row].sum() for layer in session.cache.layers))
            dead.append(blocks.dead_share)
    assert dead[:2] == [0, 0]  # what a prompt loses is never stored
    assert (max(dead) > 0.1) == (policy.interval != 8)  # marked


def dense_list(layer: LayerCache, index: int, next_pos: int) -> PageList:
    """One list, slot by slot: what the next token may see of the pool, if it is among the entries of the list."""
    pool, used = layer.pool, int(layer.used[index])
    seen = visible(pool.pos, torch.tensor(next_pos), None).tolist()
    pages = layer.lists[index]
    written, alive = [0] * len(pages), [0] * len(pages)
    for entry in range(used):
        slot = pages[entry // pool.page] * pool.page + entry % pool.page
        written[entry // pool.page] += 1
        alive[entry // pool.page] += seen[slot]
    return PageList(tuple(pages), tuple(written), tuple(alive), pool.page, pool.num_pages)
