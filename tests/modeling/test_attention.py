"""Paged attention: compiled flex = eager SDPA = a float64 loop, over page lists of every ugly kind.

Letters: B batch rows, K KV heads, G query heads per KV head, H = K*G, T new tokens, D head dim, R = B*K lists, C columns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from make.small import small_ids, small_model
from modeling import attention
from modeling.attention import (
    CAPPED_LOGITS,
    MASKED_PAIRS,
    branched_attention,
    causal_attention,
    masked_attention,
    paged_attention,
)
from modeling.cache import UNBOUNDED
from modeling.masks import visible
from modeling.pages import LayerCache
from modeling.pool import Companions, PagePool
from restkv.engine import Engine
from restkv.meter import PeakMemory
from restkv.policies import FullCache
from restkv.session import Session

CPU = torch.device("cpu")
MAX_PAGES = 4  # per list


@dataclass(frozen=True)
class Shape:
    """What a compiled graph is specialised to."""

    B: int
    K: int
    G: int
    T: int
    D: int
    page: int = 32
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    windowed: bool = False
    query_sets: bool = False
    biased: bool = False

    def __str__(self) -> str:
        extras = [str(self.dtype).removeprefix("torch."), f"cap{self.softcap}" if self.softcap else ""]
        extras += [name for name in ("windowed", "query_sets", "biased") if getattr(self, name)]
        return "-".join([f"B{self.B}K{self.K}G{self.G}T{self.T}D{self.D}p{self.page}", *filter(None, extras)])


class Scene:
    """Random lists over a pool, and a record of what is alive on each: [(pos, k, v, bits, bias)].

    Pages lie scattered, heads hold different numbers of entries (none, exactly a page, ...), entries are dead one by one and
    by whole pages, windows, positions and magnitudes vary, and whatever is not alive is huge.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        s, dice = shape, random.Random(seed)
        random_ = torch.Generator().manual_seed(seed)
        lists = s.B * s.K
        keep: Companions = {"keep": ((s.G,), torch.bool)} if s.query_sets else {}
        companions: Companions = {**keep, **({"bias": ((), torch.float32)} if s.biased else {})}
        pool = PagePool(lists * MAX_PAGES, s.page, s.D, s.dtype, CPU, companions)
        scattered = pool.take(lists * MAX_PAGES)
        dice.shuffle(scattered)
        for page in scattered:
            pool.release([page])
        self.window = dice.choice([1, 5, s.page, 3 * s.page, None]) if s.windowed else None
        reach = torch.tensor([self.window or UNBOUNDED], dtype=torch.int32) if s.windowed else None
        self.cache = LayerCache(pool, s.B, s.K, True, reach)

        # All keys of a steep scene point away from all its queries: logits near -150, where a maximum that starts at 0 fails.
        steep = dice.random() < 0.3
        away_D = torch.nn.functional.normalize(torch.randn(s.D, generator=random_), dim=0)
        columns = MAX_PAGES * s.page
        self.record = []
        for row in range(s.B):
            shape_KC = s.K, columns
            k_KCD, v_KCD = (torch.randn(*shape_KC, s.D, generator=random_) for _ in range(2))
            if steep:
                k_KCD = k_KCD * 0.1 - 15 * away_D
            k_KCD, v_KCD = k_KCD.to(s.dtype), v_KCD.to(s.dtype)
            pos_KC = torch.rand(s.K, 3 * columns, generator=random_).argsort(-1)[:, :columns].sort(-1).values
            counts = [dice.choice([0, 1, s.page, s.page + 1, columns, dice.randint(0, columns)]) for _ in range(s.K)]
            keep_KC = torch.arange(columns) < torch.tensor(counts)[:, None]
            bits_KCG = torch.rand(*shape_KC, s.G, generator=random_) < 0.6
            bias_KC = 3 * torch.randn(shape_KC, generator=random_)
            self.cache.append(row, k_KCD, v_KCD, pos_KC, keep_KC, {"keep": bits_KCG, "bias": bias_KC})
            if not s.query_sets:
                bits_KCG = torch.ones_like(bits_KCG)
            if not s.biased:
                bias_KC = torch.zeros_like(bias_KC)
            for head, count in enumerate(counts):
                k_CD, v_CD = k_KCD[head].double(), v_KCD[head].double()
                entries = zip(pos_KC[head].tolist(), k_CD, v_CD, bits_KCG[head], bias_KC[head].double(), strict=True)
                self.record.append(list(entries)[:count])
        drop_RC = torch.rand(lists, max(map(len, self.record)), generator=random_) < dice.choice([0, 0.3, 0.9])
        for r in range(lists):
            if dice.random() < 0.3:
                first = dice.randrange(MAX_PAGES) * s.page
                drop_RC[r, first : first + s.page] = True
        self.cache.mark(drop_RC)
        self.record = [
            [entry for entry, gone in zip(entries, drop.tolist(), strict=False) if not gone]
            for entries, drop in zip(self.record, drop_RC, strict=True)
        ]

        last = [dice.choice([columns, 3 * columns]) for _ in range(s.B)]
        real = [dice.choice([0, 1, s.T, s.T]) for _ in range(s.B)]
        self.q_pos_BT = torch.tensor(
            [[last[b] + t if t < min(real[b], s.T) else -1 for t in range(s.T)] for b in range(s.B)], dtype=torch.int32
        )
        q_BTHD = torch.randn(s.B, s.T, s.K * s.G, s.D, generator=random_)
        q_BTHD = q_BTHD * 0.1 + 20 * away_D if steep else q_BTHD * 4 * s.D**-0.5
        self.q_BTHD = q_BTHD.to(s.dtype)
        self.shape, self.scale = shape, 0.5
        self.poison(1e4)

    def poison(self, size: float) -> None:
        """Fill every slot without a live entry, on listed pages, on free ones and on page 0, with huge numbers."""
        pool = self.cache.pool
        dead_S = pool.pos < 0
        sign_SD = 1 - 2 * (torch.arange(int(dead_S.sum()))[:, None] + torch.arange(self.shape.D)).fmod(2)
        pool.k[0, 0, dead_S] = (size * sign_SD).to(pool.k.dtype)
        pool.v[0, 0, dead_S] = (-size * sign_SD).to(pool.k.dtype)
        if "keep" in pool.companions:
            pool.companions["keep"][dead_S] = True
        if "bias" in pool.companions:
            pool.companions["bias"][dead_S] = size * sign_SD[:, 0]

    def arguments(self, backend: str) -> tuple[tuple, dict]:
        named = {"scale": self.scale, "softcap": self.shape.softcap, "backend": backend}
        return (self.q_BTHD, self.cache.view(), self.q_pos_BT), named

    def oracle(self) -> Tensor:
        """Softmax over what may be seen, one query at a time, in float64; zeros where nothing may."""
        s = self.shape
        out = torch.zeros(s.B, s.T, s.K * s.G, s.D, dtype=torch.float64)
        for b, t in torch.nonzero(self.q_pos_BT >= 0).tolist():
            at = int(self.q_pos_BT[b, t])
            for h in range(s.K * s.G):
                entries = self.record[b * s.K + h // s.G]
                far = -1 if self.window is None else at - self.window
                seen = [(k, v, bias) for pos, k, v, bits, bias in entries if far < pos <= at and bits[h % s.G]]
                if seen:
                    keys, values, biases = (torch.stack(x) for x in zip(*seen, strict=True))
                    logits = keys @ self.q_BTHD[b, t, h].double() * self.scale
                    if s.softcap is not None:
                        logits = s.softcap * torch.tanh(logits / s.softcap)
                    out[b, t, h] = (logits + biases).softmax(0) @ values
        return out


FAST = [
    Shape(B=2, K=2, G=1, T=1, D=16),
    Shape(B=1, K=2, G=3, T=3, D=16, softcap=5.0, windowed=True, query_sets=True),
    Shape(B=2, K=1, G=7, T=1, D=64, page=128, dtype=torch.bfloat16, windowed=True),
    Shape(B=2, K=2, G=3, T=1, D=16, windowed=True, biased=True),
]
SLOW = [
    Shape(B=1, K=2, G=2, T=1, D=64, windowed=True),
    Shape(B=3, K=1, G=4, T=1, D=80, query_sets=True),
    Shape(B=1, K=1, G=5, T=4, D=96, page=64),
    Shape(B=1, K=1, G=6, T=1, D=128, page=128, dtype=torch.bfloat16, softcap=20.0),
    Shape(B=2, K=2, G=8, T=1, D=256, windowed=True, softcap=30.0),
    Shape(B=1, K=2, G=3, T=50, D=16, windowed=True, query_sets=True),
    Shape(B=2, K=2, G=4, T=2, D=32, dtype=torch.float16),
    Shape(B=1, K=2, G=2, T=3, D=32, page=64, dtype=torch.bfloat16, softcap=20.0, biased=True),
]
SHAPES = [pytest.param(s, id=str(s)) for s in FAST] + [pytest.param(s, id=str(s), marks=pytest.mark.slow) for s in SLOW]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def largest_gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield torch.compile(paged_attention, fullgraph=True, dynamic=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES)
def test_flex_is_sdpa_is_the_loop_and_no_data_recompiles(shape, compiled):
    before = graphs()
    saw_nothing = 0
    for seed in range(25):
        scene = Scene(shape, seed)
        want = scene.oracle()
        real_BT = scene.q_pos_BT >= 0
        for backend, attend in (("sdpa", paged_attention), ("flex", compiled)):
            args, named = scene.arguments(backend)
            got = attend(*args, **named)
            assert got.isfinite().all(), (backend, seed)
            assert largest_gap(got[real_BT], want[real_BT]) < TOLERANCE[shape.dtype], (backend, seed)
        saw_nothing += int((want[real_BT] == 0).all(-1).sum())
    assert saw_nothing, "no query of these scenes was left with nothing to see"
    assert graphs() - before == 1


@pytest.mark.parametrize("shape", [FAST[1]], ids=str)
def test_nothing_reads_a_slot_without_a_live_entry(shape, compiled):
    """Finite numbers of any size in dead, free and padding slots leave every bit of the result alone."""
    for seed in range(12):
        scene = Scene(shape, seed)
        for backend, attend in (("sdpa", paged_attention), ("flex", compiled)):
            results = []
            for size in (0.0, 1.0, 1e4, 1e30):
                scene.poison(size)
                args, named = scene.arguments(backend)
                results.append(attend(*args, **named))
            assert all(torch.equal(results[0], other) for other in results[1:]), (backend, seed)


@pytest.mark.parametrize("window", [None, 1, 6, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("T", "start"), [(17, 0), (9, 8), (1, 16)])
def test_dense_attention_of_a_prompt_is_the_loop(T, start, softcap, window):
    K, G, D = 2, 3, 8
    random_ = torch.Generator().manual_seed(0)
    q_THD = torch.randn(T, K * G, D, generator=random_)
    k_KCD, v_KCD = (torch.randn(K, 20, D, generator=random_) for _ in range(2))
    got = causal_attention(q_THD, k_KCD, v_KCD, start, scale=0.7, softcap=softcap, window=window)
    for t in range(T):
        at = start + t
        first = 0 if window is None else max(0, at - window + 1)
        for h in range(K * G):
            logits = k_KCD[h // G, first : at + 1].double() @ q_THD[t, h].double() * 0.7
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            want_D = logits.softmax(0) @ v_KCD[h // G, first : at + 1].double()
            assert largest_gap(got[t, h], want_D) < 1e-5


@pytest.mark.parametrize("logits", [1, 300, 1 << 22])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_texts_that_go_on_from_one_prompt_attend_as_each_would_alone(monkeypatch, logits, window, softcap):
    """Whatever fits into a piece, and whatever lies in columns that a text has not reached."""
    monkeypatch.setattr(attention, "CAPPED_LOGITS", logits)
    B, K, G, T, L, N, D = 3, 2, 2, 3, 7, 9, 4
    k_KLD, v_KLD = torch.randn(2, K, L, D)
    own_k_KBND, own_v_KBND = torch.randn(2, K, B, N, D)
    q_BTHD, first_B = torch.randn(B, T, K * G, D), torch.tensor([0, 6, 2])
    how: dict[str, Any] = {"scale": 0.7, "softcap": softcap, "window": window}
    got_BTHD = branched_attention(q_BTHD, k_KLD, v_KLD, own_k_KBND, own_v_KBND, first_B, **how)
    for text, first in enumerate(first_B.tolist()):
        k_KCD, v_KCD = torch.cat([k_KLD, own_k_KBND[:, text]], 1), torch.cat([v_KLD, own_v_KBND[:, text]], 1)
        want_THD = causal_attention(q_BTHD[text], k_KCD, v_KCD, L + first, **how)
        assert largest_gap(got_BTHD[text], want_THD) < 1e-5


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_never_writes_out_all_logits_of_a_chunk(softcap):
    """Nor a mask per query head, nor a long chunk's mask; soft-capped attention, which has no fused kernel, goes a few queries at
    a time."""
    T, start, K, G, D = 1024, 7800, 2, 4, 8
    q_THD, k_KCD, v_KCD = torch.randn(T, K * G, D), torch.randn(K, start + T, D), torch.randn(K, start + T, D)
    with Largest() as largest:
        causal_attention(q_THD, k_KCD, v_KCD, start, scale=1.0, softcap=softcap, window=None)
    assert largest.numel <= (MASKED_PAIRS if softcap is None else CAPPED_LOGITS) < T * (start + T)
    seen_TC = torch.rand(T, start + T) < 0.5
    with Largest() as largest:
        masked_attention(q_THD.transpose(0, 1), k_KCD.repeat(G, 1, 1), v_KCD.repeat(G, 1, 1), seen_TC, 1.0, softcap)
    assert largest.numel < K * G * T * (start + T) / 4, "logits would be as many as this"


@pytest.mark.parametrize(("queries", "pairs"), [(1, 1), (3, 1), (1, 100), (5, 1000)])
def test_masked_attention_in_pieces_is_attention_at_once(queries, pairs, monkeypatch):
    q_THD, k_KCD, v_KCD = (torch.randn(shape, dtype=torch.float64) for shape in ((13, 6, 8), (2, 20, 8), (2, 20, 8)))
    how: dict[str, Any] = {"scale": 1.0, "softcap": None, "window": 9}
    at_once = causal_attention(q_THD, k_KCD, v_KCD, 7, **how)
    monkeypatch.setattr("modeling.attention.MASKED_QUERIES", queries)
    monkeypatch.setattr("modeling.attention.MASKED_PAIRS", pairs)
    assert largest_gap(causal_attention(q_THD, k_KCD, v_KCD, 7, **how), at_once) < 1e-12


@pytest.mark.parametrize("logits", [1, 100, 1000])
def test_soft_capped_attention_in_pieces_is_attention_at_once(logits, monkeypatch):
    q_THD, k_KCD, v_KCD = (torch.randn(shape, dtype=torch.float64) for shape in ((13, 6, 8), (2, 20, 8), (2, 20, 8)))
    how: dict[str, Any] = {"scale": 1.0, "softcap": 2.0, "window": 9}
    at_once = causal_attention(q_THD, k_KCD, v_KCD, 7, **how)
    monkeypatch.setattr("modeling.attention.CAPPED_LOGITS", logits)
    assert largest_gap(causal_attention(q_THD, k_KCD, v_KCD, 7, **how), at_once) < 1e-12


def test_eager_attention_over_lists_without_entries_is_zero():
    cache = LayerCache(PagePool(4, 8, 16, torch.float32, CPU), 1, 2)
    q_pos_BT = torch.tensor([[3, -1]], dtype=torch.int32)
    for softcap in (None, 5.0):
        out = paged_attention(
            torch.randn(1, 2, 4, 16), cache.view(), q_pos_BT, scale=1.0, softcap=softcap, backend="sdpa"
        )
        assert not out.any()


class Decoded:
    """A compiled and an eager session over the same tokens, in a pool so large that a copy of it would show.

    Every trap of docs/flexattention.md §1 and §7 that a decode step can fall into lies on its way: fused projections (bug 1),
    a folded q whose buffer was made for one token (bug 2), G = 3, layers with different windows in one nested region.
    """

    WINDOWS = (6, None, 3)
    TOKENS = 40

    @torch.no_grad()
    def __init__(self) -> None:
        torch._dynamo.reset()
        model = small_model(windows=self.WINDOWS, group=3, head_dim=16, hidden=32)
        prompt, tokens = small_ids(10), small_ids(self.TOKENS, seed=1)
        self.logits = {}
        for backend in ("sdpa", "flex"):
            session = Session(Engine(model, backend), FullCache(), [400_000], 40)  # a large pool
            session.prefill([prompt])
            pools = [layer.pool for layer in session.cache.layers]
            self.pool_bytes = pools[0].k.numel() * pools[0].k.element_size()
            steps = []
            for index, token in enumerate(tokens):
                if index == 2:  # compiled and warm
                    self.before = [(pool.k.data_ptr(), pool.v.data_ptr(), pool.pos.data_ptr()) for pool in pools]
                    resident, peak = psutil.Process().memory_info().rss, PeakMemory(CPU)
                session.feed(torch.tensor([token]))
                steps.append(session.logits_BV)
            self.extra_bytes = peak.bytes() - resident
            self.after = [(pool.k.data_ptr(), pool.v.data_ptr(), pool.pos.data_ptr()) for pool in pools]
            self.logits[backend] = torch.cat(steps)
            self.written = [sorted(pool.pos[pool.pos >= 0].tolist()) for pool in pools]


@pytest.fixture(scope="module")
def run():
    yield Decoded()
    torch._dynamo.reset()


def test_layers_with_different_windows_decode_as_the_eager_twin_does(run):
    assert largest_gap(run.logits["flex"], run.logits["sdpa"]) < 1e-4


def test_decoding_writes_into_a_large_pool_without_copying_it(run):
    """An indexed assignment instead of index_copy_ copies the pool in every step (docs/flexattention.md §1, bug 6, and §7)."""
    assert run.before == run.after
    assert run.written == [sorted([*range(50)] * 2)] * 3
    assert run.pool_bytes > 48e6
    assert run.extra_bytes < run.pool_bytes / 4


def masked_twice(window_of) -> float:
    """Gap between a compiled nested region run with windows None and 8, and a plain mask; window_of: what its mask asks."""

    class Layer(torch.nn.Module):
        def __init__(self, window: int | None) -> None:
            super().__init__()
            self.window = window

    columns, shape = 64, (1, 1, 64, 16)
    layers = [Layer(None), Layer(8)]
    random_ = torch.Generator().manual_seed(0)
    q_11TD, k_11CD = (torch.randn(shape, generator=random_) for _ in range(2))

    @torch.compiler.nested_compile_region
    def region(layer: Layer, q_11TD: Tensor, k_11CD: Tensor, pages: Tensor) -> Tensor:
        asked = window_of(layer)

        def mask(b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
            width = asked.window if isinstance(asked, Layer) else asked
            return visible(slot, q, width)

        block_mask = BlockMask.from_kv_blocks(
            torch.full_like(pages[..., 0], 2),
            pages,
            BLOCK_SIZE=(128, 32),
            mask_mod=mask,
            seq_lengths=(columns, columns),
            compute_q_blocks=False,
        )
        options: Any = {"PARTITION_SIZE": 31}
        return flex_attention(q_11TD, k_11CD, k_11CD, block_mask=block_mask, scale=1.0, kernel_options=options)

    def both(q_11TD: Tensor, k_11CD: Tensor, pages: Tensor) -> Tensor:
        for layer in layers:
            q_11TD = region(layer, q_11TD, k_11CD, pages)
        return q_11TD

    torch._dynamo.reset()
    pages = torch.arange(2, dtype=torch.int32).view(1, 1, 1, 2)
    got = torch.compile(both, fullgraph=True, dynamic=False)(q_11TD, k_11CD, pages)
    torch._dynamo.reset()
    at_C = torch.arange(columns)
    for layer in layers:
        seen_TC = visible(at_C, at_C[:, None], layer.window)
        q_11TD = F.scaled_dot_product_attention(q_11TD, k_11CD, k_11CD, attn_mask=seen_TC, scale=1.0)
    return largest_gap(got, q_11TD)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="measured on torch 2.13")
def test_a_nested_region_serves_all_layers_with_what_its_mask_read_from_the_first():
    """Why the window travels as a tensor. A number that the mask captured does make another region."""
    assert masked_twice(lambda layer: layer) > 0.1
    assert masked_twice(lambda layer: layer.window) < 1e-5
