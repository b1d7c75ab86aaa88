"""Logits that are no numbers end an answer in one line, which names what made the first of them and the mend."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

import restkv
from bench.quality.teacher_forcing import logprobs
from make.policies import FOUR, POLICY
from make.small import small_ids, small_lm, small_model
from modeling.nonfinite import numeric_error, sound
from restkv.chat import Chat
from restkv.cli import main
from restkv.engine import Engine
from restkv.errors import NumericError
from restkv.lm import LM
from restkv.policies import FullCache, ReSTKV
from restkv.session import Session

IDS = [1 + token % 6 for token in small_ids(60)]  # so that other tokens, such as 7, are there to break a model
ONCE = ReSTKV(20, window=4, interval=8)
every_policy = pytest.mark.parametrize("policy", POLICY.values(), ids=POLICY)


def broken(part: str, value: float = math.nan) -> LM:
    """A model in which one weight of a part of layer 2, or of the whole model, is no number."""
    lm = small_lm(windows=FOUR)
    whole = lm.model if part in ("embed_tokens", "lm_head") else lm.model.blocks[2]
    weight = dict(whole.named_parameters())[f"{part}.weight"]
    weight[7 if part == "embed_tokens" else -1] = value
    return lm


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said


PARTS = {
    "qkv_proj": "layer 2's attention",
    "o_proj": "layer 2's attention",
    "input_layernorm": "layer 2's attention",
    "gate_up_proj": "layer 2's MLP",
    "down_proj": "layer 2's MLP",
    "post_attention_layernorm": "layer 2's MLP",
    "embed_tokens": "the embedding of token 7",
    "lm_head": "the output matrix",
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_the_first_place_is_named(part, value):
    lm = broken(part, value)
    ids = [*IDS, 7] if part == "embed_tokens" else IDS
    with pytest.raises(NumericError) as error:
        lm.generate(ids, ONCE, max_new_tokens=40)
    one_line(error, f"after {len(ids)} tokens", PARTS[part], "weights hold NaN or infinity", "--check-weights names")
    assert "float16" not in str(error.value)
    assert numeric_error(lm.model, ids, 3).args[0].startswith(f"the logits after {len(ids)} tokens of row 3 are")


@every_policy
@pytest.mark.parametrize(
    "how", [{}, {"prefill": "chunked", "chunk": 16}, {"prefill": "a-shape:block=32:local=32"}], ids=str
)
def test_under_every_policy_and_prefill(policy, how):
    policy = dataclasses.replace(policy, probe="window")  # as all of them read a chunked prompt
    with pytest.raises(NumericError) as error:
        broken("down_proj").generate(IDS, policy, max_new_tokens=4, **how)
    one_line(error, "layer 2's MLP")


def test_chunks_that_evict_what_was_no_number_do_not_hide_it():
    lm = small_lm(windows=FOUR)
    lm.model.embed_tokens.weight[7] = math.nan
    with pytest.raises(NumericError) as error:
        lm.generate([7, *IDS], ReSTKV(8, window=4, interval=4), prefill="chunked", chunk=8)
    one_line(error, "the embedding of token 7")


def drawing(token: int, value: float = math.nan) -> LM:
    """A model that says `token` in the middle of an answer and breaks on reading it."""
    lm = small_lm(windows=FOUR)
    lm.model.embed_tokens.weight[token] = value
    return lm


@pytest.fixture(scope="module")
def late() -> tuple[int, int]:
    """A token that the unbroken model first says after some others, and where."""
    tokens = small_lm(windows=FOUR).generate(IDS, ONCE, max_new_tokens=30).tokens
    return next((token, at) for at, token in enumerate(tokens) if at > 3 and token not in [*IDS, *tokens[:at]])


@pytest.mark.parametrize("burst", [1, 8])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.01, "top_p": 0.9, "seed": 1}], ids=["greedy", "sampled"])
def test_in_the_middle_of_an_answer(late, burst, options):
    """Nothing that was drawn from such logits is said, whether or not the host reads every token."""
    token, at = late
    lm = drawing(token)
    lm._burst = burst
    stream = lm.stream(IDS, ONCE, max_new_tokens=30, **options)
    with pytest.raises(NumericError) as error:
        list(stream)
    one_line(error, f"after {len(IDS) + at + 1} tokens are", f"the embedding of token {token}")
    with pytest.raises(NumericError) as error:
        lm.generate([IDS[:9], IDS], ONCE, max_new_tokens=30, **options)
    one_line(error, "of row ", "the embedding of token")


def test_a_row_that_has_ended_may_be_what_it_likes(late):
    token, _ = late
    lm = drawing(token)
    lm.config = dataclasses.replace(lm.config, eos_token_ids=(token,))
    assert lm.generate(IDS, ONCE, max_new_tokens=30).finish_reason == "eos"


def test_logits_logprobs_and_scores():
    lm = broken("o_proj")
    for call in (
        lambda: lm.logits(IDS),
        lambda: lm.logprobs(IDS, [[1, 2]]),
        lambda: lm.compress(IDS, ONCE),
        lambda: lm.generate([IDS, IDS]),
    ):
        with pytest.raises(NumericError) as error:
            call()
        one_line(error, "layer 2's attention")
    lm = drawing(7)
    session = Session(lm.engine, FullCache(), [len(IDS), 20], 30, extends=True)
    session.prefill([IDS, IDS[:20]])
    assert all(map(math.isfinite, lm.logprobs(IDS, [[1, 2, 7]])))  # the last token is judged, not read
    asked: list[Callable[[], object]] = [
        lambda: lm.logprobs(IDS, [[1, 2], [1, 7, 2]]),
        lambda: logprobs(session, [[1, 2], [1, 7, 2]]),
    ]
    for ask in asked:
        with pytest.raises(NumericError) as error:
            ask()
        one_line(error, "the embedding of token 7")


def test_a_context_stays_after_a_question_that_breaks_it(tmp_path):
    lm = drawing(7)
    context = lm.compress(IDS, ONCE)
    context.save(tmp_path / "context")
    want = context.ask([1, 2], max_new_tokens=3).tokens
    assert 7 not in want
    for one in (context, restkv.CompressedContext.load(tmp_path / "context", lm)):
        for call in (
            lambda c=one: c.ask([1, 7, 2]),
            lambda c=one: list(c.stream([7])),
            lambda c=one: c.logprobs([[7, 1]]),
        ):
            with pytest.raises(NumericError) as error:
                call()
            one_line(error, "the embedding of token 7")
            assert one.ask([1, 2], max_new_tokens=3).tokens == want


def test_a_chat_goes_on_without_the_turn_that_broke_it(rambler, tmp_path):
    lm, texts = restkv.load(rambler), ("one", "two", "three")
    poison = lm.tokenizer.encode_more("\nzebra\n")[1]
    want = Chat(lm, ReSTKV(60, window=4), "Be brief.", template=False)
    said = ["".join(want.send(text, max_new_tokens=8)) for text in texts]
    assert poison not in want.tokens
    lm.model.embed_tokens.weight[poison] = math.nan
    chat = Chat(lm, ReSTKV(60, window=4), "Be brief.", template=False)
    for text, answer in zip(texts, said, strict=True):
        before = list(chat.messages), list(chat.tokens)
        with pytest.raises(NumericError) as error:
            list(chat.send("zebra", max_new_tokens=8))
        one_line(error, f"the embedding of token {poison}")
        assert (chat.messages, chat.tokens) == before
        heard = "".join(chat.send(text, max_new_tokens=8))
        assert text != "one" or heard == answer
    chat.save(tmp_path / "chat")
    assert Chat.load(tmp_path / "chat", lm).messages == chat.messages


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "min_p": 0.1, "seed": 2}])
def test_a_padded_vocabulary_may_be_minus_infinity(options, monkeypatch):
    """Entries that cannot be drawn are no fault, in logits and in log-probabilities."""
    lm = small_lm(windows=FOUR)
    want = lm.generate(IDS, ONCE, max_new_tokens=12, **options).tokens
    head, never = type(lm.model).head, sorted(set(range(23)) - {*want, *IDS[:4]})
    assert never

    def padded(model, x):
        logits = head(model, x)
        logits[..., never] = -math.inf
        return logits

    monkeypatch.setattr(type(lm.model), "head", padded)
    if not options:
        assert lm.generate(IDS, ONCE, max_new_tokens=12).tokens == want
    assert not set(lm.generate(IDS, ONCE, max_new_tokens=12, **options).tokens) & set(never)
    assert lm.logprobs(IDS, [IDS[:4], [never[0]]])[1] == -math.inf
    assert lm.logits(IDS).isneginf().any()
    assert sound(lm.logits(IDS)).all()


def test_float16_that_is_too_narrow_says_so():
    """Finite weights whose products are not: the line says which dtype to load in, and there it answers."""
    lm = LM(small_model().half(), None)
    lm.model.blocks[1].down_proj.weight.mul_(3000)
    lm.model.blocks[1].gate_up_proj.weight.mul_(30)
    with pytest.raises(NumericError) as error:
        lm.generate(IDS, FullCache())
    one_line(
        error, "layer 1's MLP", "too large for float16", "load the model in bfloat16 or float32 (--dtype bfloat16)"
    )
    lm.model.bfloat16()
    assert lm.generate(IDS, FullCache(), max_new_tokens=3).tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_are_sent_to_their_weights(dtype):
    model = small_model().to(dtype)
    model.blocks[1].down_proj.weight.mul_(1e37)
    model.blocks[1].gate_up_proj.weight.mul_(1e10)
    with pytest.raises(NumericError) as error:
        LM(model, None).generate(small_ids(5), FullCache())
    # Infinity, or NaN where a processor's product adds infinities of both signs.
    one_line(
        error,
        "first comes out of layer 1's MLP",
        f"finite, but too large for {str(dtype)[6:]}",
        "--check-weights",
    )


def test_what_a_second_pass_cannot_find_is_still_one_line(monkeypatch):
    lm = small_lm()
    monkeypatch.setattr(lm.engine, "decode", lambda *a: torch.full((1, 23), math.nan))
    with pytest.raises(NumericError) as error:
        lm.generate(IDS, ONCE, max_new_tokens=4)
    one_line(
        error, f"after {len(IDS) + 1} tokens", "reading the same with a full cache makes numbers", "--check-weights"
    )


def test_on_the_command_line(rambler, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(rambler, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["generate", str(folder), "-p", "one two", "-n", "5"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("restkv: error: the logits after ") and "layer 1's MLP" in last
    assert main(["generate", str(folder), "-p", "one two", "--check-weights"]) == 2
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_too(late):
    torch._dynamo.reset()
    model = small_model(windows=FOUR, head_dim=16)
    model.embed_tokens.weight[7] = math.nan
    session = Session(Engine(model, "flex"), ONCE, [len(IDS)], 20, extends=True)
    session.prefill([IDS])
    session.feed(torch.tensor([7]))
    drawn_NB = session.draw(1, restkv.sampling.Sampling(), [], torch.tensor([]))
    assert drawn_NB.tolist() == [[-1]]
    torch._dynamo.reset()
