"""Torch's compiler, switched off or passed over in every way we know: FlexAttention is refused, or gives way to sdpa, before it
computes anything. Eager, it ignores its block lists and answers with noise."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor.exc import CppCompileError
from torch.utils.flop_counter import FlopCounterMode

from bench.quality.teacher_forcing import logprobs
from bench.speed.floor import measure_machine
from bench.speed.peers.hf import Transformers
from make.small import small_ids, small_model
from modeling import flex
from modeling.attention import paged_attention
from modeling.compiled import compiled, only_compiled
from modeling.forward import step
from modeling.sparse import BlockMap, sparse_attention
from restkv.cli import main
from restkv.context import CompressedContext
from restkv.engine import Engine
from restkv.errors import CompileError, RestKVWarning
from restkv.lm import LM
from restkv.policies import FullCache, ReSTKV
from restkv.session import Session

POLICY = ReSTKV(budget=20, window=4, interval=8)
SPARSE = "a-shape:block=32:sinks=4:local=32"
IDS = small_ids(70)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    with mock.patch.dict("os.environ", {name: value}):
        yield


def stance(*words: str, **options: Any) -> contextlib.AbstractContextManager:
    return torch.compiler.set_stance(*words, **options)


def dynamo(**settings: Any) -> contextlib.AbstractContextManager:
    return torch._dynamo.config.patch(**settings)


def inductor(**settings: Any) -> contextlib.AbstractContextManager:
    import torch._inductor.config

    return torch._inductor.config.patch(**settings)


OFF = {
    "TORCHDYNAMO_DISABLE": (partial(environment, "TORCHDYNAMO_DISABLE", "1"), "TORCHDYNAMO_DISABLE=1.*unset it"),
    "config.disable": (partial(dynamo, disable=True), r"torch\._dynamo\.config\.disable.*set it to False"),
    "force_eager": (partial(stance, "force_eager"), r"set_stance\('force_eager'\).*set the stance"),
    "eager_on_recompile": (partial(stance, "eager_on_recompile"), r"set_stance\('eager_on_recompile'\)"),
    "fail_on_recompile": (partial(stance, "fail_on_recompile"), "fail_on_recompile"),
    "eager_then_compile": (partial(stance, "eager_then_compile"), r"set_stance\('eager_then_compile'\)"),
    "aot_eager_then_compile": (partial(stance, "aot_eager_then_compile"), r"'aot_eager_then_compile'"),
    "backend eager": (partial(stance, force_backend="eager"), "force_backend='eager'"),
    "backend aot_eager": (partial(stance, force_backend="aot_eager"), "force_backend='aot_eager'"),
    "a backend for some graphs": (partial(dynamo, debug_backend_override=">=0:eager"), "by a setting of torch"),
    "a dispatch mode": (partial(FlopCounterMode, display=False), "by a setting of torch"),
}
FALLBACK = partial(inductor, fallback_by_default=True)  # takes a compilation, so that one test has it


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.eval_frame, "_EXAMPLE_INPUTS", None)  # what "..._then_compile" has seen already
    yield
    torch._dynamo.reset()


@pytest.fixture(params=OFF)
def off(request):
    return OFF[request.param]


def model():
    return small_model(group=3, head_dim=16)


def contents(session: Session) -> list[torch.Tensor]:
    return [tensor.clone() for view in session.cache.views() for tensor in view if tensor is not None]


def remarks(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if issubclass(one.category, RestKVWarning)]


def test_flex_by_name_is_refused_in_one_line_and_the_session_is_as_it_was(off):
    switch, words = off
    engine = Engine(model(), "flex")
    session = Session(engine, POLICY, [70], 40)
    session.prefill([IDS])
    fed = Session(Engine(engine.model, "sdpa"), POLICY, [70], 40)
    fed.prefill([IDS])
    fed.cache.reserve(8)
    session.cache.reserve(8)
    before, token = contents(session), torch.tensor([3])
    with switch(), pytest.raises(CompileError, match=words) as caught:
        session.feed(token)
    assert "\n" not in str(caught.value) and "sdpa" in str(caught.value)
    assert all(map(torch.equal, contents(session), before))
    session.engine = Engine(engine.model, "sdpa")  # whoever goes on goes on from the same place
    for one in (session, fed):
        one.feed(token)
    assert torch.equal(session.logits_BV, fed.logits_BV)


def test_auto_goes_on_with_sdpa_and_says_so_once(off):
    switch, _ = off
    want = [
        LM(model(), None).generate(IDS, POLICY, max_new_tokens=30, prefill=how).tokens
        for how in ("dense", "chunked", SPARSE)
    ]
    with switch(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm = LM(model(), None, "flex", named=False)
        got = [lm.generate(IDS, POLICY, max_new_tokens=30, prefill=how).tokens for how in ("dense", "chunked", SPARSE)]
    assert got == want and lm.backend == "sdpa" and not lm.compiled
    (told,) = remarks(caught)
    assert told.endswith("going on with sdpa") and "\n" not in told
    assert lm.generate(IDS, POLICY, max_new_tokens=30).tokens == want[0]  # for good: the compiler is on again


@pytest.mark.parametrize("way", ["chunked", SPARSE, "logprobs", "context"])
def test_auto_gives_way_wherever_it_first_compiles(way):
    def answers(lm: LM) -> object:
        if way == "logprobs":
            session = Session(lm.engine, FullCache(), [3], 30, extends=True)
            session.prefill([IDS[:3]])
            return logprobs(session, [IDS[3:20]])[0].tolist()
        if way == "context":
            context = lm.compress(IDS, POLICY)
            assert isinstance(context, CompressedContext)
            return context.ask(IDS[:3], max_new_tokens=4).tokens
        return lm.generate(IDS, POLICY, max_new_tokens=4, prefill=way, chunk=16).tokens

    want = answers(LM(model(), None))
    lm = LM(model(), None, "flex", named=False)
    with torch.compiler.set_stance("force_eager"), pytest.warns(RestKVWarning, match="going on with sdpa"):
        assert answers(lm) == want
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(CompileError, match="force_eager") as caught,
    ):
        answers(LM(model(), None, "flex"))
    assert "\n" not in str(caught.value)


def test_sparse_kernels_are_refused_as_well(off, monkeypatch):
    switch, words = off
    monkeypatch.setattr(
        flex, "_compiled", compiled(flex._block_flex)
    )  # torch.compile remembers what TORCHDYNAMO_DISABLE was
    q_THD, k_KLD, v_KLD = torch.randn(64, 4, 16), torch.randn(2, 64, 16), torch.randn(2, 64, 16)
    chosen = BlockMap(torch.eye(2, dtype=torch.bool).expand(4, 2, 2), 32)
    how: dict[str, Any] = {"scale": 0.25, "softcap": None, "window": None}
    with switch(), pytest.raises(CompileError, match=words):
        sparse_attention(q_THD, k_KLD, v_KLD, 0, chosen, backend="flex", **how)


def test_what_has_been_compiled_before_is_not_passed_over():
    """One graph is made; then stances come and go in the middle of an answer, by name and by default."""
    weights = model()
    want = LM(weights, None).generate(IDS, POLICY, max_new_tokens=30)
    for named in (False, True):
        lm = LM(weights, None, "flex", named=named)
        assert lm.generate(IDS, POLICY, max_new_tokens=30).tokens == want.tokens
        for one in ("eager_on_recompile", "fail_on_recompile"):  # the graph is there: nothing is recompiled
            with torch.compiler.set_stance(one):
                assert lm.generate(IDS, POLICY, max_new_tokens=30).tokens == want.tokens
        ways: list[dict[str, Any]] = [
            {"stance": "force_eager"},
            {"force_backend": "eager"},
            {"force_backend": "aot_eager"},
        ]
        for shut in ways:
            session = Session(Engine(weights, "flex", named), POLICY, [70], 30)
            session.prefill([IDS])
            for _ in range(5):
                session.feed(session.logits_BV.argmax(-1))
            before, token = contents(session), session.logits_BV.argmax(-1)
            with torch.compiler.set_stance(**shut):
                if named:
                    with pytest.raises(CompileError, match=shut.get("stance", "force_backend")):
                        session.feed(token)
                    assert all(map(torch.equal, contents(session), before))
                else:
                    with pytest.warns(RestKVWarning, match="going on with sdpa"):
                        session.feed(token)
                    assert session.logits_BV.argmax(-1).tolist() == want.tokens[6:7]
            if named:  # a stance that is gone again leaves nothing behind
                session.feed(token)
                assert session.logits_BV.argmax(-1).tolist() == want.tokens[6:7]
    lm = LM(weights, None, "flex")  # no graph of another backend has stayed
    assert lm.generate(IDS, POLICY, max_new_tokens=30).tokens == want.tokens


def test_a_graph_that_inductor_hands_back_to_eager_kernels_is_caught():
    run = compiled(_double)
    with FALLBACK(), pytest.raises(CompileError, match="fallback_by_default"):
        run(torch.ones(3))
    assert torch.equal(run(torch.ones(4)), torch.full((4,), 2.0))


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * only_compiled(x)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "/elsewhere"), "Permission denied"),
        (CppCompileError(["g++"], "no headers"), "C\\+\\+ compile error"),
        (KeyError("getpwuid(): uid not found: 54321"), "getpwuid"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_while_kernels_are_made_is_a_line_also_if_torch_is_told_to_suppress_it(error, words):
    want = LM(model(), None).generate(IDS, POLICY, max_new_tokens=30).tokens
    with dynamo(suppress_errors=True), mock.patch("torch._inductor.compile_fx.compile_fx", side_effect=error):
        with pytest.raises(CompileError, match=f"'decode' cannot be compiled here: .*{words}") as caught:
            LM(model(), None, "flex").generate(IDS, POLICY, max_new_tokens=3)
        assert "\n" not in str(caught.value)
        lm = LM(model(), None, "flex", named=False)
        with pytest.warns(RestKVWarning, match=f"{words}.*going on with sdpa"):
            assert lm.generate(IDS, POLICY, max_new_tokens=30).tokens == want


def test_settings_that_torch_refuses_together_are_a_line():
    with (
        dynamo(suppress_errors=True, fail_on_recompile_limit_hit=True),
        pytest.raises(CompileError, match="'decode' cannot be compiled here"),
    ):
        LM(model(), None, "flex").generate(IDS, POLICY, max_new_tokens=3)


def test_the_recompile_limit_is_a_line():
    run = compiled(_double)
    with dynamo(recompile_limit=1), pytest.raises(CompileError, match="'double' has been compiled for too many shapes"):
        for size in (2, 3, 4):
            run(torch.ones(size))


def test_flex_called_eagerly_is_refused():
    weights = model()
    session = Session(Engine(weights, "sdpa"), FullCache(), [70], 4)
    session.prefill([IDS])
    cache = session.cache
    cache.reserve(1)
    before, pos_11 = contents(session), torch.tensor([[70]], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(CompileError):
        step(weights, torch.tensor([[1]]), pos_11, cache.lag, cache.views(), cache.queries, cache.ring_size, "flex")
    with pytest.raises(CompileError):
        q_BTHD = torch.randn(1, 1, weights.config.num_heads, weights.config.head_dim)
        paged_attention(q_BTHD, cache.views()[0], pos_11, scale=0.25, softcap=None, backend="flex")
    assert all(map(torch.equal, contents(session), before))


def test_benches_measure_no_eager_kernels_as_compiled(monkeypatch):
    for switch in (dynamo(disable=True), torch.compiler.set_stance("force_eager")):
        with switch, pytest.raises(CompileError):
            measure_machine("cpu", 1, "float32", megabytes=1)
    peer = object.__new__(Transformers)
    peer._static, peer._seen, peer._step, peer._next_B1 = True, 0, None, torch.zeros(1, 1)
    monkeypatch.setattr(Transformers, "_run", lambda *_: None)
    monkeypatch.setitem(torch._dynamo.utils.counters, "stats", {"unique_graphs": 0})
    with pytest.raises(SystemExit, match="compiler is off"):
        peer.decode()


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_the_command_line_says_which_switch_in_one_line(rambler, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    with dynamo(disable=name == "TORCH_COMPILE_DISABLE"):  # torch reads that variable when it starts
        assert main(["generate", str(rambler), "-p", "a story", "-n", "4", "--backend", "flex"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("restkv: error: ") and f"({name}=1)" in line and "unset it" in line
        assert main(["generate", str(rambler), "-p", "a story", "-n", "20"]) == 0  # an eager answer does not care
    assert "note" not in capsys.readouterr().err
