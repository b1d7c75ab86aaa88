"""Sessions of the real engine on tiny models: a policy's prompts, evictions and tokens, and laws that compare runs.

Models compute in float64, so that no choice hangs on the last bit of a score.

Letters: B batch rows, H query heads, X heads with a kept set of their own, C entries of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from modeling.layers import Block, Decoder
from restkv import schedule
from restkv.engine import Engine
from restkv.observe import Observation
from restkv.policies import FullCache, Policy
from restkv.session import Session
from restkv.testing.dense import Dense
from restkv.testing.models import exact, small_ids, small_model
from restkv.testing.watch import Watch, snapshot, watched

CLOSE = 1e-8  # between logits that are computed in different orders, in float64
NUDGE = 1e-9  # scores this close, relative to each other, are ties; 1e-6 where attention is collected in float32
NEVER = 10_000  # tokens between two compactions: more than any job has

Held = list[list[set[int]]]  # [layer][row * H + query head]: positions


@lru_cache(maxsize=64)
def _engine(softcap: float | None, **traits: Any) -> Engine:
    model = exact(small_model(head_dim=4, hidden=12, thetas=(100.0, 7.0), **traits))
    parts: list[Decoder | Block] = [model, *model.blocks]
    for part in parts:
        part.config = replace(part.config, attn_softcap=softcap)
    return Engine(model, "sdpa")


class Ran(NamedTuple):
    """What a session did: its logits [step] of [B, V], and what each query head holds in the end."""

    session: Session
    logits: list[Tensor]
    held: Held


@dataclass(frozen=True)
class Job:
    """What a session is asked to do.

    Attributes:
        lengths: tokens of every row's prompt.
        new: tokens fed after the prompts, one at a time.
        chunk: tokens per chunk of a chunked prefill; None: dense.
        windows, kv_heads, group, softcap, qk_norm: of the model, see restkv.testing.small_model.
    """

    policy: Policy
    seed: int = 0
    lengths: tuple[int, ...] = (20,)
    new: int = 0
    chunk: int | None = None
    windows: tuple[int | None, ...] = (None, None, None)
    kv_heads: int = 1
    group: int = 1
    softcap: float | None = None
    qk_norm: bool = False

    @property
    def engine(self) -> Engine:
        """The tiny model, float64; of a few seeds only."""
        return _engine(
            self.softcap,
            seed=self.seed % 2,
            windows=self.windows,
            kv_heads=self.kv_heads,
            group=self.group,
            qk_norm=self.qk_norm,
        )

    @property
    def prompts(self) -> list[list[int]]:
        return [small_ids(length, self.seed + row) for row, length in enumerate(self.lengths)]

    @property
    def tokens(self) -> Tensor:
        """[step][row]."""
        rows = len(self.lengths)
        return torch.tensor(small_ids(self.new * rows, self.seed + 7)).view(self.new, rows)

    def run(
        self,
        *,
        rows: Sequence[int] | None = None,
        compact_every: int = schedule.COMPACT_EVERY,
        policy: Policy | None = None,
        each: Callable[[Session, Sequence[Sequence[int]]], None] | None = None,
    ) -> Ran:
        """Read the prompts, feed the tokens.

        Args:
            rows: these rows alone.
            compact_every: tokens between two compactions where evictions come more often.
            policy: another one than the job's.
            each: called after the prompts and after every token, with what the rows have been given.
        """
        rows = range(len(self.lengths)) if rows is None else rows
        how: dict[str, Any] = {} if self.chunk is None else {"prefill": "chunked", "chunk": self.chunk}
        prompts = [self.prompts[row] for row in rows]
        with patch.object(schedule, "COMPACT_EVERY", compact_every):
            session = Session(self.engine, policy or self.policy, [len(ids) for ids in prompts], self.new, **how)
        session.prefill(prompts)
        logits = [session.logits_BV]
        if each is not None:
            each(session, prompts)
        for ids_B in self.tokens:
            session.feed(ids_B[list(rows)])
            logits.append(session.logits_BV)
            if each is not None:
                each(session, [[token] for token in ids_B[list(rows)].tolist()])
        return Ran(session, logits, held(session))


def held(session: Session, row: int | None = None) -> Held:
    """Positions that each query head holds, of all rows or of one."""
    group, H = session.engine.model.config.group, session.engine.model.config.num_heads
    out: Held = []
    for lists in snapshot(session.cache):
        heads: list[set[int]] = []
        for entries in lists:
            bits = entries.seen or [[True] * len(entries.pos)] * group
            heads.extend({p for p, has in zip(entries.pos, line, strict=True) if has} for line in bits)
        out.append(heads if row is None else heads[row * H : (row + 1) * H])
    return out


class Runs:
    """The runs of one job that its laws compare, each made once."""

    def __init__(self, job: Job) -> None:
        self.job, self.watch, self.off = job, Watch(), 0.0
        self.wrong: str | None = None

    @cached_property
    def dropped(self) -> Ran | None:
        """Compacted after every eviction, each of which is watched, and beside a dense model; None: an eviction was unlawful."""
        job = self.job
        if job.chunk is None and not job.policy.slot_positions:
            self.watch.full = [
                snapshot(replace(job, new=0).run(rows=[row], policy=FullCache()).session.cache)
                for row in range(len(job.lengths))
            ]
        # Slots are no positions in the text; and of a prompt in chunks, each attends before the next one is evicted.
        twins = [] if job.policy.slot_positions or job.chunk else [Dense(job.engine.model) for _ in job.lengths]

        def agree(session: Session, pieces: Sequence[Sequence[int]]) -> None:
            for row, (twin, ids) in enumerate(zip(twins, pieces, strict=False)):
                self.off = max(self.off, float((twin.run(ids) - session.logits_BV[row]).abs().max()))
                twin.adopt(held(session, row))

        try:
            with watched(self.watch):
                return job.run(compact_every=1, each=agree)
        except AssertionError as error:
            self.wrong = str(error)
            return None

    @cached_property
    def masked(self) -> Ran:
        """Nothing is ever compacted: entries are marked dead."""
        return self.job.run(compact_every=NEVER)

    @cached_property
    def tied(self) -> bool:
        """Whether a choice hangs on scores that are as good as equal: moved by a hair, they change what is kept."""
        with _nudged(type(self.job.policy), 1e-6 if "mass" in self.job.policy.needs else NUDGE):
            return self.job.run(compact_every=NEVER).held != self.masked.held


# -- laws: what is wrong, or None


def counts(runs: Runs) -> str | None:
    """Every eviction leaves each head, layer or model its budget, keeps what is protected, and changes no entry."""
    _ = runs.dropped
    return runs.wrong


def dense(runs: Runs) -> str | None:
    """The logits are those of a dense model in which what has been evicted is masked."""
    return None if runs.dropped is None or runs.off < CLOSE else f"logits are {runs.off:.1e} off a dense model's"


def compacted(runs: Runs) -> str | None:
    """Entries that are marked dead and entries that are dropped for good are the same: logits and kept sets."""
    dropped = runs.dropped
    return (
        None
        if dropped is None
        else _differ(runs, dropped.logits, dropped.held, runs.masked, "when nothing is compacted")
    )


def alone(runs: Runs) -> str | None:
    """The last row by itself keeps what it keeps in the batch, and has its logits."""
    last, batch = len(runs.job.lengths) - 1, runs.dropped
    if last == 0 or batch is None:
        return None
    logits = [logits_BV[last:] for logits_BV in batch.logits]
    single = runs.job.run(rows=[last], compact_every=1)
    return _differ(runs, logits, held(batch.session, last), single, "alone than in a batch")


def _differ(runs: Runs, logits: Sequence[Tensor], kept: Held, other: Ran, when: str) -> str | None:
    """What differs between two runs of a job, ties excepted."""
    if kept != other.held:
        layer = next(n for n, (a, b) in enumerate(zip(kept, other.held, strict=True)) if a != b)
        wrong = f"layer {layer} keeps other entries {when}"
    else:
        gap = max(float((a - b).abs().max()) for a, b in zip(logits, other.logits, strict=True))
        if gap < CLOSE:
            return None
        wrong = f"logits are {gap:.1e} off {when}"
    return None if runs.tied else wrong


@contextmanager
def _nudged(cls: type[Policy], size: float) -> Iterator[None]:
    ranking = cls.ranking

    def moved(policy: Policy, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        score_BXC, pos_BXC, protected_BXC = ranking(policy, obs)
        noise_BXC = torch.cos(pos_BXC * 12.9898 + torch.arange(pos_BXC.shape[1])[:, None] * 78.233)
        largest = score_BXC.masked_fill(~score_BXC.isfinite(), 0).abs().amax()
        return score_BXC + size * noise_BXC * (score_BXC.abs() + 1e-3 * largest), pos_BXC, protected_BXC

    with patch.object(cls, "ranking", moved):
        yield
