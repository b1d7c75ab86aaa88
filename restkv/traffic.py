"""What ranks that share a model send one another, and what each of them holds, counted from a model's sizes (docs/parallel.md).

Bytes are those of the tensors that are summed or gathered, and calls are collectives. On a ring each of n ranks sends
2 (n - 1) / n times the bytes of a sum, and (n - 1) / n times those of a whole that is gathered. A test counts what crosses and
compares.

Letters: B batch rows, T tokens, E hidden width, N layers, K KV heads, C entries of one head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modeling.checkpoint.expected import expected_shapes
from modeling.checkpoint.shares import cut_of, share_of
from modeling.config import ModelConfig
from modeling.forward import CHUNK
from modeling.ranks import Ranks
from restkv.policies.base import Policy

PACKED = 8  # bytes of an entry that heads compete with: score, and position with protection (restkv/across.py)
NUMBER = 8  # bytes of a number of the host, and of a count


@dataclass(frozen=True)
class Link:
    """What connects two ranks: bytes per second in one direction, and seconds that a call takes besides."""

    name: str
    rate: float
    latency: float


LINKS = (  # rates as makers state them; latencies are round numbers, assumed
    Link("NVLink 4", 450e9, 10e-6),
    Link("PCIe 5.0 x16", 64e9, 20e-6),
    Link("100 Gb/s Ethernet", 12.5e9, 50e-6),
)


@dataclass(frozen=True)
class Traffic:
    """Collectives of one step.

    Attributes:
        sums, gathers: how many there are.
        summed: bytes of what is summed, of one rank. gathered: of what is gathered, of all of them together.
    """

    sums: int = 0
    summed: int = 0
    gathers: int = 0
    gathered: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def calls(self) -> int:
        """All of them."""
        return self.sums + self.gathers

    @property
    def bytes(self) -> int:
        """Of the tensors, whatever the number of ranks."""
        return self.summed + self.gathered

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, on a ring."""
        return (2 * self.summed + self.gathered) * (ranks - 1) / ranks

    def seconds(self, ranks: int, link: Link) -> float:
        """At a link's rate and latency, with nothing else to do meanwhile."""
        return self.sent(ranks) / link.rate + self.calls * link.latency if ranks > 1 else 0.0


def of_tokens(config: ModelConfig, dtype: torch.dtype, rows: int = 1, tokens: int = 1, chunks: int = 1) -> Traffic:
    """A step of T tokens in each row, or a prompt of T tokens that layers read in so many chunks, and the logits after it.

    The embedding is summed, and in every layer what o_proj and down_proj make: [B, T, E] each. Logits [B, V] are gathered.
    """
    hidden = rows * tokens * config.hidden_size * dtype.itemsize
    logits = rows * config.vocab_size * dtype.itemsize
    return Traffic(1 + 2 * config.num_layers * chunks, (1 + 2 * config.num_layers) * hidden, 1, logits)


def of_prompt_eviction(config: ModelConfig, policy: Policy, ranks: int, length: int) -> Traffic:
    """The eviction after a prompt of one row, scores in float32."""
    layers, heads = config.num_layers, _heads(config, policy)
    total = _scores(config, policy, ranks, length)
    if policy.allocation.ragged:
        total += Traffic(0, 0, layers, layers * heads * length * PACKED)
        if not policy.allocation.across_layers:  # a layer alone asks how long the others' lists are
            total += Traffic(0, 0, layers, layers * ranks * NUMBER)
    return total


def of_eviction(config: ModelConfig, policy: Policy, ranks: int, entries: int, rows: int = 1) -> Traffic:
    """An eviction while decoding, of heads that hold C = `entries`, run eagerly: evictions in a graph send nothing.

    Which rows are over their budget is asked of all heads: their counts [N, B, K].
    """
    layers, heads = config.num_layers, _heads(config, policy)
    total = Traffic(0, 0, 1, layers * rows * config.num_kv_heads * NUMBER) + _scores(
        config, policy, ranks, entries, rows
    )
    if policy.allocation.ragged:
        together = policy.allocation.across_layers
        total += Traffic(0, 0, 1 if together else layers, layers * rows * heads * entries * PACKED)
        total += Traffic(0, 0, 1 if together else layers, layers * ranks * NUMBER)
    return total


def _heads(config: ModelConfig, policy: Policy) -> int:
    return config.num_heads if policy.granularity == "query" else config.num_kv_heads


def _scores(config: ModelConfig, policy: Policy, ranks: int, entries: int, rows: int = 1) -> Traffic:
    """What scores ask of other ranks' heads."""
    layers = config.num_layers
    if policy.name == "tova":  # its sum over all query heads
        return Traffic(layers, layers * rows * entries * 4, 0, 0)
    if policy.name == "compactor":  # counts (int64), sums and squares of two scores, and how many entries there are
        once = 2 * (NUMBER + 4 + 4) + (NUMBER if getattr(policy, "blending", None) is None else 0)
        return Traffic(layers * (7 if once > 32 else 6), layers * rows * once, 0, 0)
    return Traffic()


@dataclass(frozen=True)
class Held:
    """Bytes of one rank: its weights, and its heads' keys and values of `entries` entries per head in every layer."""

    weights: int
    cache: int


def held(config: ModelConfig, dtype: torch.dtype, ranks: int, entries: int, rows: int = 1) -> Held:
    """What the first rank holds, which no other has more of.

    Raises:
        ParallelError: the model does not divide among so many.
    """
    first = Ranks(0, ranks)
    share = share_of(config, first)
    weights = 0
    for name, shape in expected_shapes(config).items():
        cut = cut_of(name, shape, first)
        assert cut is not None, "rank 0 has a part of everything"
        weights += torch.Size(shape).numel() // shape[cut.dim] * (cut.part.stop - cut.part.start)
    return Held(weights * dtype.itemsize, rows * entries * share.kv_bytes_per_token(dtype))


HEADS = (
    "ranks",
    "a token",
    "a prompt",
    "its eviction",
    "a later eviction",
    "weights of a rank",
    "cache of a rank, of a full one",
)


def sizes(config: ModelConfig) -> list[int]:
    """Of 2, 4 and 8 ranks those that can share the model.

    Raises:
        ParallelError: not even 2 can.
    """
    possible = [ranks for ranks in (2, 4, 8) if config.num_kv_heads % ranks == 0]
    if not possible:
        share_of(config, Ranks(0, 2))  # says why
    return possible


def cells(config: ModelConfig, dtype: torch.dtype, policy: Policy, length: int, ranks: int) -> list[str]:
    """A line of a table: a token, a prompt of `length` tokens, its eviction and a later one, and what a rank holds.

    Milliseconds are those of LINKS.

    Args:
        policy: with a budget in entries, that evicts while decoding.
    Raises:
        ParallelError: the model does not divide among so many.
    """
    assert isinstance(policy.budget, int) and policy.interval, "a budget in entries, and evictions while decoding"
    most = policy.budget + policy.interval
    has, full = held(config, dtype, ranks, most), held(config, dtype, ranks, length).cache
    steps = (
        of_tokens(config, dtype),
        of_tokens(config, dtype, tokens=length, chunks=-(-length // CHUNK)),
        of_prompt_eviction(config, policy, ranks, length),
        of_eviction(config, policy, ranks, most),
    )
    return [
        str(ranks),
        *(f"{one.calls:,} calls, {_size(one.bytes)}, {_times(one, ranks)} ms" for one in steps),
        _size(has.weights),
        f"{_size(has.cache)} of {_size(full)}",
    ]


def _times(one: Traffic, ranks: int) -> str:
    milliseconds = [1e3 * one.seconds(ranks, link) for link in LINKS]
    return " / ".join(f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in milliseconds)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
