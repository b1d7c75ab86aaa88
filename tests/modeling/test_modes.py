"""Torch's modes: whatever a caller has switched on, every entry gives the answer of a plain day, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import restkv
from make.small import small_ids, small_lm, small_model
from restkv.chat import Chat
from restkv.context import CompressedContext
from restkv.lm import LM
from restkv.policies import H2O, ExpectedAttention, FullCache, ReSTKV

POLICY = ReSTKV(budget=20, window=4, interval=8)
SAMPLED = {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5, "max_new_tokens": 20}


@contextmanager
def set_and_reset(set_: Callable[[Any], None], value: Any, back: Any) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(back)


BACKENDS: Any = torch.backends


def _narrow(precision: str) -> None:
    BACKENDS.mkldnn.matmul.fp32_precision = precision


@contextmanager
def no_kernels() -> Iterator[None]:
    cuda = torch.backends.cuda
    switches = (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp, cuda.enable_cudnn_sdp)
    try:
        for switch in switches:
            switch(False)
        yield
    finally:
        for switch in switches:
            switch(True)


def precision() -> str:
    """Of products of float32."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend
        return BACKENDS.mkldnn.matmul.fp32_precision


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast cuda": lambda: set_and_reset(lambda on: torch.set_autocast_enabled("cuda", on), True, False),
    "default float64": lambda: set_and_reset(torch.set_default_dtype, torch.float64, torch.float32),
    "default bfloat16": lambda: set_and_reset(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: set_and_reset(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "deterministic": lambda: set_and_reset(torch.use_deterministic_algorithms, True, False),
    "narrow products": lambda: set_and_reset(torch.set_float32_matmul_precision, "medium", "highest"),
    "narrow products of one backend": lambda: set_and_reset(_narrow, "bf16", "none"),
    "one kernel": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "no kernel": no_kernels,
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def state() -> tuple[Any, ...]:
    """What a mode may change."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        precision(),
    )


def day(lm: LM, folder: Path, mode: Callable[[], Any]) -> list[Any]:
    """What every entry says; each call in a mode of its own, and what it made is used in the next."""
    said: list[Any] = []
    ids = small_ids(100)

    def under(call: Callable[[], Any]) -> Any:
        with mode():
            before = state()
            result = call()
            assert state() == before
        return result

    for policy in (POLICY, H2O(20, interval=5, positions="slot"), ExpectedAttention(20, window=4, interval=8)):
        said += [row.tokens for row in under(partial(lm.generate, [ids, ids[:9]], policy, **SAMPLED))]
    sparse = "flexprefill:block=32:min_budget=32"
    said.append(under(lambda: lm.generate(ids, POLICY, prefill=sparse, max_new_tokens=9)).tokens)
    said.append(under(lambda: lm.generate(ids, POLICY, prefill="chunked", chunk=16, max_new_tokens=9)).tokens)
    said.append(under(lambda: lm.logits(ids)).tolist())
    said.append(under(lambda: lm.logprobs(ids, [ids[:5], ids[3:9]], POLICY)))
    context = under(lambda: lm.compress(ids, POLICY))
    said.append(context.ask(ids[:6], max_new_tokens=9).tokens)  # outside of what it was made in
    under(lambda: context.save(folder / "context"))
    loaded = under(lambda: CompressedContext.load(folder / "context", lm))
    said += [loaded.kept, under(lambda: lm.compress(ids, POLICY).kept)]
    said += [
        loaded.ask(ids[:6], **SAMPLED).tokens,
        under(lambda: loaded.logprobs([ids[:4]])),
        context.logprobs([ids[:4]]),
    ]
    said.append(under(lambda: context.ask(ids[:6], max_new_tokens=9)).tokens)
    return said


@pytest.fixture(scope="module")
def plain(rambler, tmp_path_factory) -> tuple[list[Any], list[Any]]:
    """What is said on a plain day, and in a plain chat."""
    place = tmp_path_factory.mktemp("plain")
    return day(small_lm(), place, nullcontext), talk(rambler, place, nullcontext)


@every_mode
def test_the_answers_of_a_plain_day(mode, plain, tmp_path):
    assert day(small_lm(), tmp_path, mode) == plain[0]


def talk(folder: Path, place: Path, mode: Callable[[], Any]) -> list[Any]:
    """A chat whose turns, saves and changes happen in and out of a mode by turns."""
    with mode():
        lm = restkv.load(folder)
    chat = Chat(lm, ReSTKV(40, window=4, interval=8), "Be brief.", template=False)
    said: list[Any] = []
    for inside, text in ((True, "one"), (False, "two"), (True, "three")):
        stream = chat.send(text, max_new_tokens=8)
        if inside:
            with mode():
                said.append("".join(stream))
        else:
            said.append("".join(stream))
    with mode():
        chat.save(place / "chat")
        chat = Chat.load(place / "chat", lm)
        assert chat.stats is not None
        said.append(chat.stats.kept)
    said.append("".join(chat.send("four", max_new_tokens=8)))
    with mode():
        chat.change(FullCache())
    said += ["".join(chat.send("five", max_new_tokens=8)), chat.tokens]
    return said


@pytest.mark.parametrize("name", ["inference", "autocast bfloat16", "default float64", "device context"])
def test_a_chat_in_and_out_of_a_mode(name, plain, rambler, tmp_path):
    assert talk(rambler, tmp_path, MODES[name]) == plain[1]


@every_mode
def test_a_stream_keeps_its_modes_to_itself(mode):
    """Between two pieces the consumer has the modes it had, and may change them."""
    lm, ids = small_lm(), small_ids(30)
    want = lm.generate(ids, POLICY, max_new_tokens=16).tokens
    seen = []

    from modeling.modes import own_modes

    @own_modes
    def counting() -> Iterator[tuple[Any, ...]]:
        for _ in range(3):
            yield state()

    plain = state()
    with mode():
        mine, pieces = state(), counting()
        for inner in pieces:
            seen.append(inner)
            assert state() == mine
    assert [one[:-1] for one in seen] == [
        (False, False, False, False, torch.float32, torch.device("cpu"), False, True, True)
    ] * 3
    assert {one[-1] for one in seen} <= {"highest", "ieee"}
    assert state() == plain
    stream = lm.stream(ids, POLICY, max_new_tokens=16)
    pieces = iter(stream._pieces)
    for _ in range(5):
        next(pieces, None)
    with mode():
        for _ in pieces:
            pass
    assert stream.generation.tokens == want


def test_calls_in_two_threads_leave_the_callers_dtype_alone():
    """The default dtype belongs to the process: the last call that ends gives it back."""
    lm, ids = small_lm(), small_ids(40)
    want = lm.generate(ids, POLICY, max_new_tokens=20).tokens
    got: list[list[int]] = []

    def work() -> None:
        for _ in range(3):
            got.append(lm.generate(ids, POLICY, max_new_tokens=20).tokens)

    with set_and_reset(torch.set_default_dtype, torch.float64, torch.float32):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    assert got == [want] * 9


def test_an_error_gives_the_modes_back():
    lm = small_lm()
    with torch.inference_mode(), pytest.raises(restkv.RestKVError):
        lm.generate([999_999])
    with set_and_reset(torch.set_default_dtype, torch.float64, torch.float32):
        with pytest.raises(restkv.RestKVError):
            next(iter(lm.stream([])._pieces))
        assert torch.get_default_dtype() == torch.float64
    assert lm.generate(small_ids(5), FullCache(), max_new_tokens=2).tokens


@pytest.mark.slow
def test_compiled_too():
    """A compiled step under every mode; none of them makes it compile anew for ever."""
    torch._dynamo.reset()
    lm = LM(small_model(group=3, head_dim=16), None, "flex")
    ids = small_ids(60)
    want = lm.generate(ids, POLICY, max_new_tokens=24).tokens
    for mode in MODES.values():
        with mode():
            assert lm.generate(ids, POLICY, max_new_tokens=24).tokens == want
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for mode in MODES.values():
        with mode():
            assert lm.generate(ids, POLICY, max_new_tokens=24).tokens == want
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    torch._dynamo.reset()
