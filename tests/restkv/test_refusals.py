"""Calls that are refused in one line, and remarks on what may surprise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import restkv
from make.small import small_ids, small_lm
from modeling.errors import RestKVWarning
from restkv.errors import PolicyError, PromptError
from restkv.lm import LM, _backend
from restkv.policies import FullCache, ReSTKV, SnapKV
from restkv.session import Session


@pytest.fixture(scope="module")
def lm(stories260k) -> LM:
    return restkv.load(stories260k, backend="sdpa")


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt is empty"),
        ("", {}, "prompt is empty"),
        (["Once", ""], {}, "prompt is empty"),
        ([[1, 2], []], {}, "prompt is empty"),
        ([1, 512, 2], {}, "token id 512 at place 1"),
        ([1, -1], {}, "token id -1 at place 1"),
        ([[1], [3, 600]], {}, "token id 600 at place 1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"max_new_tokens": 10.0}, "max_new_tokens=10.0"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"temperature": 1.0, "seed": 1 << 64}, "seed=18446744073709551616"),
        ([1], {"stop": 7}, "stop=7 is no text"),
        ([1], {"stop": ""}, "stop='': an empty string"),
        ([1], {"stop": ["a", 7]}, r"stop=\['a', 7\] is no text"),
        ([1], {"prefill": "sparse"}, "prefill 'sparse'"),
        ([1], {"prefill": "chunked", "chunk": 0}, "chunk=0"),
        ([1], {"chunk": 1.5}, "chunk=1.5"),
        ([1], {"chunk": "a"}, "chunk='a'"),
        (b"abc", {}, "a prompt of 3 bytes"),
        ([b"abc"], {}, "a prompt of 3 bytes"),
        (bytearray(b"abc"), {}, "a prompt of 3 bytes"),
        (memoryview(b"abc"), {}, "a prompt of 3 bytes"),
        (None, {}, "prompt None is neither text nor token ids"),
        ([1, 2.5], {}, "token id 2.5 at place 1"),
        (torch.tensor([0.5]), {}, "0.5 is neither text nor token ids"),
        ([torch.tensor([0.5])], {}, "token id 0.5 at place 0"),
        ([1, "a"], {}, "token id 'a' at place 1"),
    ],
)
def test_impossible_calls_are_refused_in_one_line(lm, prompt, options, words):
    with pytest.raises(PromptError, match=words) as error:
        lm.generate(prompt, FullCache(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [list, tuple, np.array, torch.tensor, lambda ids: list(np.array(ids))])
def test_token_ids_may_come_in_what_holds_numbers(lm, given):
    ids, options = [1, 20, 30, 40], {"policy": FullCache(), "max_new_tokens": 4}
    expected = lm.generate(ids, **options).tokens
    assert lm.generate(given(ids), **options).tokens == expected
    assert [one.tokens for one in lm.generate([given(ids)] * 2, **options)] == [expected] * 2
    assert [one.tokens for one in lm.generate(given([ids] * 2), **options)] == [expected] * 2
    assert (
        lm.compress(given(ids)).ask(given(ids), max_new_tokens=4).tokens
        == lm.compress(ids).ask(ids, max_new_tokens=4).tokens
    )
    assert lm.logprobs(given(ids), [given(ids)]) == lm.logprobs(ids, [ids])
    with pytest.raises(PromptError, match="is one text"):
        lm.logprobs(ids, given(ids))


@pytest.mark.parametrize("policy", ["snapkv", ReSTKV, {"budget": 64}])
def test_what_is_no_policy_is_refused_in_one_line(lm, policy):
    calls = (
        lambda: lm.generate("Once", policy),
        lambda: lm.compress("Once", policy),
        lambda: lm.logprobs("Once", ["a"], policy),
        lambda: restkv.Chat(lm, policy),
    )
    for call in calls:
        with pytest.raises(
            PolicyError, match=r"^policy .* is no Policy; give one, such as restkv.get_policy\('"
        ) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(PolicyError, match="policy None"):
        nothing: Any = None
        restkv.Chat(lm, nothing)


def test_text_needs_a_tokenizer():
    for call in (lambda lm: lm.generate("hello"), lambda lm: lm.logprobs([1], ["hello"])):
        with pytest.raises(PromptError, match="no tokenizer"):
            call(small_lm())


def test_protected_entries_that_do_not_fit_are_refused(lm):
    policy = ReSTKV(budget=20, window=8, protect=((0, 15),))
    with pytest.raises(PolicyError, match="budget 20 is smaller than the 23 protected entries"):
        lm.generate(list(range(5, 45)), policy, max_new_tokens=1)
    lm.generate(list(range(5, 25)), policy, max_new_tokens=1)  # 20 tokens: nothing has to go


@pytest.mark.parametrize(("span", "at"), [((14, 30), 28), ((25, 40), 40)])
@torch.no_grad()
def test_a_span_that_outgrows_the_budget_is_refused_once_it_does(span, at):
    """Reaching past the prompt of 20 tokens, or beginning there; evictions fall on 24, 28, 32 ... tokens."""
    session = Session(small_lm().engine, ReSTKV(budget=12, window=4, interval=4, protect=(span,)), [20, 3], 40)
    session.prefill([small_ids(20), small_ids(3)])
    for token in small_ids(at - 21):
        session.feed(torch.tensor([token, token]))
    held = at - span[0]
    with pytest.raises(PolicyError, match=f"budget 12 is smaller than the {held} protected .* a text of {at}") as error:
        session.feed(torch.tensor([1, 1]))
    assert "\n" not in str(error.value)


def test_spans_that_the_newest_entries_no_longer_cover_must_fit_too():
    held = ReSTKV(
        budget=12, window=4, interval=4, protect=((12, 20),)
    )  # all of it in the prompt, half of it in the window
    assert small_lm().generate(small_ids(20), held, max_new_tokens=20, ignore_eos=True).finish_reason == "length"
    covered = ReSTKV(budget=12, window=4, interval=4, protect=((11, 20),))  # as the window moves on, one too many
    with pytest.raises(PolicyError, match="the 13 protected entries"):
        small_lm().generate(small_ids(20), covered, max_new_tokens=20, ignore_eos=True)


def test_the_layer_whose_budget_is_too_small_is_named():
    lm, ids = small_lm(windows=(None,) * 3), small_ids(40)
    with pytest.raises(PolicyError, match="layer 2's budget 9 is smaller than the 12 protected entries"):
        lm.generate(ids, ReSTKV(budget=(20, 15, 9), window=4, protect=((0, 8),)), max_new_tokens=1)
    with pytest.raises(PolicyError, match="layer 1's budget 20 is smaller than the 24 protected entries"):
        lm.generate(ids, SnapKV(budget=20, window=4, protect=((0, 20),), budget_by="pyramid"), max_new_tokens=1)


def remarks(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, RestKVWarning)]


def test_remarks_say_what_may_surprise(lm):
    ids, policy = list(range(5, 15)), ReSTKV(budget=20, window=16)
    (short,) = remarks(lambda: lm.generate(ids, policy, max_new_tokens=20))
    assert "window 16 is longer than the prompt of 10 tokens" in short
    assert not remarks(lambda: lm.generate(ids, policy, max_new_tokens=5))  # nothing will be evicted
    (long,) = remarks(lambda: lm.generate(list(range(3, 510)), FullCache(), max_new_tokens=6))
    assert "prompt of 507 tokens plus 6 new ones exceeds the model's 512 positions" in long
    assert not remarks(lambda: lm.generate(list(range(3, 509)), FullCache(), max_new_tokens=6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "cuda"}, "backend 'cuda'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": torch.int32}, "dtype torch.int32"),
        ({"device": "tpu9"}, "device 'tpu9'"),
    ],
)
def test_what_cannot_be_loaded_so_is_refused(stories260k, options, words):
    with pytest.raises(PromptError, match=words) as error:
        restkv.load(stories260k, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "head_dim", "chosen"),
    [("auto", 16, "flex"), ("auto", 8, "sdpa"), ("sdpa", 8, "sdpa"), ("sdpa", 64, "sdpa"), ("flex", 64, "flex")],
)
def test_a_gpu_compiles_where_flexattention_can(backend, head_dim, chosen):
    assert _backend(backend, torch.device("cuda"), head_dim) == chosen
    assert _backend(backend, torch.device("cpu"), head_dim) == ("flex" if backend == "flex" else "sdpa")


def test_heads_too_small_for_flexattention_are_refused_on_a_gpu():
    assert _backend("flex", torch.device("cpu"), 8) == "flex"
    with pytest.raises(PromptError, match=r"head_dim 8: .* load with backend='sdpa'"):
        _backend("flex", torch.device("cuda"), 8)


def test_the_backend_says_whether_the_step_is_compiled(stories260k):
    assert not restkv.load(stories260k).compiled
    assert restkv.load(stories260k, backend="flex").compiled
    assert math.isclose(restkv.load(stories260k, dtype="bfloat16").config.attn_scale, 8**-0.5)
    assert restkv.load(stories260k, dtype="bfloat16").dtype == torch.bfloat16
