"""ReST-KV (ICLR 2026, arXiv 2605.08840): keep the entries whose removal would change the layer's output most.

Deleting entry n and renormalising the softmax moves one head's output o by a_n / (1 - a_n) * (o - v_n), exactly. The
score is the length of that move after W_O, smoothed over the last queries (their mean, or an EMA) and over neighbouring
entries (a window that widens and shifts with the drift of attention).

Letters: B batch rows, H query heads, K KV heads, G = H/K (g and j run over a group), C entries of one head (columns),
D head dim, W observed queries, Q queries scored one by one (W, or 1 once attention has been averaged), X = H or K, F coordinates
after W_O (restkv.observe.root_of).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from restkv import pooling
from restkv.budgets import Allocation
from restkv.change import strongest_change
from restkv.drift import Drift
from restkv.errors import PolicyError
from restkv.observe import Observation, nothing
from restkv.pieces import fixed, pieces
from restkv.policies.base import TOO_MANY, Policy, is_number
from restkv.pooling import WIDEST
from restkv.probes import WINDOW

LEAST_SCALE = 0.01  # a kernel is at most 2 / scale times as wide as the cache
MOST_TAU = 16  # higher powers of a length leave the range of float32
_PAPER = {"alpha": 0.3, "budget_by": "uniform"}
_SCRIPTS = {**_PAPER, "granularity": "query", "interval": None}
_STRONGEST = {
    "aggregate": "indicator",
    "reduction": "max",
    "relative": True,
    "pooling": "none",
    "gqa": "max",
    "sinks": 4,
}


@dataclass(frozen=True)
class ReSTKV(Policy):
    """Output-change scores with temporal and spatial smoothing (docs/sources.md §1; paper and code compared in docs/methods.md).

    With A_w the softmax of observed query w over all columns and weights m_w of the EMA (or the mean):
        aggregate="attention" (released code):  a = sum_w m_w A_w,  o = sum_n a_n v_n over the past,
                                                I_n = a_n / (1 - a_n) * ||(o - v_n) W_O||^tau
        aggregate="indicator" (paper, Eq. 7):   I_n = sum_w m_w A_wn / (1 - A_wn) * ||(o_w - v_n) W_O||,
                                                o_w = sum_n A_wn v_n over all columns
    The second is the measured change of the output, the first is biased by the window's missing mass (docs/methods.md).

    gqa="joint" scores the removal of an entry that G query heads share by the change of their summed outputs,
    ||sum_g a_g / (1 - a_g) (o_g - v) W_O^g||: exact for one removal, where a mean or a maximum over the group is not.
    It is smoothed as one head, with the mean drift of its group.

    Where the defaults depart from the paper they follow measurements (docs/results.md): one budget for the whole model
    instead of one for every head, and the plain mean over the observed queries instead of an EMA. The preset "paper" is
    the paper's choice in both. Presets named after its scripts fix what these ran, with one set per query head (as released:
    G times the bytes of a KV-head cache of that budget) and one eviction, after the prompt: "paper-longbench" (floor 5;
    also needle), "paper-ruler" (floor 21; also InfiniteBench), "eq7" (floor 5, the paper's own indicator). Options override
    a preset: get_policy("restkv", preset="paper-ruler", budget=1024, granularity="kv"). Two are ours (docs/probes.md):
    "replay" for a context that is compressed before any question is known, "draft" where the question is in sight: the largest
    relative change over the queries of a replay, or over the prompt's own and eight drafts'.

    tau, `normalize` and gqa="joint" are refused where they would have no effect or no meaning.
    """

    name: ClassVar[str] = "restkv"
    exchanges: ClassVar[str | None] = "nothing"
    reductions: ClassVar[tuple[str, ...]] = ("mean", "max", "joint")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": _PAPER,
        "paper-longbench": {**_SCRIPTS, "kernel_size": 5},
        "paper-ruler": {**_SCRIPTS, "kernel_size": 21},
        "eq7": {**_SCRIPTS, "kernel_size": 5, "aggregate": "indicator"},
        "replay": {**_STRONGEST, "window": 8, "probe": "replay"},
        "draft": {**_STRONGEST, "probe": "prompt+draft:8"},
    }

    budget_by: str | Allocation | None = None
    alpha: float | None = None  # EMA weight of the newest query, 0.3 in the paper; None: the mean over all observed
    scale: float = 2000  # beta: entries of drift that widen the kernel by 2 and shift it by 1
    kernel_size: int = 5  # odd; the narrowest adaptive kernel (1 = the paper's), or the fixed one of "avg" and "max"
    tau: float = 1.0  # exponent of the output change, aggregate="attention" only; 0: attention alone, a / (1 - a)
    aggregate: str = "attention"  # what the EMA averages: "attention" or the finished "indicator"
    drift: str = "released"  # "symmetric" leaves out the observation window's columns and the shift of +1 at zero drift
    pooling: str = "adaptive"  # or "avg", "max" (fixed kernel, zeros beyond the ends), "none"
    output_weight: bool = True  # False: ||o - v|| instead of ||(o - v) W_O||
    # max over w of Eq. 7's summands in place of their mean; with `relative` each over the length of its query's residual stream.
    reduction: str = "mean"  # over the observed queries; "max" suits a probe of many, aggregate="indicator" only
    relative: bool = False  # reduction="max": divide by the length of the residual stream where the query comes from
    normalize: bool = False  # divide each query's indicator by the length of its output, aggregate="indicator" only

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.window >= 1, "window", "at least one query has to be observed; give 1 or more")
        valid = self.alpha is None or (is_number(self.alpha) and 0 < self.alpha <= 1)
        self._require(valid, "alpha", "give a number above 0, at most 1, or None for the plain mean")
        valid = is_number(self.scale) and LEAST_SCALE <= self.scale < TOO_MANY
        self._require(valid, "scale", f"give a number of at least {LEAST_SCALE}")
        valid = is_number(self.tau) and 0 <= self.tau <= MOST_TAU
        self._require(valid, "tau", f"give a number of at least 0, at most {MOST_TAU}")
        valid = not isinstance(self.kernel_size, bool) and self.kernel_size in range(1, WIDEST, 2)
        self._require(valid, "kernel_size", f"give an odd number of at least 1, below {WIDEST}")
        self._one_of("aggregate", ("attention", "indicator"))
        self._one_of("reduction", ("mean", "max"))
        self._one_of("drift", ("released", "symmetric"))
        self._one_of("pooling", ("adaptive", "avg", "max", "none"))
        attention, joint = self.aggregate == "attention", self.gqa == "joint"
        self._require(
            self.tau == 1 or (attention and self.output_weight and not joint),
            "tau",
            'only aggregate="attention" with output_weight=True and gqa="mean" or "max" has an exponent; leave it at 1',
        )
        self._require(
            not (self.normalize and attention), "normalize", 'only aggregate="indicator" has per-query outputs'
        )
        strongest = self.reduction == "max"
        fits = not attention and self.alpha is None and not self.normalize and self.output_weight and not joint
        self._require(
            not strongest or fits,
            "reduction",
            'the largest change is that of a single query and head; set aggregate="indicator" and leave out alpha, normalize, '
            "output_weight and gqa=joint",
        )
        self._require(strongest or not self.relative, "relative", 'only reduction="max" divides by it; leave it out')
        self._require(not joint or self.output_weight, "gqa", "joint adds up projected outputs; set output_weight=True")
        self._require(not joint or self.granularity == "kv", "gqa", "query heads with sets of their own share no entry")

    @property
    def needs(self) -> frozenset[str]:
        """The roots of W_O: per query head, or of each group for gqa="joint"."""
        if not self.output_weight:
            return frozenset()
        return frozenset({"group_root" if self.gqa == "joint" else "root"})

    @property
    def in_pieces(self) -> int:
        """Nobody has measured graphs of the strongest change, and of other probes."""
        if self.reduction == "max" or self.probe != WINDOW:
            return 0
        return 1 if self.aggregate == "attention" else self.window

    def importance(self, obs: Observation) -> Tensor:
        """Smoothed output change: [B, H, C], or [B, K, C] for gqa="joint"."""
        if self.pooling == "none":
            return self._shared_change(obs)
        order_BHC = obs.order
        drift = self._drift_of(obs, order_BHC) if self.pooling == "adaptive" else None
        score_BXC = self._shared_change(obs) if obs.memo is not None else self._output_change(obs, drift)
        step = obs.q.shape[1] // score_BXC.shape[1]  # one line of entries per scored head
        pool: Callable[[Tensor, Tensor], Tensor]
        if drift is not None:
            kernel_BX, shift_BX = self._adapt(reduce(drift.mean(), "B (X G) -> B X", "mean", G=step))
            widest = max(self.kernel_size, 2 * math.floor(obs.pos.shape[-1] / self.scale) + 1)
            pool = partial(pooling.shifted_average, kernel_BX=kernel_BX, shift_BX=shift_BX, widest=widest)
        else:
            fixed = pooling.average if self.pooling == "avg" else pooling.maximum
            pool = lambda line_BXC, _: fixed(line_BXC, self.kernel_size)  # noqa: E731
        return pooling.over_past(pool, score_BXC, obs.past[:, ::step], order_BHC[:, ::step])

    def _drift_of(self, obs: Observation, order_BHC: Tensor) -> Drift:
        """Empty, to be made of the same logits as the change; but where policies share these, whole and shared too."""
        kept_B, most = self._past_budget(obs)
        if obs.memo is None:
            return Drift(obs, order_BHC, kept_B, most, self.drift)

        def make() -> Drift:
            drift = Drift(obs, order_BHC, kept_B, most, self.drift)
            for rows in obs.rows():
                drift.add(rows)
            return drift

        return make() if kept_B is not None else obs.once(("drift", self.drift, most), make)

    def _shared_change(self, obs: Observation) -> Tensor:
        """_output_change, which depends on no budget: once for all policies that share the observation."""
        if obs.memo is None:
            return self._output_change(obs)
        names = ("alpha", "tau", "aggregate", "output_weight", "reduction", "relative", "normalize")
        code = type(self)._output_change, type(self)._change, type(self)._joint_change  # a subclass may have its own
        key = "change", self.gqa == "joint", *code, *(getattr(self, name) for name in names)
        return obs.once(key, lambda: self._output_change(obs))

    def _output_change(self, obs: Observation, drift: Drift | None = None) -> Tensor:
        """Equation 7 for every entry, combined over the observed queries: [B, H, C] or [B, K, C].

        drift: to be made of the same logits.
        """
        if self.reduction == "max":
            return strongest_change(obs, self.relative, None if drift is None else drift.add)
        weight_BW = _query_weights(obs.q_pos, self.alpha).to(obs.dtype)
        averaged = self.aggregate == "attention"
        a_BHC, lse_BHW = nothing(obs), obs.q.new_zeros(obs.q.shape[:3], dtype=obs.dtype)
        whole_BHC = nothing(obs) if obs.gap else a_BHC  # an output is of all that is attended to, whatever counts
        top_BHW = torch.zeros_like(lse_BHW, dtype=torch.long)
        for rows in obs.rows():
            if drift is not None:
                drift.add(rows)
            if averaged:
                rows.add_attention(a_BHC, weight_BW)
                if obs.gap:
                    rows._replace(near_BHWN=None).add_attention(whole_BHC, weight_BW)
            else:
                lse_BHW[:, rows.heads, rows.queries] = rows.normalizer_BHW()
                top_BHW[:, rows.heads, rows.queries] = rows.logits_BHWC.argmax(-1)
        attention: Callable[[slice], Tensor]  # columns -> [B, H, Q, C]: what counts (Observation.gap) ...
        whole: Callable[[slice], Tensor]  # ... and all there is
        if averaged:
            attention, weight_BQ = (lambda c: a_BHC[:, :, None, c]), torch.ones_like(weight_BW[:, :1])
            whole = lambda c: whole_BHC[:, :, None, c]  # noqa: E731
            out = _outputs(obs, whole, whole_BHC.argmax(-1)[..., None], obs.past)
        else:
            attention, weight_BQ = partial(obs.attention, lse_BHW), weight_BW
            whole = partial(replace(obs, gap=0).attention, lse_BHW)
            out = _outputs(obs, whole, top_BHW, obs.held >= 0)
        B, K, G, Q, D = out.o_BKGQD.shape
        roots_KGDF = _roots(obs) if self.output_weight else None
        # For a query's top entry 1 - a is the others' mass, and o - v is that mass times (rest - v).
        power_BKGQ1 = out.mass_BKGQ1.clamp_min(torch.finfo(obs.dtype).eps) ** (self.tau - 1)
        o_BKGQF, rest_BKGQF, top_v_BKGQF = (
            _projected(roots_KGDF, x_BKGQD) for x_BKGQD in (out.o_BKGQD, out.rest_BKGQD, out.top_v_BKGQD)
        )
        ends = _Ends(o_BKGQF, rest_BKGQF, top_v_BKGQF, power_BKGQ1, out.top_BKGQ1)

        def inputs(columns: slice) -> tuple[Any, ...]:
            index_C = torch.arange(columns.start, columns.stop, device=obs.k.device)
            values_BKCX = _shared_values(roots_KGDF, obs.v[:, :, columns].to(obs.dtype))
            return self, ends, attention(columns), whole(columns) if obs.gap else None, index_C, values_BKCX, weight_BQ

        if obs.run is not None:
            parts = [obs.run(_changes, *fixed(inputs(columns)))[..., had:] for columns, had in pieces(obs.k.shape[2])]
        else:
            B, K, G, Q, D = out.o_BKGQD.shape
            per_column = B * K * G * D * (Q if self.gqa == "joint" else max(1, Q // D))
            parts = [_changes(*inputs(columns)) for columns, _ in obs.chunks(per_column)]
        return torch.cat(parts, -1)

    def _change(self, odds_BKGQC: Tensor, top_BKGQC: Tensor, ends: _Ends, values: Sequence[Tensor]) -> Tensor:
        """odds * ||(o - v) W_O^h||^tau per query head, with `rest` in place of o for the top entry: [B, H, Q, C].

        values: of each head of a group [B, K, C, F].
        """
        length_BKGQC = torch.stack([_distances(ends.o_BKGQF[:, :, g], v_BKCF) for g, v_BKCF in enumerate(values)], 2)
        length_BKGQC = torch.where(top_BKGQC, _length(ends.rest_BKGQF - ends.top_v_BKGQF), length_BKGQC)
        change_BKGQC = odds_BKGQC * length_BKGQC**self.tau
        if self.normalize:
            change_BKGQC = change_BKGQC / _length(ends.o_BKGQF).clamp_min(_tiny(odds_BKGQC.dtype))
        return rearrange(change_BKGQC, "B K G Q C -> B (K G) Q C")

    def _joint_change(self, odds_BKGQC: Tensor, top_BKGQC: Tensor, ends: _Ends, values: Sequence[Tensor]) -> Tensor:
        """||sum_g odds_g (o_g - v) W_O^g|| per KV head, with `rest` in place of o for a head's top: [B, K, Q, C]."""
        move_BKQCF = odds_BKGQC.new_zeros(())
        for g, v_BKCF in enumerate(values):
            top_BKQC1 = top_BKGQC[:, :, g, ..., None]
            from_BKQCF = torch.where(top_BKQC1, ends.rest_BKGQF[:, :, g, :, None], ends.o_BKGQF[:, :, g, :, None])
            move_BKQCF = move_BKQCF + odds_BKGQC[:, :, g, ..., None] * (from_BKQCF - v_BKCF[:, :, None])
        change_BKQC = _length(move_BKQCF)[..., 0]
        if self.normalize:
            change_BKQC = change_BKQC / _length(ends.o_BKGQF.sum(2)).clamp_min(_tiny(odds_BKGQC.dtype))
        return change_BKQC

    def _past_budget(self, obs: Observation) -> tuple[Tensor | None, int]:
        """Entries that each row's budget leaves for the past, at least 1: [B], and a bound the host knows; None where all rows
        have that many.
        """
        budget = obs.budget_B if obs.budget_B is not None else self.budget
        known = (budget,) if isinstance(budget, int) else obs.budgets
        if not isinstance(budget, int | Tensor):
            raise PolicyError(f'restkv: budget {budget!r}: pooling="adaptive" needs a number of entries (obs.budget_B)')
        max_count = obs.pos.shape[-1] if known is None else max(1, max(known) - self.window)
        if isinstance(budget, int) or (known is not None and len(set(known)) == 1):
            return None, max_count
        return (budget - self.window).clamp_min(1), max_count

    def _adapt(self, drift_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel and shift of the adaptive window from the drift (docs/sources.md §1.2 item 7), each [B, X] int."""
        unknown_BX = drift_BX.isnan()
        steps_BX = drift_BX.nan_to_num() / self.scale
        kernel_BX = (2 * steps_BX.abs().floor().long() + 1).clamp_min(self.kernel_size)
        shift_BX = steps_BX.trunc() if self.drift == "symmetric" else steps_BX.floor() + (steps_BX <= 0)
        return kernel_BX, shift_BX.long().masked_fill(unknown_BX, 0)


class _Ends(NamedTuple):
    """What a move of a head's output goes between, in coordinates whose lengths are those after W_O; see _Outputs."""

    o_BKGQF: Tensor
    rest_BKGQF: Tensor
    top_v_BKGQF: Tensor
    power_BKGQ1: Tensor  # what stands in for 1 / (1 - a) at the top entry
    top_BKGQ1: Tensor


def _changes(
    policy: ReSTKV,
    ends: _Ends,
    a_BHQC: Tensor,
    whole_BHQC: Tensor | None,
    index_C: Tensor,
    values_BKCX: Tensor,
    weight_BQ: Tensor,
) -> Tensor:
    """Equation 7 for the entries of some columns, [B, H, C] or [B, K, C]: what is computed column by column.

    Args:
        a_BHQC: what counts of the queries' attention; whole_BHQC: all of it, where that is more.
        index_C: which columns these are.
        values_BKCX: of all heads of a group (_shared_values).
    """
    K, G = ends.o_BKGQF.shape[1:3]
    a_BKGQC = rearrange(a_BHQC, "B (K G) Q C -> B K G Q C", K=K)
    whole_BKGQC = a_BKGQC if whole_BHQC is None else rearrange(whole_BHQC, "B (K G) Q C -> B K G Q C", K=K)
    top_BKGQC = index_C == ends.top_BKGQ1
    odds_BKGQC = torch.where(top_BKGQC, a_BKGQC * ends.power_BKGQ1, a_BKGQC / (1 - whole_BKGQC))
    values = values_BKCX.chunk(G, -1) if policy.output_weight else [values_BKCX] * G
    change = policy._joint_change if policy.gqa == "joint" else policy._change
    return torch.einsum("bxqc,bq->bxc", change(odds_BKGQC, top_BKGQC, ends, values), weight_BQ)


def _projected(root_KGDF: Tensor | None, x_BKGQD: Tensor) -> Tensor:
    """[B, K, G, Q, F]: coordinates whose lengths are those after W_O."""
    return x_BKGQD if root_KGDF is None else x_BKGQD @ root_KGDF


def _shared_values(root_KGDF: Tensor | None, v_BKCD: Tensor) -> Tensor:
    """The same of values, as each head of a group projects them: [B, K, C, G F]; or those that all share, as they are."""
    if root_KGDF is None:
        return v_BKCD
    return v_BKCD @ rearrange(root_KGDF, "K G D F -> K D (G F)")  # one product for the group, and no G copies of v


class _Outputs(NamedTuple):
    """A head's outputs per scored query, before W_O, and what they become without the most attended entry.

    The change a / (1 - a) * (o - v) is 0 / 0 for an entry that takes all attention, and rounding sends a sink's score to
    zero long before. Its equal a * (rest - v) has no such place, and only a query's top entry can have a > 1/2.
    """

    o_BKGQD: Tensor
    rest_BKGQD: Tensor  # output of all other entries, renormalised
    mass_BKGQ1: Tensor  # their attention, summed without the top: never 1 - a, which rounds
    top_BKGQ1: Tensor  # column of the most attended entry
    top_v_BKGQD: Tensor  # its value


def _outputs(obs: Observation, attention: Callable[[slice], Tensor], top_BHQ: Tensor, part_BHC: Tensor) -> _Outputs:
    """Outputs made of the entries in `part_BHC` only."""
    K, G, D = obs.k.shape[1], obs.group, obs.v.shape[3]
    top_BKGQ1 = rearrange(top_BHQ, "B (K G) Q -> B K G Q 1", K=K)
    B, _, _, Q, _ = top_BKGQ1.shape
    both_BKRD = torch.zeros(B, K, 2 * G * Q, D, dtype=obs.dtype, device=obs.q.device)  # with and without the top entry
    mass_BKGQ1 = torch.zeros_like(top_BKGQ1, dtype=obs.dtype)
    for columns, index_C in obs.chunks(B * K * max(2 * G * Q, D)):
        v_BKCD = obs.v[:, :, columns].to(obs.dtype)
        part_BKG1C = rearrange(part_BHC[:, :, columns], "B (K G) C -> B K G 1 C", K=K)
        a_BKGQC = rearrange(attention(columns), "B (K G) Q C -> B K G Q C", K=K)
        others_BKGQC = a_BKGQC.masked_fill(index_C == top_BKGQ1, 0)
        # The group as rows of one product: broadcasting v over it would copy v G times.
        both_BK2GQC = torch.stack([a_BKGQC, others_BKGQC], 2) * part_BKG1C[:, :, None]
        both_BKRD += rearrange(both_BK2GQC, "B K two G Q C -> B K (two G Q) C") @ v_BKCD
        mass_BKGQ1 += others_BKGQC.sum(-1, keepdim=True)
    o_BKGQD, rest_BKGQD = rearrange(both_BKRD, "B K (two G Q) D -> two B K G Q D", two=2, G=G)
    rest_BKGQD = rest_BKGQD / mass_BKGQ1.clamp_min(_tiny(obs.dtype))
    top_BKRD = repeat(top_BHQ, "B (K G) Q -> B K (G Q) D", K=K, D=D)
    top_v_BKGQD = rearrange(obs.v.gather(2, top_BKRD), "B K (G Q) D -> B K G Q D", G=G).to(obs.dtype)
    return _Outputs(o_BKGQD, rest_BKGQD, mass_BKGQ1, top_BKGQ1, top_v_BKGQD)


def _query_weights(q_pos_BW: Tensor, alpha: float | None) -> Tensor:
    """[B, W] float64, sum 1 over the queries a row has: EMA with the newest last (docs/sources.md §1.2 item 5), or their mean."""
    seen_BW = q_pos_BW >= 0
    count_B1 = seen_BW.sum(-1, keepdim=True)
    if alpha is None:
        return seen_BW / count_B1.clamp_min(1).double()
    W = q_pos_BW.shape[1]
    age_W = torch.arange(W - 1, -1, -1, device=q_pos_BW.device)
    decay_W = torch.pow(torch.full((), 1 - alpha, dtype=torch.float64, device=q_pos_BW.device), age_W)
    return decay_W.where(age_W == count_B1 - 1, alpha * decay_W) * seen_BW


def _roots(obs: Observation) -> Tensor:
    """[K, G, D, F] in obs.dtype."""
    assert obs.root is not None, "this policy needs the roots of W_O (Policy.needs)"
    return obs.root.to(obs.dtype).view(obs.k.shape[1], obs.group, *obs.root.shape[-2:])


def _distances(x_BKQF: Tensor, y_BKCF: Tensor) -> Tensor:
    """||x - y|| for every pair, [B, K, Q, C]: subtracted before anything is squared, and no [Q, C, F] in memory."""
    if torch.compiler.is_compiling():  # one loop, where cdist would copy both first
        return (x_BKQF[:, :, :, None] - y_BKCF[:, :, None]).square().sum(-1).sqrt()
    return torch.cdist(x_BKQF, y_BKCF, compute_mode="donot_use_mm_for_euclid_dist")


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _tiny(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny
