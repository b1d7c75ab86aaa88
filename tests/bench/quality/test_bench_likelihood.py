"""What is scored without generating: three protocols of perplexity and the choice between answers, each against a slow twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import restkv
from bench.quality.corpus import Document, cut_windows, read_documents
from bench.quality.perplexity import Protocol, read
from bench.quality.teacher_forcing import score_choices, tail_logprobs
from bench.report.stats import Estimate, ratio_interval
from bench.runs.methods import parse_methods
from bench.runs.plans import Cell, cells_of, compressed, modes_of, share
from make.lines import jsonl
from make.small import small_ids, small_model
from modeling.layers import Decoder
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL
from restkv.errors import PromptError, RestKVWarning
from restkv.lm import LM
from restkv.policies import Policy
from restkv.session import Session
from restkv.testing.models import exact
from twins.stepwise import Row

MODEL: dict[str, Any] = {"seed": 3, "windows": (None, 23, None)}
LENGTH = 40  # tokens of a text


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(small_model(**MODEL), None)


@pytest.fixture(scope="module")
def twin() -> Decoder:
    return exact(small_model(**MODEL))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(RECALL)


# -- slow twins


@torch.no_grad()
def slow_logprobs(model: Decoder, ids: list[int], sees: Callable[[int, int], bool] = lambda t, j: True) -> Tensor:
    """Log-probability of ids[1:] in float64, dense, where the token at t attends to the earlier j that it `sees`."""
    pos_L = torch.arange(len(ids))
    seen_LC = torch.tensor([[j == t or (j < t and sees(t, j)) for j in range(len(ids))] for t in range(len(ids))])
    x_1LE = model.embed(torch.tensor([ids]))
    ropes = model.rotary(pos_L[None], torch.tensor([len(ids)]))
    for block in model.blocks:
        q_LHD, k_LKD, v_LKD = (t[0] for t in block.project(x_1LE, *ropes[block.rope]))
        mask_LC = seen_LC if block.window is None else seen_LC & (pos_L > pos_L[:, None] - block.window)
        o_LHD = torch.empty_like(q_LHD)
        for h in range(q_LHD.shape[1]):
            k_CD, v_CD = (t[:, h * t.shape[1] // q_LHD.shape[1]] for t in (k_LKD, v_LKD))
            logit_LC = (q_LHD[:, h] @ k_CD.T * model.config.attn_scale).masked_fill(~mask_LC, -torch.inf)
            o_LHD[:, h] = logit_LC.softmax(-1) @ v_CD
        x_1LE = block.finish(x_1LE, o_LHD[None])
    log_LV = model.head(x_1LE)[0].log_softmax(-1)
    return log_LV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def close(ours: Tensor, slow: Tensor) -> None:
    torch.testing.assert_close(ours.double(), slow, atol=3e-5, rtol=1e-5)


def read_by(lm: LM, protocol: str, policy: Policy, texts: list[list[int]], begun: int, chunk: int = 7) -> list[Tensor]:
    how = Protocol(protocol, LENGTH, begun, chunk)
    if protocol == "prefill":
        return [tail_logprobs(lm, [policy], ids[:begun], ids[begun:])[0][1] for ids in texts]
    return read(lm, policy, how, [ids[:begun] for ids in texts], [ids[begun:] for ids in texts])[1]


@pytest.mark.parametrize(("protocol", "begun"), [("streaming", 1), ("prefill", 25), ("chunked", 1)])
def test_the_full_cache_gives_the_dense_perplexity_in_every_protocol(
    lm: LM, twin: Decoder, protocol: str, begun: int
) -> None:
    texts = [small_ids(LENGTH, seed=1), small_ids(LENGTH, seed=2)]
    for ids, ours_T in zip(texts, read_by(lm, protocol, restkv.FullCache(), texts, begun), strict=True):
        close(ours_T, slow_logprobs(twin, ids)[begun - 1 :])


@given(budget=st.integers(4, 20), sinks=st.integers(0, 3), chunk=st.integers(1, 13), begun=st.integers(2, 30))
@settings(max_examples=4)
def test_sinks_and_newest_tokens_give_the_perplexity_of_masked_dense_attention(
    lm: LM, twin: Decoder, budget: int, sinks: int, chunk: int, begun: int
) -> None:
    policy = restkv.StreamingLLM(budget=budget, sinks=sinks, positions="original", interval=None)
    newest, ids = budget - sinks, small_ids(LENGTH, seed=4)

    def kept(start: int) -> Callable[[int], bool]:
        """What is left of the first `start` tokens."""
        return lambda j: j < sinks or j >= start - newest

    def by_chunks(t: int, j: int) -> bool:
        start = begun + (t - begun) // chunk * chunk if t >= begun else 0
        return j >= start or kept(start)(j)

    masks = {
        "streaming": lambda t, j: t < begun or kept(t)(j),
        "chunked": by_chunks,
        "prefill": lambda t, j: t < begun or j >= begun or kept(begun)(j),
    }
    for protocol, sees in masks.items():
        (ours_T,) = read_by(lm, protocol, policy, [ids], begun, chunk)
        close(ours_T, slow_logprobs(twin, ids, sees)[begun - 1 :])


@pytest.mark.parametrize(
    "policy",
    [
        restkv.H2O(budget=10),
        restkv.TOVA(budget=9),
        restkv.ReSTKV(budget=12, window=4, budget_by="uniform"),
        restkv.StreamingLLM(budget=9),
        restkv.LaCache(budget=14),
    ],
    ids=lambda policy: policy.name,
)
@torch.no_grad()
def test_streaming_is_reading_token_by_token_and_evicting_after_each(lm: LM, twin: Decoder, policy: Policy) -> None:
    """Two rows, in whatever interval the policy came; the twin evicts lists of entries by the papers' rules."""
    texts = [small_ids(24, seed=5), small_ids(24, seed=6)]
    for ids, ours_T in zip(texts, read_by(lm, "streaming", policy, texts, 1), strict=True):
        row = Row(twin, replace(policy, interval=1))
        logits = [row.prefill(ids[:1]), *(row.feed(token) for token in ids[1:-1])]
        close(ours_T, torch.stack([line.log_softmax(-1)[i] for line, i in zip(logits, ids[1:], strict=True)]).double())


@pytest.mark.parametrize("protocol", ["prefill", "chunked"])
@pytest.mark.parametrize(
    "policy",
    [
        restkv.H2O(budget=10),
        restkv.TOVA(budget=9),
        restkv.SnapKV(budget=12, window=4, granularity="query"),
        restkv.ReSTKV(budget=12, window=4, budget_by="uniform"),
        restkv.ReSTKV(budget=12, window=4, budget_by="uniform", aggregate="indicator", pooling="none"),
        restkv.StreamingLLM(budget=9),
        restkv.LaCache(budget=14),
    ],
    ids=lambda policy: policy.name,
)
@torch.no_grad()
def test_a_prefill_is_evicted_once_and_chunks_each_after_themselves(
    lm: LM, twin: Decoder, policy: Policy, protocol: str
) -> None:
    """The slow twin reads the same pieces: a context and a tail, or chunk by chunk from the first token."""
    ids, begun, chunk = small_ids(LENGTH, seed=8), 21, 6
    if protocol == "prefill":
        policy = replace(policy, interval=None)
        row = Row(twin, policy)
        (ours_T,) = read_by(lm, protocol, policy, [ids], begun)
        logits_TV = torch.cat([row.prefill(ids[:begun])[None], row.read_all(ids[begun:-1], LENGTH)])
        assert row.evictions == 0
    else:
        begun = 1
        (ours_T,) = read_by(lm, protocol, policy, [ids], begun, chunk)
        row = Row(twin, replace(policy, interval=1))
        logits_TV = torch.cat([row.prefill(ids[:begun])[None], row.read_all(ids[begun:], chunk)[:-1]])
        assert row.evictions > 1
    close(ours_T, logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[begun:])[:, None])[:, 0].double())


@pytest.mark.parametrize("question", [[], small_ids(5, seed=9)], ids=["aware", "agnostic"])
def test_answers_are_as_likely_as_teacher_forcing_each_policy_alone_says(
    lm: LM, twin: Decoder, question: list[int]
) -> None:
    prompt, choices = small_ids(30, seed=7), [[3], [5, 1, 8], [2, 2]]
    policies: list[Policy] = [
        restkv.FullCache(),
        restkv.ReSTKV(budget=12, window=4, interval=None),
        restkv.SnapKV(budget=9, window=3, interval=None),
        restkv.SnapKV(budget=9, window=3, granularity="query"),
        restkv.ReSTKV(budget=10, window=4, interval=None, budget_by="global"),
        restkv.H2O(budget=8),
        restkv.StreamingLLM(budget=9, interval=None),
    ]
    together = score_choices(lm, policies, prompt, question, choices)
    for policy, (held, logprobs) in zip(policies, together, strict=True):
        session = Session(lm.engine, policy, [len(prompt)], 9, extends=True, forks=1)
        with torch.no_grad():
            session.prefill([prompt])
            kept = [sum(row[0] for row in session.kept()) / lm.config.num_layers, session.cache.live_bytes]
            if question:
                session.extend([question])
        assert logprobs == pytest.approx(lm.score(session, choices), abs=5e-5)
        assert [held.kept, held.bytes] == pytest.approx(kept, abs=1e-3)
        if not question:
            assert logprobs == pytest.approx(lm.logprobs(prompt, choices, policy), abs=5e-5)
    _, full = together[0]
    for choice, told in zip(choices, full, strict=True):
        slow_T = slow_logprobs(twin, prompt + question + choice)
        assert told == pytest.approx(float(slow_T[-len(choice) :].sum()), abs=5e-5)
    # Policies that keep other things say other things.
    assert len({round(logprobs[1], 3) for _, logprobs in together}) > 4


def test_shares_and_compressions_of_a_prompt() -> None:
    assert [share(0.1, 47), share(0.5, 5), share(0.001, 5), share(12, 5), share(1.0, 47)] == [5, 2, 1, 12, 47]
    assert [compressed(64, 1000), compressed(2, 5), compressed(64, 10), compressed(1.0, 47)] == [16, 2, 1, 47]


def test_cells_are_every_method_at_every_budget_and_the_full_cache_once() -> None:
    full, method = parse_methods("snapkv@official")
    assert cells_of([full, method], [8, 0.5]) == [Cell(full, 1.0), Cell(method, 8), Cell(method, 0.5)]
    assert [cell.key for cell in cells_of([full, method], [8, 0.5])] == [
        "full/1",
        "snapkv@official/8",
        "snapkv@official/0.5",
    ]


def test_modes_of_a_question() -> None:
    assert [modes_of(question) for question in ("aware", "agnostic", "both")] == [
        ("aware",),
        ("agnostic",),
        ("aware", "agnostic"),
    ]
    with pytest.raises(PromptError, match="question 'maybe' is not known; choose from aware, agnostic, both"):
        modes_of("maybe")


# -- texts


def test_windows_share_no_token_and_say_how_much_text_they_score(tokenizer: Tokenizer) -> None:
    text = "The red hat is here. " * 30
    ids = tokenizer.encode(text, bos=False)
    windows = cut_windows(tokenizer, [Document("d", text)], 0, 10, len(ids) // 10)
    assert [window.start for window in windows] == list(range(0, len(ids) - 9, 10))
    for window in windows:
        assert window.prompt == tokenizer.encode("")  # recall-mini begins every prompt with one token
        assert window.scored == ids[window.start : window.start + 10]
        said = tokenizer.decode(window.scored)
        assert window.bytes == len(said.encode()) and window.words == len(said.split())
    context = cut_windows(tokenizer, [Document("d", text)], 13, 8, 3)
    assert [len(window.prompt) for window in context] == [13] * 3 and all(len(w.scored) == 8 for w in context)
    assert context[1].ids == tokenizer.encode("") + ids[context[1].start : context[1].start + 20]
    assert tokenizer.decode(context[1].scored).split() and context[1].words == len(
        tokenizer.decode(context[1].scored).split()
    )


def test_bytes_are_those_of_the_text_whatever_its_letters(tokenizer: Tokenizer) -> None:
    text = "Käse — 日本語のテキスト, naïve ☕ words; " * 4
    count = len(tokenizer.encode(text, bos=False))
    whole = cut_windows(tokenizer, [Document("d", text)], 0, count, 1)[0]
    assert (whole.bytes, whole.words) == (len(text.encode()), len(text.split()))
    parts = cut_windows(tokenizer, [Document("d", text)], 0, 1, count)
    assert sum(part.bytes for part in parts) == len(text.encode())


def test_a_tokenizer_without_a_beginning_scores_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    bare = Tokenizer.from_folder(RECALL)
    bare.__dict__["_prefix"] = []
    text = "The red hat is here. " * 3
    (window,) = cut_windows(bare, [Document("d", text)], 0, 8, 1)
    ids = bare.encode(text)
    assert (window.prompt, window.scored) == (ids[:1], ids[1:8])
    assert window.bytes == len(bare.decode(ids[1:8]).encode())


def test_texts_that_are_too_short_are_named_and_too_few_remarked_on(tokenizer: Tokenizer) -> None:
    document = Document("d", "The red hat is here. " * 5)
    with pytest.raises(PromptError, match=r"no text has the 500 tokens of a window \(the longest has \d+\)"):
        cut_windows(tokenizer, [document], 0, 500, 1)
    with pytest.warns(RestKVWarning, match="room for 2 windows of 12 tokens, not for 9"):
        assert len(cut_windows(tokenizer, [document], 0, 12, 9)) == 2


def test_documents_are_pages_or_joined_texts_or_files(tmp_path: Path) -> None:
    pages = jsonl(tmp_path / "b.jsonl", {"page": "one\n"}, {"page": " "}, {"page": "two", "text": "no"})
    lines = jsonl(tmp_path / "a.jsonl", {"text": " = Title = \n"}, "", {"text": ""}, {"text": "ä line\n", "id": 3})
    (tmp_path / "c.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "d.md").write_text("not read", encoding="utf-8")
    assert read_documents(pages) == [Document("b.jsonl:1", "one\n"), Document("b.jsonl:3", "two")]
    assert read_documents(lines) == [Document("a.jsonl", " = Title = \nä line\n")]
    everything = read_documents(tmp_path)
    assert [document.name for document in everything] == ["a.jsonl", "b.jsonl:1", "b.jsonl:3", "c.txt"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "a"}', "{"], r"x\.jsonl, line 2: not JSON"),
        (['{"text": "a"}', "[1]"], r"x\.jsonl, line 2: \[1\] is not an object"),
        (['{"texts": "a"}'], r"x\.jsonl, line 1: no field 'text'; the row has texts"),
        (['{"text": "a"}', '{"text": null}'], r"x\.jsonl, line 2: field 'text' is null, not text"),
        (['{"text": "a"}', '{"page": "b"}'], r"x\.jsonl: some rows have a page and some a text"),
        (['{"text": ""}'], r"x\.jsonl: no text in it"),
    ],
)
def test_odd_rows_of_texts_are_named_with_file_and_line(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_documents(jsonl(tmp_path / "x.jsonl", *rows))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\xff")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for path, message in (
        (tmp_path / "x.txt", r"x\.txt: not UTF-8 text \(byte 1\)"),
        (tmp_path / "none.txt", r"none\.txt: cannot be read"),
        (tmp_path / "none.parquet", r"none\.parquet: cannot be read"),
        (tmp_path / "x.parquet", r"x\.parquet: not \.txt or \.jsonl"),
    ):
        with pytest.raises(PromptError, match=message):
            read_documents(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match=r"empty: no \.txt and no \.jsonl file"):
        read_documents(tmp_path / "empty")


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (("gliding", 8), "protocol 'gliding' is not known; choose from streaming, prefill, chunked"),
        (("prefill", 8, 1), "context 1: give at least 2"),
        (("chunked", 8), "chunk 0: give at least 1"),
        (("streaming", 1), "tokens 1: give at least 2"),
    ],
)
def test_senseless_protocols_are_refused(protocol: tuple, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Protocol(*protocol)


def test_a_ratio_of_sums_and_its_interval() -> None:
    """4 nats over 2 words and 9 over 3: 13 / 5. A draw is one of 8/4, 13/5 (twice) and 18/6."""
    estimate = ratio_interval([4.0, 9.0], [2, 3])
    assert estimate == Estimate(2.6, 2.0, 3.0, 2)
    assert estimate.through(math.exp).mean == pytest.approx(math.exp(2.6))
