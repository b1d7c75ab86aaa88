"""What is left of a prompt while its layers compete for one budget (budgets.Global).

Letters: K KV heads, X heads with a kept set of their own (K or query heads), L prompt length, D head dim, n and m entries.
"""

from __future__ import annotations

from torch import Tensor

from modeling.pool import read
from restkv.budgets import GlobalCascade
from restkv.observe import Observation
from restkv.refit import References


class Competition:
    """The layers of one prompt, which arrive in order: what a later one outranks, earlier ones lose.

    Attributes:
        waiting: the survivors of every layer so far.
    """

    def __init__(self, cascade: GlobalCascade) -> None:
        self.waiting: list[Waiting] = []
        self._cascade = cascade

    def add(
        self,
        obs: Observation,
        ranked: tuple[Tensor, Tensor, Tensor],
        mass_1XL: Tensor | None,
        to_fit: References | None,
    ) -> None:
        """Let the next layer's entries in.

        Args:
            ranked: Policy.ranking of its observation, which is of one row.
            mass_1XL, to_fit: see Waiting.
        """
        *earlier, keep_XL = self._cascade.add(*(one_1XL[0] for one_1XL in ranked))
        for waiting, stays_n in zip(self.waiting, earlier, strict=True):
            waiting.narrow(stays_n)
        self.waiting.append(Waiting(keep_XL, obs.k[0], obs.v[0], obs.pos[0], mass_1XL, to_fit))


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

    def narrow(self, stays_m: Tensor) -> None:
        """Only some of the entries marked in keep_XL (in its order) stay."""
        before_KL = self.any_KL
        self.keep_XL = self.keep_XL.masked_scatter(self.keep_XL, stays_m)
        self.any_KL = self.keep_XL.unflatten(0, (len(before_KL), -1)).any(1)
        index_n = self.any_KL[before_KL].nonzero()[:, 0]
        self.k_nD, self.v_nD, self.pos_n = (read(x, index_n) for x in (self.k_nD, self.v_nD, self.pos_n))
