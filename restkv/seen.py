"""What the eviction after a prompt reads and observes for its probe, and what the observed queries see of a layer.

Letters: H query heads, K KV heads, Q queries, L tokens of the prompt, T tokens read after it, D head dim, E hidden width, S kinds
of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.forward import CHUNK
from modeling.layers import Block
from restkv.errors import PolicyError
from restkv.observe import Look, Observation
from restkv.phrases import Phrases
from restkv.probes import WINDOW, Own, Side, parse_probe

FIRST = 4  # entries of the prompt's begin that every piece of a replay attends to, as in KVzip's code


class Seen(NamedTuple):
    """Queries of one layer that the eviction after a prompt observes, after RoPE.

    q_HQD: those at `first` and at every `step`-th position after it. k_KTD, v_KTD: entries that they see after the prompt's, or
    None. part, probe: see Side. gap: a query counts for entries more than so many positions before it. newest: the prompt's
    newest queries are observed with them, as many as the policy's window has room for. sizes_SQ: see Observation.
    """

    q_HQD: Tensor
    first: int
    k_KTD: Tensor | None = None
    v_KTD: Tensor | None = None
    part: tuple[int, int] | None = None
    gap: int = 0
    newest: bool = False
    sizes_SQ: Tensor | None = None
    probe: str = Own.name
    step: int = 1

    def positions_Q(self) -> Tensor:
        """Of the queries, on their device."""
        at_Q = torch.arange(self.q_HQD.shape[1], device=self.q_HQD.device)
        return self.first + self.step * at_Q


@dataclass(frozen=True)
class Reading:
    """What a prompt's eviction has to read and to observe.

    Attributes:
        own, gap: positions of the prompt whose queries are observed with such a gap.
        sides: text to read after the prompt.
    """

    own: range = range(0)
    gap: int = 0
    sides: tuple[Side, ...] = ()

    @classmethod
    def of(cls, probe: str, ids: Sequence[int], phrases: Phrases) -> Reading:
        """Of a probe and a prompt."""
        probes = parse_probe(probe)
        return cls(
            own=max((one.own(len(ids)) for one in probes), key=len),
            gap=max(one.gap for one in probes),
            sides=tuple(replace(side, probe=one.name) for one in probes for side in one.sides(ids, phrases)),
        )

    @property
    def drafts(self) -> bool:
        """Whether the model is to go on with one of the texts, for which the full cache has to be alive."""
        return any(side.drafts for side in self.sides)

    def merged(self, other: Reading) -> Reading | None:
        """What serves both, by `part`; None where the prompt's own queries are others."""
        own = {(one.own, one.gap) for one in (self, other) if one.own} or {(range(0), 0)}
        if len(own) > 1:
            return None
        return Reading(*own.pop(), tuple(dict.fromkeys((*self.sides, *other.sides))))

    def part(self, seen: Sequence[Seen], reading: Reading) -> tuple[Seen, ...]:
        """Of what was seen in this reading what would have been in another one, which this one serves."""
        first = int(len(self.own) > 0)
        sides = dict(zip(self.sides, seen[first:], strict=True))
        return (*(seen[:first] if reading.own else ()), *(sides[side] for side in reading.sides))


def looks(probe: str, obs: Observation, seen: Sequence[Seen], window: int) -> tuple[Look, ...]:
    """What the queries that a probe observes see of a layer's prompt and of what was read after it; nothing where they are those
    that `obs` has anyway.

    Args:
        obs: all entries of the prompt, and its last queries.
        window: how many of the newest queries count.
    """
    if not seen:
        return ()
    newest = [Look(lambda obs: obs)] if WINDOW in probe.split("+") else []
    return (*newest, *(_look(obs, one, window) for one in seen))


def _look(obs: Observation, seen: Seen, window: int) -> Look:
    at_n = None
    if seen.part is not None:
        start, stop = seen.part
        at_n = torch.cat([torch.arange(min(FIRST, start)), torch.arange(start, stop)]).to(obs.pos.device)
    return Look(partial(_view, seen=seen, at_n=at_n, window=window), at_n)


def _view(obs: Observation, seen: Seen, at_n: Tensor | None, window: int) -> Observation:
    length, device = obs.pos.shape[-1], obs.pos.device
    k, v, pos = (x if at_n is None else x[:, :, at_n] for x in (obs.k, obs.v, obs.pos))
    if seen.k_KTD is not None and seen.v_KTD is not None:
        own_KT = torch.arange(length, length + seen.k_KTD.shape[1], device=device).expand(len(seen.k_KTD), -1)
        k, v = torch.cat([k, seen.k_KTD[None]], 2), torch.cat([v, seen.v_KTD[None]], 2)
        pos = torch.cat([pos, own_KT[None]], 2)
    q_1HQD, q_pos_1Q = seen.q_HQD[None], seen.positions_Q()[None]
    if seen.newest:
        room = max(0, window - q_1HQD.shape[2])
        before = slice(max(0, obs.q.shape[2] - room), None)
        q_1HQD = torch.cat([obs.q[:, :, before], q_1HQD], 2)
        q_pos_1Q = torch.cat([obs.q_pos[:, before], q_pos_1Q], 1)
    end = length if seen.gap else None  # what a query of the prompt counts for is not older than all of them
    sizes_1SQ = None if seen.sizes_SQ is None else seen.sizes_SQ[None]
    if seen.newest and sizes_1SQ is not None and obs.sizes is not None:
        sizes_1SQ = torch.cat([obs.sizes, sizes_1SQ], 2)[..., -q_1HQD.shape[2] :]
    view = replace(obs, q=q_1HQD, q_pos=q_pos_1Q, k=k, v=v, pos=pos, end=end, gap=seen.gap, sizes=sizes_1SQ)
    return replace(view, protected=None, mass=None)


def stream_sizes(block: Block, x_TE: Tensor, normed: bool) -> Tensor:
    """Observation.sizes of the queries that a layer makes of a residual stream: [S, T]."""
    if not normed:
        return _length(x_TE)[None]
    pieces = [torch.stack([_length(x_tE), _length(block.input_layernorm(x_tE))]) for x_tE in x_TE.split(CHUNK)]
    return torch.cat(pieces, 1)


def _length(x_TE: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_TE, dim=-1, dtype=torch.promote_types(x_TE.dtype, torch.float32))


def check_readable(probe: str, refit: str, chunked: bool) -> None:
    """Refuse a probe and a refit for a prompt that is evicted while it is read.

    Raises:
        PolicyError: it needs the whole prompt.
    """
    option, value, mend = ("probe", probe, WINDOW) if probe != WINDOW else ("refit", refit, "none")
    if chunked and value != mend:
        raise PolicyError(
            f"{option} {value!r}: a chunked prefill evicts before all of the prompt has been read; choose {option}={mend}, or "
            "prefill=dense"
        )
