"""What `python -m bench.models` has made: restkv loads it, and it answers as such a model does. Skipped where it was not made."""

from __future__ import annotations

import pytest

import restkv
from bench.models import MODELS, folder
from restkv import LM, Chat, FullCache
from restkv.errors import RestKVError

CHATTING = {"smollm2", "qwen2.5-0.5b"}  # the others are not tuned for it, and have no template


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> tuple[str, LM]:
    place = folder(request.param)
    if place is None:
        pytest.skip(f"no such folder in the cache; python -m bench.models {request.param}")
    return request.param, restkv.load(
        place, backend="sdpa", dtype="float32"
    )  # bfloat16 rounds as threads share the work


def test_it_goes_on_as_anybody_would(model: tuple[str, LM]) -> None:
    """The likeliest tokens: any wrong weight, RoPE base or token id ends this at once."""
    _, lm = model
    said = lm.generate("one, two, three, four, five,", FullCache(), max_new_tokens=12)
    assert said.text.startswith(" six, seven, eight, nine, ten")


def test_it_chats_where_it_was_tuned_for_it(model: tuple[str, LM]) -> None:
    name, lm = model
    if name in CHATTING:
        answer = Chat(lm, FullCache()).send("What is the capital of France?", max_new_tokens=40)
        assert "Paris" in "".join(answer)
    else:
        with pytest.raises(RestKVError, match="template"):
            Chat(lm, FullCache(), template=True).check()
