"""What is left of a prompt while its layers compete for one budget (budgets.Global).

Letters: K KV heads, X heads with a kept set of their own (K or query heads), L prompt length, D head dim, n and m entries.
"""

from __future__ import annotations

from torch import Tensor

from modeling.pool import read
from restkv.across import Ranking, gathered
from restkv.budgets import GlobalCascade
from restkv.observe import Observation
from restkv.refit import References


class Competition:
    """The layers of one prompt, which arrive in order: what a later one outranks, earlier ones lose.

    Where ranks have the heads, all of them compete on every rank, and each holds the entries of its own.

    Attributes:
        waiting: the survivors of every layer so far.
    """

    def __init__(self, cascade: GlobalCascade) -> None:
        self.waiting: list[Waiting] = []
        self._cascade = cascade
        self._keeps: list[Tensor] = []  # of every layer, bool [X, L] of all ranks' heads

    def add(
        self,
        obs: Observation,
        ranked: Ranking,
        mass_1XL: Tensor | None,
        to_fit: References | None,
    ) -> None:
        """Let the next layer's entries in.

        Args:
            ranked: Policy.ranking of its observation, which is of one row.
            mass_1XL, to_fit: see Waiting.
        """
        ranks = obs.ranks
        (whole,) = gathered(ranks, [ranked], [obs.pos.shape[-1]])
        *earlier, keep_XL = self._cascade.add(*(one_1XL[0] for one_1XL in whole))
        for index, stays_m in enumerate(earlier):
            # Its entries that stay are listed in the order of the layer's heads.
            self._keeps[index] = self._keeps[index].masked_scatter(self._keeps[index], stays_m)
            self.waiting[index].narrow(ranks.own(self._keeps[index], 0))
        self._keeps.append(keep_XL)
        own_XL = ranks.own(keep_XL, 0)
        self.waiting.append(Waiting(own_XL, obs.k[0], obs.v[0], obs.pos[0], mass_1XL, to_fit))


class Waiting:
    """What is left of one layer's prompt while later layers may still outrank it.

    Attributes:
        keep_XL: bool, the entries each head (or query head) still has.
        any_KL: bool, those any head of a group still has, n in all; k_nD, v_nD, pos_n are theirs, head after head.
        mass_1XL: accumulated attention of all columns.
        to_fit: what the layer's survivors are to be refitted to, if they are.
    """

    def __init__(
        self,
        keep_XL: Tensor,
        k_KLD: Tensor,
        v_KLD: Tensor,
        pos_KL: Tensor,
        mass_1XL: Tensor | None,
        to_fit: References | None,
    ) -> None:
        self.keep_XL, self.mass_1XL, self.to_fit = keep_XL, mass_1XL, to_fit
        self.any_KL = keep_XL.unflatten(0, (len(k_KLD), -1)).any(1)
        index_n = self.any_KL.flatten().nonzero()[:, 0]
        self.k_nD, self.v_nD, self.pos_n = (read(x.flatten(0, 1), index_n) for x in (k_KLD, v_KLD, pos_KL))

    def narrow(self, keep_XL: Tensor) -> None:
        """Only these of the entries marked in keep_XL so far stay."""
        before_KL = self.any_KL
        self.keep_XL = keep_XL
        self.any_KL = self.keep_XL.unflatten(0, (len(before_KL), -1)).any(1)
        index_n = self.any_KL[before_KL].nonzero()[:, 0]
        self.k_nD, self.v_nD, self.pos_n = (read(x, index_n) for x in (self.k_nD, self.v_nD, self.pos_n))
