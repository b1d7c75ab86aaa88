"""Compiling ahead of time, so that a later process finds its kernels made."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from modeling.modes import own_modes
from modeling.room import enough_memory, require
from restkv import pieces
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.meter import Meter
from restkv.policies import Policy
from restkv.session import Session

PER_TOKEN = 40  # bytes of a number in a list


@dataclass(frozen=True)
class Warmed:
    """What warming up took: seconds of the prompt and of the first compiled token, seconds of the next token, graphs made."""

    prefill_s: float
    first_s: float
    next_s: float
    graphs: int


@own_modes
def warm_up(
    lm: LM, policy: Policy, prompt_tokens: int, max_new_tokens: int, rows: int = 1, prefill: str = "dense"
) -> Warmed:
    """Compile what a job of this shape runs, by running a prompt of random tokens and two new ones.

    Kernels depend on the shape of the cache. A policy with an interval and a budget in entries fixes it; otherwise it follows
    from the lengths of prompt and answer, which need to agree roughly only (shapes are rounded up to powers of two).

    Raises:
        PromptError: a model that is not compiled, or lengths below 1.
    """
    if not lm.compiled:
        raise PromptError(f"backend {lm.backend!r} compiles nothing; load with backend='flex'")
    for name, value in (("prompt_tokens", prompt_tokens), ("max_new_tokens", max_new_tokens), ("rows", rows)):
        if value < 1:
            raise PromptError(f"{name} {value}: give at least 1")
    with enough_memory(f"draw {rows} prompts of {prompt_tokens} tokens", "lower prompt_tokens or rows"):
        require(rows * prompt_tokens * PER_TOKEN)
    draw = random.Random(0)
    prompts = [[draw.randrange(lm.config.vocab_size) for _ in range(prompt_tokens)] for _ in range(rows)]
    meter = Meter(lm.device)
    lm.engine.pieces.asked |= prompt_tokens >= pieces.PIECE  # a shorter one makes no graph of them
    session = Session(lm.engine, policy, [prompt_tokens] * rows, max_new_tokens, prefill=prefill)

    def seconds(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        session.logits_BV.sum().item()  # sync: a GPU has to be waited for
        return time.perf_counter() - start

    def feed() -> None:
        session.feed(session.logits_BV.argmax(-1))

    return Warmed(seconds(lambda: session.prefill(prompts)), seconds(feed), seconds(feed), meter.graphs())
