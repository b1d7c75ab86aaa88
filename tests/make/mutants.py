"""Policies that each break one law, for tests of those who check laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from restkv.observe import Observation, weighted_attention
from restkv.policies import Policy, SnapKV


@dataclass(frozen=True)
class Sound(Policy):
    """What the others are made of: collected attention times the values' length."""

    name: ClassVar[str] = "sound"

    def importance(self, obs: Observation) -> Tensor:
        attention_BHC = weighted_attention(obs, (obs.q_pos >= 0).to(obs.dtype))
        return attention_BHC * obs.v.to(obs.dtype).norm(dim=-1).repeat_interleave(obs.group, 1)


@dataclass(frozen=True)
class ForgetsTheWindow(Sound):
    """Chooses among all entries, the newest included."""

    name: ClassVar[str] = "forgets-the-window"

    def ranking(self, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        score_BXC, pos_BXC, protected_BXC = super().ranking(obs)
        return score_BXC, pos_BXC, torch.zeros_like(protected_BXC)


@dataclass(frozen=True)
class DropsTheNewest(Sound):
    """Has no newest entries to keep, whatever its window says."""

    name: ClassVar[str] = "drops-the-newest"

    def newest(self, budget: int) -> int:
        return 0


@dataclass(frozen=True)
class KeepsOneMore(Sound):
    """One entry more than its budget, where there is one."""

    name: ClassVar[str] = "keeps-one-more"

    def keep(self, obs: Observation, states: Sequence[Any] = ()) -> Tensor:
        assert isinstance(obs.budget_B, Tensor)
        return self.allocation.select(*self.ranking(obs), obs.budget_B + 1)


@dataclass(frozen=True)
class PeeksAtPadding(Sound):
    """Measures values against the mean over all columns, padding included."""

    name: ClassVar[str] = "peeks-at-padding"

    def importance(self, obs: Observation) -> Tensor:
        return (obs.v - obs.v.mean(2, keepdim=True)).to(obs.dtype).norm(dim=-1)


@dataclass(frozen=True)
class GoesByColumns(Sound):
    """Smooths over neighbouring columns, as if they were in order."""

    name: ClassVar[str] = "goes-by-columns"

    def importance(self, obs: Observation) -> Tensor:
        score_BHC = super().importance(obs)
        return score_BHC + score_BHC.roll(1, -1)


@dataclass(frozen=True)
class SeesOtherRows(Sound):
    """Compares each column with its mean over the batch."""

    name: ClassVar[str] = "sees-other-rows"

    def importance(self, obs: Observation) -> Tensor:
        score_BHC = super().importance(obs)
        return (score_BHC - score_BHC.mean(0, keepdim=True)).abs()


@dataclass(frozen=True)
class WritesIntoWhatItSees(Sound):
    """Normalises keys where they lie."""

    name: ClassVar[str] = "writes-into-what-it-sees"

    def importance(self, obs: Observation) -> Tensor:
        obs.k.div_(2)
        return super().importance(obs)


@dataclass(frozen=True)
class ThrowsDice(Sound):
    """Draws from torch's generator."""

    name: ClassVar[str] = "throws-dice"

    def importance(self, obs: Observation) -> Tensor:
        score_BHC = super().importance(obs)
        return score_BHC * torch.rand_like(score_BHC)


@dataclass(frozen=True)
class HoldsAllAttention(Sound):
    """Every query against every entry at once, though it observes a whole prompt."""

    name: ClassVar[str] = "holds-all-attention"

    @property
    def observed_prompt(self) -> int:
        return 1 << 30

    def importance(self, obs: Observation) -> Tensor:
        return obs.logits().softmax(-1).nan_to_num(0).sum(2)


@dataclass(frozen=True)
class DependsOnPieces(Sound):
    """Takes the values' lengths relative to those of the same piece."""

    name: ClassVar[str] = "depends-on-pieces"

    def importance(self, obs: Observation) -> Tensor:
        there_BKC = (obs.pos >= 0).to(obs.dtype)
        parts = [obs.v[:, :, c].norm(dim=-1) * there_BKC[:, :, c] for c, _ in obs.chunks(obs.v.shape[-1])]
        return torch.cat([part_BKC / part_BKC.sum(-1, keepdim=True).clamp_min(1e-9) for part_BKC in parts], -1)


@dataclass(frozen=True)
class CountsCalls(SnapKV):
    """Remembers, in the class, how often it was asked."""

    name: ClassVar[str] = "counts-calls"
    calls: ClassVar[list[int]] = [0]

    def importance(self, obs: Observation) -> Tensor:
        self.calls[0] += 1
        return super().importance(obs) * (1 + self.calls[0] % 3 * (obs.pos % 2).repeat_interleave(obs.group, 1))


# Mutant -> laws that may be the first to catch it.
MUTANTS: dict[type[Policy], set[str]] = {
    ForgetsTheWindow: {"protection", "evictions"},
    DropsTheNewest: {"protection"},
    KeepsOneMore: {"counts"},
    PeeksAtPadding: {"padding"},
    GoesByColumns: {"columns"},
    SeesOtherRows: {"rows"},
    WritesIntoWhatItSees: {"again"},
    ThrowsDice: {"again"},
    CountsCalls: {"again"},
    HoldsAllAttention: {"memory"},
    DependsOnPieces: {"chunks"},
}
