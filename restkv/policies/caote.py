"""CAOTE (Goel et al., 2025, arXiv 2504.14051): drop what changes the attention output of the newest query least.

Letters: B batch rows, H query heads, K KV heads, C entries of one head (columns).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from restkv.observe import Observation
from restkv.policies.base import Policy
from restkv.policies.rest import ReSTKV


@dataclass(frozen=True)
class CAOTE(Policy):
    """Score = a / (1 - a) * ||o - v||, with a the newest query's softmax weights and o = sum_n a_n v_n.

    The same formula as equation 7 of ReST-KV for one query, without smoothing and, as published, before W_O; with
    output_weight=True it is that equation itself. As with TOVA, whose weights the paper combines it with, it evicts after
    every step and protects nothing. gqa="joint": see ReSTKV; it needs output_weight=True.
    """

    name: ClassVar[str] = "caote"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    reductions: ClassVar[tuple[str, ...]] = ("mean", "max", "joint")

    window: int = 0
    interval: int | None = 1
    output_weight: bool = False  # True: ||(o - v) W_O||

    def __post_init__(self) -> None:
        super().__post_init__()
        joint = self.gqa == "joint"
        self._require(not joint or self.output_weight, "gqa", "joint adds up projected outputs; set output_weight=True")
        self._require(not joint or self.granularity == "kv", "gqa", "query heads with sets of their own share no entry")

    @property
    def _equation7(self) -> ReSTKV:
        return ReSTKV(
            None,
            window=1,
            granularity=self.granularity,
            gqa=self.gqa,
            aggregate="indicator",
            pooling="none",
            output_weight=self.output_weight,
        )

    @property
    def needs(self) -> frozenset[str]:
        """The roots of W_O, if it is asked for."""
        return self._equation7.needs

    @property
    def observed(self) -> int:
        """The newest query decides alone."""
        return 1

    def importance(self, obs: Observation) -> Tensor:
        """Output change: [B, H, C], or [B, K, C] for gqa="joint"."""
        newest = replace(obs, q=obs.q[:, :, -1:], q_pos=obs.q_pos[:, -1:])
        return self._equation7.importance(newest)
