"""The measured process of `restkv bench compile`: single operations of a session, and whole jobs of any policy.

An engine's backend says which way it runs them: "sdpa" eagerly, "flex" compiled, as far as there is a compiled way
(`compiled_operations`). What an operation needs before it can be repeated is made in `prepare`, untimed.

Letters: B batch rows, H query heads, K KV heads, L prompt length, C new entries, W last queries, D head dim, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.speed.ours import Ours
from bench.speed.workers import serve
from modeling.compiled import compiled, only_compiled
from restkv.engine import Engine
from restkv.pieces import PIECE, Pieces
from restkv.policies import Policy
from restkv.saving.store import policy_from_dict
from restkv.session import Session

# What is measured, in this order: an eviction before the steps, which may evict too and would compile it first.
OPERATIONS = ("evict", "compact", "decode", "score", "prefill")


def operations_of(policy: Policy, sparse: bool) -> tuple[str, ...]:
    """Those that sessions of a policy do; `sparse`: their prompts are read by a pattern."""
    evicts, again = policy.budget is not None, policy.budget is not None and policy.interval is not None
    done = {"evict": again, "compact": again, "decode": True, "score": evicts, "prefill": sparse}
    return tuple(name for name in OPERATIONS if done[name])


def compiled_operations(engine: Engine, policy: Policy, context: int = PIECE) -> list[str]:
    """Those of OPERATIONS that an engine compiles, `score` for prompts of `context` tokens in part; all others are eager
    whatever its backend.
    """
    if engine.backend != "flex":
        return []
    scores = engine.pieces.possible and policy.in_pieces and context >= PIECE
    return ["decode", "prefill", *(["evict"] if engine.masks(policy) else []), *(["score"] if scores else [])]


class TimedSession(Session):
    """Counts, step by step, what its evictions take: all that follows a step once an interval is over."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.evicting: list[float] = []  # seconds after every step

    def _after(self, *arguments: Any, **named: Any) -> None:
        start = self._now()
        super()._after(*arguments, **named)
        self.evicting.append(self._now() - start)

    def _now(self) -> float:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def evict(self) -> None:
        """What follows a step when an interval is over, and a period is not."""
        self.schedule.since_eviction = (self.schedule.interval or 1) - 1
        self._after(1, False, self._active_B)


class Operations(Ours):
    """Arguments: see Ours; sessions have one row."""

    kind: ClassVar[type[Session]] = TimedSession
    _prompt: list[tuple[Tensor, Tensor, Tensor]]

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        self._pieces = self._engine.pieces

    # -- before every operation

    @torch.no_grad()
    def prepare(self, op: str, **values: Any) -> None:
        # Only where scoring is measured it is compiled, whatever a process has scored by then.
        self._pieces.asked = op == "score"
        self._engine.pieces = self._pieces if op in ("score", "job") else Pieces(False)
        if op == "score":
            self._open(values["context"], 1)
            self._prompt = list(self._layers(values["context"]))
        elif op == "evict":
            self._lengthen(self._running.schedule.interval or 1)
        elif op == "compact":
            self._lengthen(self._running.schedule.period)
            self._running.evict()

    def _lengthen(self, tokens: int) -> None:
        """Bring every head to its budget, in the pages of a period's begin, and then give it so many entries more, of random
        tokens."""
        session = self._running
        cache = session.cache
        session.evictor.round(cache, compact=True)
        cache.reserve(max(session.schedule.period, tokens))
        pos_C = int(cache.next_pos[0]) + torch.arange(tokens, device=self._engine.device)
        for index, layer in enumerate(cache.layers):
            k_KCD, v_KCD = (self._random(layer.heads, tokens) for _ in range(2))
            raw = {"raw": k_KCD} if self._policy.slot_positions else {}
            layer.append(0, k_KCD, v_KCD, pos_C, companions=raw)
            if cache.ring_size:
                q_HWD = self._random(self._engine.model.config.num_heads, tokens)
                cache.remember(index, 0, q_HWD, int(pos_C[-1]))
        cache.next_pos += tokens

    # -- operations

    def load(self) -> None:
        """Compile the least there is: what compiling anything begins with."""
        compiled(_least)(torch.zeros(8, device=self._engine.device))

    @torch.no_grad()
    def evict(self) -> None:
        """An eviction that marks, in every layer."""
        self._running.evict()

    @torch.no_grad()
    def compact(self) -> None:
        """Reclaim what one period's evictions have marked, in every layer."""
        self._running.evictor.reclaim(self._running.cache)

    @torch.no_grad()
    def score(self, context: int) -> None:
        """Score, select and store a prompt whose queries, keys and values are there, in every layer."""
        self._store(0, context, self._prompt)

    def job(self, policy: dict[str, Any], context: int, answer: int) -> None:
        """A prompt of `context` tokens and an answer under any policy, as a server runs them."""
        self._policy, self._tokens = policy_from_dict(policy), answer
        self.prefill(context, 1)
        for _ in range(answer):
            self.decode()

    # -- what is said of it

    def describe(self) -> dict[str, Any]:
        """Besides what Ours says: the backend's compiled operations; `evicting`, seconds of what followed each step since the
        last answer; `interval` of its evictions."""
        self._engine.pieces = self._pieces
        context = 0 if self._session is None else int(self._session.cache.next_pos.max())
        said: dict[str, Any] = {"compiles": compiled_operations(self._engine, self._policy, context)}
        if self._session is not None:
            said["interval"] = self._running.schedule.interval
            said["evicting"], self._running.evicting = self._running.evicting, []
        return super().describe() | said

    @property
    def _running(self) -> TimedSession:
        assert isinstance(self._session, TimedSession)
        return self._session


def _least(x: Tensor) -> Tensor:
    return only_compiled(x) + 1


if __name__ == "__main__":
    serve(Operations(json.loads(sys.argv[1])))
