"""Whose budget: how a number of entries per head is shared out among layers and heads (docs/budgets.md).

An allocation orders nothing by itself: scores come from a policy, and within a head the best ones always stay (select.py).

Letters: B batch rows, X heads with a kept set of their own (KV or query heads), C entries of one head (columns),
S = X*C entries of one layer, N layers, F entries of all layers scored so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor

from restkv.errors import PolicyError
from restkv.select import select, top

LONGEST = 1 << 30  # tokens: no text is longer


@dataclass(frozen=True)
class Allocation:
    """Uniform: every head of every layer keeps the same number of entries (the base of the other allocations).

    Raises:
        PolicyError: an option of a subclass is out of range.
    """

    name: ClassVar[str] = "uniform"
    ragged: ClassVar[bool] = False  # heads of one layer may keep different numbers
    across_layers: ClassVar[bool] = False  # one selection over all layers: Global.select_layers or Global.cascade

    def layers(self, budget: int, reserved: int, num_layers: int, length: int) -> list[int]:
        """Entries per head of every layer, the reserved ones included.

        Args:
            budget: mean entries per head.
            reserved: entries that every head keeps anyway (observation window and sinks).
            length: tokens of the prompt.
        """
        return [budget] * num_layers

    def at_most(self, budget: int, reserved: int, num_layers: int) -> tuple[int, int]:
        """Entries per head for a prompt of any length, `budget` at least: the mean over layers (rounded up), and of one layer."""
        budgets = self.layers(budget, reserved, num_layers, LONGEST)
        return max(budget, -(-sum(budgets) // num_layers)), max(budget, *budgets)

    def select(self, score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget_B: Tensor) -> Tensor:
        """keep [B, X, C] bool: `budget_B` entries per head on average, protected ones included (see restkv.select)."""
        return select(score_BXC, pos_BXC, protected_BXC, budget_B)

    def _require(self, condition: bool, option: str, mend: str) -> None:
        if not condition:
            raise PolicyError(f"budget_by {self.name}: {option} {getattr(self, option)!r}: {mend}")

    def _require_share(self, option: str) -> None:
        share = getattr(self, option)
        valid = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1
        self._require(valid, option, "give the share of a uniform budget that every head is sure of, in [0, 1]")

    def _require_bool(self, option: str) -> None:
        self._require(isinstance(getattr(self, option), bool), option, "give True or False")


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Early layers keep more, in equal steps (PyramidKV, Cai et al., 2024, arXiv 2406.02069; docs/sources.md §2.6).

    With base = budget - reserved, the last layer keeps base // beta unreserved entries and the first 2 * base minus that;
    a prompt too short for the first layer flattens the pyramid to what there is. No layer is left without any entry: where
    nothing is reserved, the last one keeps at least 1.

    The released code steps down by whole numbers, rounded towards the first layer's count, so the layers together keep
    more than their budget (11% more for 32 layers of 128). `exact` rounds the same line to whole numbers whose sum
    is num_layers * budget: up in the first half of the layers, down in the second.
    """

    name: ClassVar[str] = "pyramid"

    beta: int = 20  # steepness: a uniform base over the last layer's
    exact: bool = False  # spend num_layers * budget exactly
    # budget <= length < 2 * base: uniform. False: the variant in ReST-KV's code (docs/sources.md §1.3)
    middle_regime: bool = True

    def __post_init__(self) -> None:
        is_whole = isinstance(self.beta, int) and not isinstance(self.beta, bool)
        self._require(
            is_whole and self.beta >= 1, "beta", "give a whole number of at least 1 (20 as released; 1 is uniform)"
        )
        self._require_bool("exact")
        self._require_bool("middle_regime")

    def layers(self, budget: int, reserved: int, num_layers: int, length: int) -> list[int]:
        """As for every allocation; never increasing from layer to layer.

        Worked example: budget 96, reserved 32, 4 layers, 400 tokens: base 64, so 125 unreserved entries in the first layer
        and 3 in the last. The released code steps down by 122 // 3 = 40:

        >>> Pyramid().layers(96, 32, 4, 400)
        [157, 117, 77, 37]
        >>> Pyramid(exact=True).layers(96, 32, 4, 400)
        [157, 117, 75, 35]
        """
        base = budget - reserved
        short = length < budget or (self.middle_regime and length < 2 * base)
        if short or num_layers == 1:
            return [budget] * num_layers
        last = max(base // self.beta, 1 - reserved)
        first = min(2 * base - last, length - reserved)
        drop, steps = 2 * (first - base), num_layers - 1  # the last layer has 2 * base - first
        if not self.exact:
            return [reserved + first - layer * (drop // steps) for layer in range(num_layers)]
        early = [first - layer * drop // steps for layer in range((num_layers + 1) // 2)]  # rounded up
        late = [2 * base - count for count in reversed(early[: num_layers // 2])]
        return [reserved + count for count in early + late]

    def at_most(self, budget: int, reserved: int, num_layers: int) -> tuple[int, int]:
        """As for every allocation. What steps of whole numbers leave over depends on the prompt's length."""
        return budget + (0 if self.exact else (num_layers - 1) // 2), super().at_most(budget, reserved, num_layers)[1]


@dataclass(frozen=True)
class HeadAdaptive(Allocation):
    """Heads of a layer share its budget by score (Ada-KV, Feng et al., 2024, arXiv 2407.11550; docs/sources.md §2.7).

    With base = budget minus protected entries, the layer's X * base best unprotected entries fall n_h to head h, which gets
    a capacity of n_h * (1 - floor) + base * floor. Each head keeps its protected entries and its own best up to its capacity.

    Totals are exact: a layer keeps min(entries, X * budget). Capacities are rounded down, and what that leaves, or what
    a head cannot use because it has too few visible entries, goes to the layer's best entries not kept yet.
    `exact=False` rounds capacities to the nearest number instead, as released, and may miss the total by a few.

    Of equal scores the older position loses, then the later head.

    >>> score = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [5.0, 1.0, 1.0, 1.0]]])
    >>> HeadAdaptive(floor=0.5).select(score, torch.arange(4).expand(1, 2, 4), score < 0, torch.tensor([2])).sum(-1).tolist()
    [[3, 1]]
    """

    name: ClassVar[str] = "adakv"
    ragged: ClassVar[bool] = True

    floor: float = 0.2  # the share of a uniform base that every head is sure of
    normalize: bool = False  # weigh a head by the share of its scores that its best `base` hold (for scores >= 0)
    exact: bool = True  # spend the layer's budget exactly

    def __post_init__(self) -> None:
        self._require_share("floor")
        self._require_bool("normalize")
        self._require_bool("exact")

    def select(self, score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget_B: Tensor) -> Tensor:
        """keep [B, X, C] bool; waits for nothing on the device. Arguments as for restkv.select, budget_B an int [B]."""
        X = pos_BXC.shape[1]
        exists_BXC = pos_BXC >= 0
        keep_BXC = protected_BXC & exists_BXC
        past_BXC = exists_BXC & ~keep_BXC
        total_B = (X * budget_B - keep_BXC.sum((1, 2))).clamp(0)
        base_B1 = (total_B // X)[:, None]
        value_BXC = self._weighted(score_BXC, pos_BXC, past_BXC, base_B1) if self.normalize else score_BXC

        value_BS, pos_BS, past_BS = (rearrange(t, "B X C -> B (X C)") for t in (value_BXC, pos_BXC, past_BXC))
        won_BX = reduce(top(value_BS, pos_BS, past_BS, total_B), "B (X C) -> B X", "sum", X=X).double()
        if self.exact:
            capacity_BX = _whole(won_BX * (1 - self.floor) + total_B[:, None].double() * (self.floor / X))
        else:
            capacity_BX = (won_BX * (1 - self.floor) + _whole(base_B1.double() * self.floor)).round().long()
        # The floor is no reason to keep what a sliding window has hidden (-inf).
        capacity_BX = capacity_BX.minimum((past_BXC & (score_BXC > -torch.inf)).sum(-1))
        keep_BXC = keep_BXC | top(score_BXC, pos_BXC, past_BXC, capacity_BX)
        if not self.exact:
            return keep_BXC
        left_B = X * budget_B - keep_BXC.sum((1, 2))
        rest_BS = top(value_BS, pos_BS, rearrange(past_BXC & ~keep_BXC, "B X C -> B (X C)"), left_B)
        return keep_BXC | rearrange(rest_BS, "B (X C) -> B X C", X=X)

    def _weighted(self, score_BXC: Tensor, pos_BXC: Tensor, past_BXC: Tensor, base_B1: Tensor) -> Tensor:
        """Scores times their head's concentration: the sum of its `base` best over the sum of all (float64)."""
        counted_BXC = past_BXC & score_BXC.isfinite()
        value_BXC = score_BXC.double().masked_fill(~counted_BXC, 0)
        best_BX1 = (value_BXC * top(score_BXC, pos_BXC, past_BXC, base_B1)).sum(-1, keepdim=True)
        all_BX1 = value_BXC.sum(-1, keepdim=True)
        return torch.where(counted_BXC, value_BXC * torch.where(all_BX1 == 0, 1, best_BX1 / all_BX1), score_BXC)


@dataclass(frozen=True)
class Global(Allocation):
    """One budget for the whole model, spent on the largest scores of any layer and head (docs/budgets.md, ours).

    Scores must mean the same everywhere, as ReST-KV's do: the change of a layer's output, in units of the residual stream.
    Protected entries always stay, and so do each head's own best floor * (budget - protected) entries (rounded down) as
    far as they are visible (not -inf). The rest of the layers * heads * budget entries goes to the highest scores.

    Of equal scores the older position loses, then the later layer, then the later head. Within one call everything is
    selected exactly; layer by layer, use a cascade. `select` treats the one layer it is given as the whole model.
    """

    name: ClassVar[str] = "global"
    ragged: ClassVar[bool] = True
    across_layers: ClassVar[bool] = True

    floor: float = 0.2  # the share of a uniform budget that every head is sure of

    def __post_init__(self) -> None:
        self._require_share("floor")

    def select(self, score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget_B: Tensor) -> Tensor:
        """keep [B, X, C] bool: the heads of one layer share its budget."""
        return self.select_layers([score_BXC], [pos_BXC], [protected_BXC], budget_B)[0]

    def select_layers(
        self,
        scores_BXC: Sequence[Tensor],
        positions_BXC: Sequence[Tensor],
        protected_BXC: Sequence[Tensor],
        budget_B: Tensor,
    ) -> list[Tensor]:
        """keep [B, X, C] bool of every layer; rows do not influence one another. Waits for nothing on the device.

        Args:
            scores_BXC, positions_BXC, protected_BXC: one tensor per layer, as for restkv.select; C may differ.
            budget_B: int [B], mean entries per head of every row, which keeps min(entries, layers * X * budget). Only a
                head with more protected entries than that can make a row keep more.
        """
        layers, columns = len(scores_BXC), (scores_BXC, positions_BXC, protected_BXC)
        if len({pos_BXC.shape for pos_BXC in positions_BXC}) == 1:  # rows of one batch
            score, pos, protected = (torch.cat(list(column)) for column in columns)
            sure = list(self.sure(score, pos, protected, budget_B.repeat(layers)).chunk(layers))
        else:
            sure = [self.sure(*triple, budget_B) for triple in zip(*columns, strict=True)]
        columns = (scores_BXC, positions_BXC, sure)
        score_BF, pos_BF, sure_BF = (torch.cat([layer.flatten(1) for layer in column], 1) for column in columns)
        total_B = budget_B * sum(pos_BXC.shape[1] for pos_BXC in positions_BXC)
        keep_BF = select(score_BF[:, None], pos_BF[:, None], sure_BF[:, None], total_B)[:, 0]
        parts = keep_BF.split([pos_BXC[0].numel() for pos_BXC in positions_BXC], 1)
        return [part.view_as(pos_BXC) for part, pos_BXC in zip(parts, positions_BXC, strict=True)]

    def cascade(self, num_layers: int, budget: int) -> GlobalCascade:
        """A selection for one row whose layers are scored one after the other."""
        return GlobalCascade(self, num_layers, budget)

    def sure(
        self, score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget_B: Tensor, max_count: int | None = None
    ) -> Tensor:
        """[B, X, C] bool: protected entries and each head's floor. max_count: a bound of budget_B the host knows."""
        exists_BXC = pos_BXC >= 0
        protected_BXC = protected_BXC & exists_BXC
        visible_BXC = exists_BXC & ~protected_BXC & (score_BXC > -torch.inf)  # NaN is not
        floor_BX = _whole((budget_B[:, None] - protected_BXC.sum(-1)).double() * self.floor)
        return protected_BXC | top(score_BXC, pos_BXC, visible_BXC, floor_BX, max_count)


class GlobalCascade:
    """Global's selection for one row while its layers arrive in order: the outcome is select_layers' on all of them.

    After each layer only the layers * heads * budget best of everything so far survive. What falls out has that many
    better entries already, so no later layer could bring it back; and what every head is sure of never competes. So
    the survivors never outnumber the whole budget, and one layer's full K and V is all that exists beside them.

    Attributes:
        sizes: survivors of each layer added so far.
    """

    def __init__(self, allocation: Global, num_layers: int, budget: int) -> None:
        self.sizes: list[int] = []
        self._allocation = allocation
        self._num_layers = num_layers
        self._budget = budget
        self._survivors: list[Tensor] = []  # score, position, sure: [F] each, in order of layer, head, column

    def add(self, score_XC: Tensor, pos_XC: Tensor, protected_XC: Tensor) -> list[Tensor]:
        """Let the next layer's entries compete with all survivors.

        Returns:
            For each earlier layer, bool [its survivors so far] in the order of its heads and, within a head, its columns:
            those that still survive. Last, bool [X, C] for the new layer.
        """
        assert len(self.sizes) < self._num_layers, "every layer has been added"
        budget_1 = torch.tensor([self._budget], device=pos_XC.device)
        budget = self._budget
        sure_XC = self._allocation.sure(score_XC[None], pos_XC[None], protected_XC[None], budget_1, budget)[0]
        entries = [score_XC.flatten(), pos_XC.flatten(), sure_XC.flatten()]
        if self._survivors:
            entries = [torch.cat(pair) for pair in zip(self._survivors, entries, strict=True)]
        score_F, pos_F, sure_F = entries
        total = self._num_layers * pos_XC.shape[0] * budget
        keep_F = select(score_F[None, None], pos_F[None, None], sure_F[None, None], total)[0, 0]
        keeps = list(keep_F.split([*self.sizes, pos_XC.numel()]))
        # As the caller's copies of the survivors, ours are as long as the device says.
        self.sizes = torch.stack([keep.sum() for keep in keeps]).tolist()  # sync: this and the next line, once a layer
        index_F = keep_F.nonzero()[:, 0]
        self._survivors = [entry_F[index_F] for entry_F in entries]
        return [*keeps[:-1], keeps[-1].view_as(pos_XC)]


def _whole(x: Tensor) -> Tensor:
    """Float64 rounded down to int64, where 2.9999999 is a 3 that floating point missed."""
    assert x.dtype == torch.float64, "int64 * float is float32, which loses whole entries of large budgets"
    return (x + 1e-6).floor().long()


ALLOCATIONS: dict[str, type[Allocation]] = {cls.name: cls for cls in (Allocation, Pyramid, HeadAdaptive, Global)}
