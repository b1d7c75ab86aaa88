"""Choosing the next token. Letters: B batch rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from modeling.ranks import ALONE, Ranks
from restkv.errors import PromptError

SEEDS = 1 << 64  # how many a generator tells apart
COLDEST = 1e-6
HOTTEST = 1e30  # finite in float32, and as flat as any more would be


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the logits.

    Filters apply in this order, each on what the one before left: temperature, top_k, top_p, min_p.

    Args:
        temperature: divides the logits; 0 is greedy (the lowest id wins a tie). At least COLDEST otherwise: less would divide
            them beyond what float32 holds.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches p (the one that crosses p included); 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: of the first row; row i of a batch draws from its own generator seeded with seed + i, so that its tokens do not
            depend on its neighbours. None seeds from the operating system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature, top_p, min_p = map(_as_float, (self.temperature, self.top_p, self.min_p))
        greedy = temperature == 0 and not self.temperature  # what merely rounds to 0 is too cold
        bounds = {
            "temperature": (greedy or temperature >= COLDEST, f"0 (greedy) or at least {COLDEST:g}"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "0 (all tokens) or a larger whole number"),
            "top_p": (0 < top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= min_p < 1, "in [0, 1)"),
            "seed": (self.seed is None or _is_seed(self.seed), "that is a whole number from 0 to 2**64 - 1"),
        }
        for name, (ok, wanted) in bounds.items():
            if not ok:
                raise PromptError(f"sampling: {name}={getattr(self, name)!r} is not possible; give a value {wanted}")

    def generators(self, rows: int, ranks: Ranks = ALONE) -> list[torch.Generator]:
        """One seeded CPU generator per row, the same on all ranks that share a model: their logits are the same bits, too."""
        seed = self.seed
        if seed is None and ranks.size > 1 and self.temperature:
            seed = int(ranks.share(str(torch.Generator().seed())))
        seeds = [None if seed is None else seed + row for row in range(rows)]
        generators = [torch.Generator() for _ in seeds]
        for generator, seed in zip(generators, seeds, strict=True):
            generator.seed() if seed is None else generator.manual_seed(seed % SEEDS)
        return generators


def _as_float(value: object) -> float:
    """A number as a float, which a fraction may be too small for; NaN, which no bound allows, for anything else."""
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.inf


def _is_seed(seed: object) -> bool:
    return isinstance(seed, int) and 0 <= seed < SEEDS


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits after temperature, top_k, top_p and min_p: [B, V] float32, -inf where a token is excluded.

    The likeliest token always stays. Masses are added up in float64: in float32 a top_p below 1e-45 is 0, and a sum over a
    large vocabulary is off by more than what the last tokens have.

    >>> filter_logits(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), Sampling(temperature=1.0, top_k=2)).tolist()
    [[-inf, 3.0, -inf, 2.0]]
    """
    logits_BV = logits_BV.float() / float(min(sampling.temperature, HOTTEST))  # -inf / inf would be NaN
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if float(sampling.top_p) < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        mass_BV = sorted_BV.double().softmax(-1)
        beyond_BV = mass_BV.cumsum(-1) - mass_BV >= float(sampling.top_p)  # mass before the token: 0 for the first
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), float("-inf"))
    if float(sampling.min_p) > 0:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, float("-inf"))
    return logits_BV


def sample(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next token ids [B] int64.

    Draws by an exponential race, argmax(p / e) with e ~ Exp(1): the same distribution as multinomial without its host sync.
    The logits are taken relative to the largest first: divided by a low temperature they might be too large for float32.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = filter_logits(logits_BV.float() - logits_BV.amax(-1, keepdim=True), sampling).softmax(-1)
    noise_BV = torch.empty(  # pinned: the copy waits for nothing
        probs_BV.shape, dtype=torch.float32, device="cpu", pin_memory=probs_BV.is_cuda
    )
    for noise_V, generator in zip(noise_BV, generators, strict=True):
        noise_V.exponential_(generator=generator)  # never 0
    return (probs_BV / noise_BV.to(probs_BV.device, non_blocking=True)).argmax(-1)
