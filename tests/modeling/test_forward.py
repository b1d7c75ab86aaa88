"""Forward passes against transformers, every family: dense prefill, chunks and single tokens over pages, eager and compiled.

Letters: B batch rows, T new tokens, L prompt length, V vocabulary, H query heads, W remembered queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor

from make.effort import IN_CI
from make.families import CASES, POSITIONS, logits_of_pieces, prompt_ids, reference_logits
from make.small import small_ids, small_model
from modeling import layers
from modeling.cache import KVCache
from modeling.checkpoint.loading import load_model
from modeling.forward import dense_layer, extend, side_layer, step
from modeling.layers import WIDENED_ROWS, Decoder
from restkv.engine import Engine
from restkv.lm import LM
from restkv.policies import FullCache
from restkv.reading import embed
from restkv.session import Session

PROMPT = 40  # tokens prefilled before decoding starts: fewer than any trained length, more than some windows
DYNAMIC = "llama_dynamic"  # its keys depend on how many tokens were known when they were made

# Compiled on every run: alternating windows and soft caps; G = 7 with biases; two ropes, q/k norm and head_dim 256.
FLEX_FAST = ["gemma2", "qwen2", "gemma3"]
# Not compiled under CI: other cases have their shapes, windows, caps and biases, and their ropes differ in numbers alone.
ALIKE = ["llama3", "llama_yarn_mscale", "llama_yarn_factor", "mistral_v03", "gemma2_uncapped", "qwen25_yarn"]
VARIED = [n for n in CASES if not IN_CI or n not in ALIKE]
FLEX = [pytest.param(n, marks=[] if n in FLEX_FAST else pytest.mark.slow) for n in VARIED]
FLEX_CHUNKS = ["gemma2", "llama31", "gemma3_capped", "qwen2_window", DYNAMIC]
FLEX_BFLOAT16 = ["gemma2", "llama2", "gemma1", "qwen3_window"]


def largest_gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def reference(tiny) -> Callable[..., Tensor]:
    """reference(name, pieces=None, dtype=float32): transformers' logits [L, V], in one pass or in pieces over its cache."""
    made: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def compute(name: str, pieces: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
        model = tiny(name).reference
        if dtype != torch.float32:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tiny(name).folder, dtype=dtype, attn_implementation="eager"
            )
        ids = prompt_ids()
        if pieces is None:
            return reference_logits(model, ids)
        model(ids[None, :1], use_cache=False)  # a dynamic rope keeps the longest length it has met: make it forget
        return logits_of_pieces(model, ids.split(list(pieces))).float()

    def get(name: str, pieces: Sequence[int] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        key = name, tuple(pieces) if pieces and name == DYNAMIC else None, dtype
        if key not in made:
            made[key] = compute(*key)
        return made[key]

    return get


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@torch.no_grad()
def decoded(model: Decoder, backend: str) -> Tensor:
    """Logits of positions PROMPT - 1 ... POSITIONS - 1: a dense prefill, then token by token over pages."""
    ids = prompt_ids().tolist()
    session = Session(Engine(model, backend), FullCache(), [PROMPT], POSITIONS - PROMPT)
    session.prefill([ids[:PROMPT]])
    logits = [session.logits_BV]
    for token in ids[PROMPT:]:
        session.feed(torch.tensor([token]))
        logits.append(session.logits_BV)
    return torch.cat(logits)


def cache_for(model: Decoder, rows: int, entries: int, window: int = 0) -> KVCache:
    c = model.config
    return KVCache.create(
        windows=c.windows,
        rows=rows,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        dtype=model.dtype,
        device=model.device,
        entries=entries,
        page=32,
        ring_size=window,
    )


def agrees_where_sure(got: Tensor, want: Tensor) -> bool:
    """Top-1 agrees wherever the reference's two best are more than 0.1 apart."""
    best2 = want.topk(2).values
    sure = best2[:, 0] - best2[:, 1] > 0.1
    assert sure.sum() > len(want) / 3
    return torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


@pytest.mark.parametrize("name", CASES)
def test_dense_prefill_is_transformers(name, tiny, reference):
    lm = LM(load_model(tiny(name).folder), None, "sdpa")
    logits = lm.logits(prompt_ids().tolist())
    assert logits.dtype == torch.float32
    assert largest_gap(logits, reference(name)) < 1e-4


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_chunks_over_pages_are_transformers(name, tiny, reference):
    model, pieces = load_model(tiny(name).folder), [1, 40, 7, 100, 152]
    cache = cache_for(model, 1, POSITIONS)
    got, start = [], 0
    for ids in prompt_ids().split(pieces):
        pos_1T = torch.arange(start, start := start + len(ids), dtype=torch.int32)[None]
        got.append(model.head(extend(model, cache, ids[None], pos_1T))[0])
    assert largest_gap(torch.cat(got), reference(name, pieces)) < 1e-4
    assert cache.next_pos.tolist() == [POSITIONS]


@pytest.mark.parametrize("name", CASES)
def test_decoding_over_pages_is_transformers(name, tiny, reference):
    want = reference(name, [PROMPT] + [1] * (POSITIONS - PROMPT))
    assert largest_gap(decoded(load_model(tiny(name).folder), "sdpa"), want[PROMPT - 1 :]) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_prefill_agrees_wherever_transformers_is_sure(name, tiny, reference):
    lm = LM(load_model(tiny(name).folder, dtype=torch.bfloat16), None, "sdpa")
    assert agrees_where_sure(lm.logits(prompt_ids().tolist()), reference(name, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
def test_bfloat16_decoding_agrees_wherever_transformers_is_sure(name, tiny, reference):
    want = reference(name, [PROMPT] + [1] * (POSITIONS - PROMPT), torch.bfloat16)
    got = decoded(load_model(tiny(name).folder, dtype=torch.bfloat16), "sdpa")
    assert agrees_where_sure(got, want[PROMPT - 1 :])


@pytest.mark.parametrize("name", FLEX)
def test_compiled_decoding_is_transformers(name, tiny, reference):
    want = reference(name, [PROMPT] + [1] * (POSITIONS - PROMPT))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert largest_gap(decoded(load_model(tiny(name).folder), "flex"), want[PROMPT - 1 :]) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("name", [FLEX_CHUNKS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in FLEX_CHUNKS[1:])])
@torch.no_grad()
def test_compiled_chunks_are_transformers(name, tiny, reference):
    """Two rows: one takes 50 tokens a step, the other 20 and padding, and ends three steps earlier."""
    model, width = load_model(tiny(name).folder), 50
    takes, ids = (width, 20), prompt_ids()
    cache = cache_for(model, 2, POSITIONS)
    run = torch.compile(step, fullgraph=True, dynamic=False)
    got: tuple[list, list] = [], []
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for turn in range(POSITIONS // width):
        real = [take if row == 0 or turn < 3 else 0 for row, take in enumerate(takes)]
        start_B1 = torch.tensor([[turn * take] for take in takes])
        offset_T = torch.arange(width)
        pos_BT = torch.where(offset_T < torch.tensor(real)[:, None], start_B1 + offset_T, -1).int()
        ids_BT = ids[(start_B1 + offset_T).clamp(max=POSITIONS - 1)]
        cache.reserve(width)
        x_BTE = run(model, ids_BT, pos_BT, cache.lag, cache.views(), cache.queries, 0, "flex")
        assert x_BTE.isfinite().all()
        for row, count in enumerate(real):
            got[row].append(model.head(x_BTE[row, :count]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert largest_gap(torch.cat(got[0]), reference(name, [width] * 6)) < 1e-4
    if name != DYNAMIC:
        assert largest_gap(torch.cat(got[1]), reference(name)[:60]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", FLEX_BFLOAT16)
def test_compiled_bfloat16_decoding_agrees_wherever_transformers_is_sure(name, tiny, reference):
    got = decoded(load_model(tiny(name).folder, dtype=torch.bfloat16), "flex")
    assert agrees_where_sure(got, reference(name, dtype=torch.bfloat16)[PROMPT - 1 :])


@torch.no_grad()
def test_a_long_prompt_is_projected_in_pieces_and_nothing_shows():
    model = small_model(windows=(5, None), group=3)
    ids_1L = torch.tensor([small_ids(33)])
    pos_1L = torch.arange(33)[None]
    for block in model.blocks:
        whole, pieces = model.embed(ids_1L)[0].clone(), model.embed(ids_1L)[0].clone()
        rotary = model.rotary(pos_1L, torch.tensor([33]))
        a = dense_layer(model, block, whole, rotary, last=12)[:3]
        b = dense_layer(model, block, pieces, rotary, last=12, chunk=7)[:3]
        assert [t.shape[1] for t in a] == [12, 33, 33]
        for one, other in zip((whole, *a), (pieces, *b), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 12, [3, 1, 4, 4], [12]])
@torch.no_grad()
def test_the_last_queries_are_remembered_whatever_the_step(pieces):
    """Row 1 is always two tokens behind: its steps carry padding."""
    model, W = small_model(), 4
    ids = torch.tensor(small_ids(12))
    cache = cache_for(model, 2, 12, window=W)
    start = 0
    for count in pieces:
        pos_T = torch.arange(start, start := start + count, dtype=torch.int32)
        behind_T = torch.where(pos_T < 10, pos_T, -1)
        extend(model, cache, ids[pos_T][None].expand(2, -1), torch.stack([pos_T, behind_T]))
    for row, length in enumerate((12, 10)):
        x_LE, pos_1L = model.embed(ids[None, :length])[0].clone(), torch.arange(length)[None]
        rotary = model.rotary(pos_1L, torch.tensor([length]))
        for index, block in enumerate(model.blocks):
            want_HWD = dense_layer(model, block, x_LE, rotary, last=W)[0]
            q_BHWD, q_pos_BW = cache.recent(index)
            assert q_pos_BW[row].tolist() == list(range(length - W, length))
            assert torch.allclose(q_BHWD[row], want_HWD, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, WIDENED_ROWS, 3 * WIDENED_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_widened_products_are_the_exact_ones_rounded_once(dtype, rows, bias, monkeypatch):
    """On a CPU that multiplies the dtype itself, nothing is widened: the switch is set by hand."""
    monkeypatch.setitem(layers.NATIVE_ON_CPU, dtype, False)
    monkeypatch.setattr(layers, "WIDENED_WEIGHTS", 24 * 10)  # 37 outputs: three pieces of 10, one of 7
    random = torch.Generator().manual_seed(rows)
    x_B1E, weight, bias_O = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((rows, 1, 24), (37, 24), (37,))
    )
    y = layers.linear(x_B1E, weight, bias_O if bias else None)
    exact = x_B1E.double() @ weight.double().T + (bias_O.double() if bias else 0.0)
    assert y.dtype == dtype and y.shape == (rows, 1, 37)
    if rows >= WIDENED_ROWS:
        # Rounding to nearest errs by half a unit in the last place; the sum in float32 may tip a tie.
        torch.testing.assert_close(y.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    else:
        torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 5, 64])  # parts of one row, of unequal length, of equal length
def test_a_compiled_product_of_one_row_is_the_product(dtype, outputs):
    torch._dynamo.reset()
    random = torch.Generator().manual_seed(outputs)
    shapes = ((1, 1, 40), (outputs, 40), (outputs,))
    x_11E, weight, bias_O = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    y = torch.compile(layers.linear, fullgraph=True, dynamic=False)(x_11E, weight, bias_O)
    exact = x_11E.double() @ weight.double().T + bias_O.double()
    assert y.dtype == dtype and y.shape == (1, 1, outputs)
    torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=10 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_text_beside_a_prompt_is_as_if_it_went_on_and_keeps_nothing_of_the_prompt_alive():
    """In any chunks. Its keys and values are copies: one prompt may have a thousand texts beside it."""
    model, ids = small_model(windows=(None, 7)), small_ids(50)
    for chunk in (1024, 4):
        (x_LE, rotary), (x_TE, later), (both, all_of) = (
            embed(model, ids[:40]),
            embed(model, ids[40:], 40),
            embed(model, ids),
        )
        for block in model.blocks:
            _, k_KLD, v_KLD, _ = dense_layer(model, block, x_LE, rotary, 1)
            parts = side_layer(model, block, x_TE, later, k_KLD, v_KLD, chunk)
            q_HWD, *whole, _ = dense_layer(model, block, both, all_of, 10)
            for mine, theirs in zip(parts, (q_HWD, *(x[:, 40:] for x in whole)), strict=True):
                assert largest_gap(mine, theirs) < 1e-4
            assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
        assert largest_gap(x_TE, both[40:]) < 1e-4
