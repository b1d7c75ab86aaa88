"""Sparse prefill: which blocks of a prompt's attention are worth computing, estimated from the layer's own queries and keys.

Each pattern is a frozen dataclass with one pure method, `choose`: queries and keys of a layer in, a BlockMap out (bool per query
head, block of queries and block of keys). modeling/sparse.py computes what it lists; eviction after the prompt sees all entries.

    flexprefill                             a pattern with its published options
    vertical-slash:vertical=500:slash=700   with options; so it is written on the command line, and so str() shows it

Letters: L prompt length, M = ceil(L / block) blocks of it, W last queries, H query heads, K KV heads, G = H / K, D head dim.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.config import ModelConfig
from modeling.forward import Choose
from modeling.masks import visible
from modeling.sparse import BlockMap, reachable
from restkv.errors import PromptError

BLOCKS = (32, 64, 128)  # what FlexAttention reads well and a chunk of rows is a multiple of


@dataclass(frozen=True)
class Pattern:
    """A rule for what a prompt's attention computes.

    Raises:
        PromptError: an option out of its range.
    """

    name: ClassVar[str]

    block: int = 128  # tokens per block of queries and of keys

    def __post_init__(self) -> None:
        self._require(self.block in BLOCKS, "block", f"give {', '.join(map(str, BLOCKS[:-1]))} or {BLOCKS[-1]}")

    def dense(self, length: int) -> bool:
        """Whether a prompt of so many tokens is so short that its attention is left dense."""
        raise NotImplementedError

    def choose(self, q_HLD: Tensor, k_KLD: Tensor, scale: float, softcap: float | None, window: int | None) -> BlockMap:
        """The blocks of a layer to compute.

        Args:
            q_HLD, k_KLD: of the whole prompt, after RoPE; L such that not self.dense(L).
            scale, softcap, window: the layer's; blocks beyond a sliding window are never listed.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        changed = [(name, value) for name, value in given if value != _default(type(self), name)]
        return ":".join([self.name, *(f"{name}={value}" for name, value in changed)])

    def _require(self, valid: bool, option: str, mend: str) -> None:
        if not valid:
            raise PromptError(f"prefill {self.name}: {option}={getattr(self, option)}; {mend}")

    def _map(self, listed_HMM: Tensor, window: int | None) -> BlockMap:
        """What is listed, within reach and with the diagonal, so that no query is left without a key."""
        blocks = listed_HMM.shape[-1]
        diagonal_MM = torch.eye(blocks, dtype=torch.bool, device=listed_HMM.device)
        reach_MM = reachable(blocks, self.block, window, listed_HMM.device)
        return BlockMap((listed_HMM | diagonal_MM) & reach_MM, self.block)


@dataclass(frozen=True)
class AShape(Pattern):
    """The first tokens and a local window, the same for all heads (StreamingLLM's shape as a prefill; MInference's "stream_llm").

    Published: key k is computed for query q if k < sinks or q - k < local; here all of a block that holds one such pair is
    (docs/sources.md §3.2).
    """

    name: ClassVar[str] = "a-shape"

    sinks: int = 128  # first tokens
    local: int = 3968  # newest tokens of each query, itself included

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.sinks >= 0, "sinks", "give at least 0")
        self._require(self.local >= 1, "local", "give at least 1")

    def dense(self, length: int) -> bool:
        return length <= max(self.local, self.block)

    def choose(self, q_HLD: Tensor, k_KLD: Tensor, scale: float, softcap: float | None, window: int | None) -> BlockMap:
        heads, length, _ = q_HLD.shape
        blocks = -(-length // self.block)
        column_M = torch.arange(blocks, device=q_HLD.device)
        listed_MM = (column_M * self.block < self.sinks) | reachable(blocks, self.block, self.local, q_HLD.device)
        return self._map(listed_MM.expand(heads, -1, -1), window)


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Columns and diagonals that the last 64 queries attend to most (MInference, arXiv 2407.02490; docs/sources.md §3.2).

    The defaults are what MInference takes for a model it has no table of; its table for Llama-3.1-8B has (vertical, slash) of
    (100, 800), (1000, 6096), (30, 800), (3500, 100) and (500, 700), chosen head by head by a search that is not part of this.

    Departure: columns outside of the diagonals' blocks are computed by MInference one by one, here with the blocks that hold
    them, which is more. What a diagonal computes is the same, where MInference's ranges fall on whole blocks of 64.
    """

    name: ClassVar[str] = "vertical-slash"

    QUERIES: ClassVar[int] = 64  # observed
    FIRST: ClassVar[int] = 30  # columns always kept
    NEAREST: ClassVar[int] = 100  # distances always kept

    block: int = 64
    vertical: int = 1000  # columns
    slash: int = 6096  # distances between query and key

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.vertical >= 30, "vertical", "give at least 30: the first 30 columns are always kept")
        self._require(self.slash >= 50, "slash", "give at least 50: the nearest are always kept")

    def dense(self, length: int) -> bool:
        return length <= max(self.vertical, self.slash, self.block)

    def choose(self, q_HLD: Tensor, k_KLD: Tensor, scale: float, softcap: float | None, window: int | None) -> BlockMap:
        vertical_HL, slash_HL = vertical_and_slash(q_HLD[:, -self.QUERIES :], k_KLD, scale, softcap, window)
        vertical_HL[:, : self.FIRST] = torch.inf
        slash_HL[:, : self.NEAREST] = torch.inf
        column_HM = _blocks(_best(vertical_HL, self.vertical), self.block).any(-1)
        distance_HMb = _blocks(_best(slash_HL, self.slash), self.block)
        # Queries of one block are a distance that is no multiple of the block from keys of two.
        touched_HM = distance_HMb.any(-1)
        touched_HM[:, 1:] |= distance_HMb[:, :-1, 1:].any(-1)
        return self._map(column_HM[:, None] | _diagonals(touched_HM), window)


@dataclass(frozen=True)
class FlexPrefill(Pattern):
    """Per head as many vertical and slash blocks as hold `gamma` of the last queries' attention; where pooled queries and keys
    predict that attention well, their estimate for every block of queries besides (Lai et al. 2025, FlexPrefill;
    docs/sources.md §3.1).

    The defaults are those of the authors' patch; their README has min_budget 512, their scripts gamma 0.95 for Llama-3.1-8B.

    Departures: distances are pooled from 0 (published: from the far end, which differs where L is no multiple of the block);
    numbers of blocks are counted in blocks of `block` (published: of 128, whatever the block); a block without any attention
    counts as 0 log 0 = 0 in the divergence (published: NaN, which is taken for a bad estimate); a last block that is not full
    is averaged over the tokens it has.
    """

    name: ClassVar[str] = "flexprefill"

    gamma: float = 0.9  # share of the attention to cover
    tau: float = 0.1  # largest distance at which the pooled estimate is trusted; 0: never
    min_budget: int = 1024  # tokens of keys, at least
    max_budget: int | None = None  # at most

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.gamma <= 1, "gamma", "give a share above 0 and up to 1")
        self._require(self.tau >= 0, "tau", "give at least 0")
        self._require(self.min_budget >= 1, "min_budget", "give at least 1")
        valid = self.max_budget is None or self.max_budget >= self.min_budget
        self._require(valid, "max_budget", f"give at least min_budget, {self.min_budget}")

    def dense(self, length: int) -> bool:
        return length <= max(2, -(-self.min_budget // self.block)) * self.block

    def choose(self, q_HLD: Tensor, k_KLD: Tensor, scale: float, softcap: float | None, window: int | None) -> BlockMap:
        last_HWD = q_HLD[:, -self.block :]
        vertical_HL, slash_HL = vertical_and_slash(last_HWD, k_KLD, scale, softcap, window)
        column_HM, distance_HM = (_blocks(x_HL, self.block).sum(-1) for x_HL in (vertical_HL, slash_HL))
        k_HMD = _block_means(k_KLD, self.block).repeat_interleave(len(q_HLD) // len(k_KLD), 0)
        q_HMD = _block_means(q_HLD, self.block)
        reach_MM = reachable(k_HMD.shape[1], self.block, window, q_HLD.device)

        def pooled(q_XD: Tensor, head: slice | int, seen: Tensor) -> Tensor:
            logits = _capped(q_XD @ k_HMD[head].mT * scale, softcap)
            return logits.masked_fill(~seen, -torch.inf).softmax(-1)

        guess_HM = pooled(last_HWD.to(k_HMD.dtype).mean(1, keepdim=True), slice(None), reach_MM[-1])[:, 0]
        aware_H = _js_distance(guess_HM, column_HM) < self.tau

        least = -(-self.min_budget // self.block)
        max_blocks = k_HMD.shape[1] if self.max_budget is None else -(-self.max_budget // self.block)
        counts = [
            ((self._covering(x_HL) + 1) // self.block + 1)
            .clamp(least, max(least, max_blocks))
            .masked_fill(aware_H, least)
            for x_HL in (vertical_HL, slash_HL)
        ]
        column_HM[:, 0] = distance_HM[:, 0] = torch.inf
        listed_HMM = _best(column_HM, counts[0])[:, None] | _diagonals(_best(distance_HM, counts[1]))
        for head in aware_H.nonzero().flatten().tolist():  # sync: few heads, each with M x M numbers to sort
            flat = pooled(q_HMD[head], head, reach_MM).flatten().double()
            value, order = flat.sort(descending=True, stable=True)
            # Over all rows together: so many of the largest that their sum reaches gamma x rows. Whole rows often add up to just
            # that, whatever rounding says.
            enough = self.gamma * len(reach_MM) - 1e-9
            some = order[(value.cumsum(0) - value < enough) & (value > 0)]
            listed_HMM[head].view(-1)[some] = True
        return self._map(listed_HMM, window)

    def _covering(self, x_HL: Tensor) -> Tensor:
        """How many of the largest of each head stay within gamma, [H]."""
        return (x_HL.double().sort(-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1)


PATTERNS: dict[str, type[Pattern]] = {pattern.name: pattern for pattern in (FlexPrefill, VerticalSlash, AShape)}
PREFILLS = ("dense", "chunked", *PATTERNS)


def parse_prefill(text: str) -> Pattern | None:
    """The pattern that a text names, NAME[:OPTION=VALUE]...; None for "dense" and "chunked", which attend to everything.

    Raises:
        PromptError: an unknown name or option, or a value that cannot be.

    >>> parse_prefill("a-shape:block=32:sinks=4:local=64")
    AShape(block=32, sinks=4, local=64)
    >>> parse_prefill("dense") is None
    True
    """
    name, *rest = text.split(":")
    if name not in PREFILLS or (rest and name not in PATTERNS):
        raise PromptError(f"prefill {text!r} is not known; give {', '.join(PREFILLS[:-1])} or {PREFILLS[-1]}")
    if name not in PATTERNS:
        return None
    cls = PATTERNS[name]
    known = {field.name: field.type for field in fields(cls)}
    options: dict[str, Any] = {}
    for part in rest:
        option, _, value = part.partition("=")
        if option not in known:
            raise PromptError(f"prefill {text!r}: {part!r} is not OPTION=VALUE with one of {', '.join(known)}")
        try:
            options[option] = float(value) if known[option] == "float" else int(value)
        except ValueError:
            raise PromptError(f"prefill {text!r}: {option} is a number, not {value!r}") from None
    return cls(**options)


def chooser(pattern: Pattern | None, config: ModelConfig, window: int | None, length: int) -> Choose | None:
    """A pattern for the queries and keys of one layer alone; None where all is computed: no pattern, or a short prompt."""
    if pattern is None or pattern.dense(length):
        return None
    return lambda q_HLD, k_KLD: pattern.choose(q_HLD, k_KLD, config.attn_scale, config.attn_softcap, window)


# -- estimates


def vertical_and_slash(
    q_HWD: Tensor, k_KLD: Tensor, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Mean attention [H, L] of the last W queries by column, and by distance between query and key; each sums to 1.

    float32 (float64 for float64 queries); one head at a time, so that the largest temporary has W x L numbers.
    """
    heads, _, _ = q_HWD.shape
    length = k_KLD.shape[1]
    q_HWD = q_HWD[:, -length:].to(_precision(q_HWD))
    W = q_HWD.shape[1]
    column_L = torch.arange(length, device=q_HWD.device)
    seen_WL = visible(column_L, column_L[-W:, None], window)
    vertical_HL = q_HWD.new_empty(heads, length)
    slash_HL = torch.empty_like(vertical_HL)
    for head in range(heads):
        k_LD = k_KLD[head // (heads // len(k_KLD))].to(q_HWD.dtype)
        logits_WL = _capped(q_HWD[head] @ k_LD.mT * scale, softcap)
        weights_WL = logits_WL.masked_fill_(~seen_WL, -torch.inf).softmax(-1)
        vertical_HL[head] = weights_WL.mean(0)
        # Query w = L - W + i is L - 1 - c + i - (W - 1) away from column c: with columns reversed and row i moved by i places,
        # what is equally far away stands in one column. Rows of L + W laid out as rows of L + W - 1 move just so.
        skewed = F.pad(weights_WL.flip(-1), (0, W)).flatten()[: W * (length + W - 1)].view(W, length + W - 1)
        slash_HL[head] = skewed[:, W - 1 :].mean(0)
    return vertical_HL, slash_HL


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _best(x_HN: Tensor, count: int | Tensor) -> Tensor:
    """Bool [H, N]: the largest of each row, count of them ([H] or the same for all); of equal ones the first."""
    order_HN = x_HN.argsort(dim=-1, descending=True, stable=True)
    wanted = count[:, None] if isinstance(count, Tensor) else count
    ranked_HN = (torch.arange(x_HN.shape[1], device=x_HN.device) < wanted).expand_as(order_HN)
    return torch.zeros_like(x_HN, dtype=torch.bool).scatter_(1, order_HN, ranked_HN)


def _blocks(x_HL: Tensor, size: int) -> Tensor:
    """[H, M, size], the last block filled up with zeros."""
    return F.pad(x_HL, (0, -x_HL.shape[1] % size)).unflatten(1, (-1, size))


def _diagonals(distance_HM: Tensor) -> Tensor:
    """[H, M, M]: the block of keys that is d blocks before the block of queries, for every d that is marked."""
    block_M = torch.arange(distance_HM.shape[1], device=distance_HM.device)
    return distance_HM[:, (block_M[:, None] - block_M).clamp(min=0)]


def _block_means(x_XLD: Tensor, size: int) -> Tensor:
    """Means [X, M, D] over blocks of tokens, in float32 at least; the last block's over the tokens it has."""
    whole = x_XLD.shape[1] // size * size
    means = x_XLD[:, :whole].unflatten(1, (-1, size)).mean(2, dtype=_precision(x_XLD))
    rest = x_XLD[:, whole:]
    return torch.cat([means, rest.mean(1, keepdim=True, dtype=means.dtype)], 1) if rest.shape[1] else means


def _js_distance(p_HM: Tensor, q_HM: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm), [H]."""
    middle_HM = (p_HM + q_HM) / 2
    halves = [(torch.special.xlogy(x, x) - torch.special.xlogy(x, middle_HM)).sum(-1) / 2 for x in (p_HM, q_HM)]
    return sum(halves[1:], halves[0]).clamp(min=0).sqrt()


def _default(cls: type[Pattern], name: str) -> Any:
    field = next(field for field in fields(cls) if field.name == name)
    assert field.default is not MISSING
    return field.default
