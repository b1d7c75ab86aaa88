"""The laws of an eviction policy, each in a few lines: on one observation, and (restkv/testing/sessions.py) on whole sessions.

A law says what is wrong, or None. Ties are excepted: of scores as good as equal either entry may stay.

Letters: B batch rows, K KV heads, X heads with a kept set of their own (K, or H for granularity "query"), C entries (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from restkv import observe
from restkv.observe import Observation
from restkv.policies import Policy
from restkv.testing import sessions
from restkv.testing.cases import Look
from restkv.testing.observed import poisoned
from restkv.testing.watch import chooses_itself, exact_counts

CLOSE, TIE = 1e-9, 1e-9  # relative: scores that are equal, and scores that are ties
FEW = 16  # elements: what a temporary may have while chunks are tried
PER_COLUMN = ("k", "v", "pos", "mass", "protected", "keep")  # fields of an observation that have columns
PER_ROW = ("q", "q_pos", "sizes", "budget_B", *PER_COLUMN)


class Choice:
    """What a policy makes of one observation: scores and kept sets, each computed once."""

    def __init__(self, policy: Policy, look: Look) -> None:
        self.policy, self.look = policy, look

    @cached_property
    def obs(self) -> Observation:
        return self.look.observed(self.policy)

    @cached_property
    def score(self) -> Tensor:
        """[B, X, C]."""
        return self.policy.score(self.obs)

    @cached_property
    def keep(self) -> Tensor:
        """Bool [B, X, C]."""
        return _keep(self.policy, self.obs)

    @cached_property
    def always(self) -> Tensor:
        """Bool [B, X, C]: the entries that no score can evict."""
        assert self.obs.protected is not None
        always_BXC = self.obs.protected.repeat_interleave(self.keep.shape[1] // self.obs.protected.shape[1], 1)
        return always_BXC & self.there

    @cached_property
    def there(self) -> Tensor:
        """Bool [B, X, C]: the entries that there are."""
        return (self.obs.held if self.policy.granularity == "query" else self.obs.pos) >= 0

    def differs(self, score_BXC: Tensor, keep_BXC: Tensor, rows: slice = slice(None)) -> str | None:
        """What is different in scores and choices that should be those of these rows; ties are not."""
        mine_BXC, kept_BXC = self.score[rows], self.keep[rows]
        counts_BXC = (self.there & ~self.always)[rows]
        if score_BXC.shape != mine_BXC.shape:
            return f"scores are {list(score_BXC.shape)} and not {list(mine_BXC.shape)}"
        gap_BXC = (score_BXC - mine_BXC).abs()  # NaN where both are -inf
        size_BXC = mine_BXC.abs().clamp_min(1e-3)
        if bool(((gap_BXC > CLOSE * size_BXC) & counts_BXC).any()) or bool(
            ((mine_BXC.isfinite() != score_BXC.isfinite()) & counts_BXC).any()
        ):
            return (
                f"{int(((gap_BXC > CLOSE * size_BXC) & counts_BXC).sum())} of {int(counts_BXC.sum())} scores are others"
            )
        other_BXC = keep_BXC != kept_BXC
        for row in range(len(other_BXC)):
            values = mine_BXC[row][other_BXC[row]]
            if len(values) and not float(values.max() - values.min()) <= TIE * max(1e-3, float(values.abs().max())):
                return f"{int(other_BXC[row].sum())} of {int(counts_BXC[row].sum())} entries stay or go otherwise"
        return None


def _keep(policy: Policy, obs: Observation) -> Tensor:
    """`keep` of rows that nothing has happened to."""
    return policy.keep(obs, [policy.start() for _ in range(len(obs.pos))] if policy.start() is not None else ())


# -- on one observation


def shapes(choice: Choice) -> str | None:
    """Scores are floats [B, X, C], -inf for padding and what a sliding window has passed; kept are entries that there are."""
    obs, score_BXC, keep_BXC = choice.obs, choice.score, choice.keep
    gone_BXC = ~choice.there | obs.hidden.repeat_interleave(choice.there.shape[1] // obs.hidden.shape[1], 1)
    want = list(choice.there.shape)
    if list(score_BXC.shape) != want or list(keep_BXC.shape) != want:
        return f"scores are {list(score_BXC.shape)}, kept sets {list(keep_BXC.shape)}; both should be {want}"
    if score_BXC.dtype != obs.dtype or keep_BXC.dtype != torch.bool:
        return f"scores are {score_BXC.dtype}, kept sets {keep_BXC.dtype}; they should be {obs.dtype} and torch.bool"
    if bool(score_BXC.isnan().any()):
        return "a score is NaN"
    if bool((score_BXC[gone_BXC] != -torch.inf).any()):
        return "padding, or an entry that no query can see again, scores more than -inf"
    return "an entry stays that is not there" if bool((keep_BXC & ~choice.there).any()) else None


def protection(choice: Choice) -> str | None:
    """Sinks, the newest entries and protected spans stay, whatever their score; the newest are no fewer than `window`."""
    policy, budget = choice.policy, choice.look.budget
    if policy.budget is not None and policy.newest(budget) < policy.window:
        return f"newest({budget}) is {policy.newest(budget)}, fewer than the window of {policy.window}"
    lost_BXC = choice.always & ~choice.keep
    if not bool(lost_BXC.any()):
        return None
    row, head, column = lost_BXC.nonzero()[0].tolist()
    position = int(choice.obs.pos[row, head * choice.obs.pos.shape[1] // lost_BXC.shape[1], column])
    return f"head {head} of row {row} loses position {position} of {int(choice.obs.q_pos[row, -1]) + 1}, which is protected"


def exact(choice: Choice) -> str | None:
    """As many entries stay as the budget says: in every head, or in all heads of a layer together where they share one."""
    policy, budget_B1 = choice.policy, torch.tensor(choice.look.budgets)[:, None]
    if policy.start() is not None or not exact_counts(policy):
        return None
    kept_BX, there_BX, always_BX = (x_BXC.sum(-1) for x_BXC in (choice.keep, choice.there, choice.always))
    if bool((always_BX > budget_B1).any()):  # an engine refuses that
        return None
    if policy.allocation.ragged:
        kept_BX, there_BX = kept_BX.sum(-1, keepdim=True), there_BX.sum(-1, keepdim=True)
        budget_B1 = budget_B1 * choice.keep.shape[1]
    due_BX = there_BX.minimum(budget_B1)
    wrong_BX = kept_BX > due_BX if chooses_itself(policy) else kept_BX != due_BX
    if not bool(wrong_BX.any()):
        return None
    row, head = wrong_BX.nonzero()[0].tolist()
    whose = "all heads" if policy.allocation.ragged else f"head {head}"
    return f"{whose} of row {row} keep {int(kept_BX[row, head])} of {int(there_BX[row, head])}, not {int(due_BX[row, head])}"


def repeated(choice: Choice) -> str | None:
    """The same observation gives the same bits again, and is left as it was."""
    first = choice.score, choice.keep
    fresh = choice.look.observed(choice.policy)
    for name in (field.name for field in fields(Observation)):
        value = getattr(choice.obs, name)
        if isinstance(value, Tensor) and not torch.equal(value, getattr(fresh, name)):
            return f"obs.{name} has been changed in place"
    again = choice.policy.score(fresh), _keep(choice.policy, fresh)
    if not all(torch.equal(mine, other) for mine, other in zip(first, again, strict=True)):
        return "the second call gives other scores, or keeps other entries, than the first"
    return None


def columns(choice: Choice) -> str | None:
    """Where an entry lies changes nothing."""
    order_C = torch.randperm(choice.obs.pos.shape[-1], generator=torch.Generator().manual_seed(choice.look.seed))
    moved = _with(choice.obs, PER_COLUMN, lambda part: part[:, :, order_C])
    back_C = order_C.argsort()
    return choice.differs(choice.policy.score(moved)[..., back_C], _keep(choice.policy, moved)[..., back_C])


def padding(choice: Choice) -> str | None:
    """What lies in columns and queries that are padding has no influence, nor has it whether there are more of them."""
    obs = poisoned(choice.obs, -7.0)
    if obs.mass is not None:
        obs = replace(obs, mass=obs.mass.masked_fill(~choice.there, 50.0))
    C = obs.pos.shape[-1]

    def longer(part: Tensor) -> Tensor:
        """With three columns more, copies of others."""
        return torch.cat([part, part[:, :, -1:].expand(*part.shape[:2], 3, *part.shape[3:])], 2)

    obs = _with(obs, PER_COLUMN, longer)
    obs.pos[..., C:] = -1
    if obs.protected is not None:
        obs.protected[..., C:] = False
    return choice.differs(choice.policy.score(obs)[..., :C], _keep(choice.policy, obs)[..., :C])


def rows(choice: Choice) -> str | None:
    """A row of a batch scores and keeps what it scores and keeps alone."""
    obs = choice.obs
    if len(obs.pos) == 1:
        return None
    for b in range(len(obs.pos)):
        seen_W, there_C = obs.q_pos[b] >= 0, (obs.pos[b] >= 0).any(0)
        if not bool(seen_W.any()):
            continue
        single = _with(obs, PER_ROW, lambda part, b=b: part[b : b + 1])  # type: ignore[misc]
        single = _with(single, PER_COLUMN, lambda part, there_C=there_C: part[:, :, there_C])  # type: ignore[misc]
        budgets = None if obs.budgets is None else obs.budgets[b : b + 1]
        single = replace(single, q=single.q[:, :, seen_W], q_pos=single.q_pos[:, seen_W], budgets=budgets)
        single = _with(single, ["sizes"], lambda part, seen_W=seen_W: part[..., seen_W])  # type: ignore[misc]
        score_1XC, keep_1XC = choice.score[b : b + 1].clone(), choice.keep[b : b + 1].clone()
        score_1XC[..., there_C] = choice.policy.score(single)
        keep_1XC[..., there_C] = _keep(choice.policy, single)
        if wrong := choice.differs(score_1XC, keep_1XC, slice(b, b + 1)):
            return f"row {b} alone: {wrong}"
    return None


def chunks(choice: Choice) -> str | None:
    """Computed in the smallest pieces (restkv.observe.chunk_elements), scores and kept sets are the same."""
    with patch.object(observe, "CHUNK_ELEMENTS_CPU", FEW):
        score_BXC, keep_BXC = choice.policy.score(choice.obs), _keep(choice.policy, choice.obs)
    return choice.differs(score_BXC, keep_BXC)


def _with(obs: Observation, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Observation:
    parts = {name: getattr(obs, name) for name in names}
    changed: dict[str, Any] = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(obs, **changed)


# -- on one large observation

CAP = 1 << 13  # elements: what a temporary may have in `memory`
LARGE: dict[str, Any] = {"kv_heads": 2, "group": 2, "columns": 1000, "head_dim": 16, "width": 12}
QUERIES = 64  # of a prompt that is observed as a whole


class Largest(TorchDispatchMode):
    """Remembers the largest tensor made, and what would have waited for a GPU."""

    WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.made_by, self.waits = 0, "", ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.waits = name
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor._is_view() and tensor.numel() > self.numel:
                self.numel, self.made_by = tensor.numel(), name
        return out


def memory(choice: Choice) -> str | None:
    """No temporary has a size of heads times queries times entries: each keeps to a few times what chunk_elements grants."""
    with patch.object(observe, "CHUNK_ELEMENTS_CPU", CAP), Largest() as largest:
        _keep(choice.policy, choice.obs)
    if largest.numel < 4 * CAP:
        return None
    return f"{largest.made_by} makes a tensor of {largest.numel} elements, where 4 times {CAP} are granted"


def waits(choice: Choice) -> str | None:
    """What would have to wait for a GPU, and so costs time there."""
    with Largest() as largest:
        _keep(choice.policy, choice.obs)
    return f"it waits for the device ({largest.waits}); fine on a CPU, slow on a GPU" if largest.waits else None


def traces(choice: Choice) -> str | None:
    """Why its score is no one graph for torch.compile; None: it is."""
    if chooses_itself(choice.policy):
        return "eager only: it chooses by a `keep` of its own"
    torch._dynamo.reset()
    try:
        ranking = torch.compile(choice.policy.ranking, fullgraph=True, backend="eager")
        score_BXC, *_ = ranking(choice.obs)
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"eager only: its score does not compile as one graph ({said.strip()[:200]})"
    finally:
        torch._dynamo.reset()
    return choice.differs(score_BXC, choice.keep)


@dataclass(frozen=True)
class Law:
    """One law: its name, what checks it (a Choice, or Runs of a session), and what to do where it is broken."""

    name: str
    check: Callable[[Any], str | None]
    mend: str

    @property
    def says(self) -> str:
        """What holds, in a sentence or two."""
        return " ".join((self.check.__doc__ or "").split())


OBSERVED = (
    Law(
        "shapes", shapes, "return [B, H, C] or [B, K, C] from importance in obs.dtype, and leave hiding to Policy.score"
    ),
    Law("protection", protection, "let keep contain obs.protected, and newest(budget) be at least window"),
    Law("counts", exact, "keep obs.budget_B entries of each head, protected ones included, and no more"),
    Law("again", repeated, "change nothing of the observation in place, and draw no random numbers but from positions"),
    Law("columns", columns, "tell entries by obs.pos; the column where one lies means nothing"),
    Law("padding", padding, "leave out columns where obs.pos is -1 and queries where obs.q_pos is -1"),
    Law("rows", rows, "reduce over heads, queries and columns, never over rows (dimension 0)"),
    Law("chunks", chunks, "let obs.rows() and obs.chunks(n) change nothing but the order of additions"),
)
LARGEST = (Law("memory", memory, "compute attention by obs.rows(), and what has a head dim by obs.chunks(n)"),)
NOTED = (Law("waits", waits, ""), Law("traces", traces, ""))  # no faults: the report tells them
SESSIONS = (
    Law("evictions", sessions.counts, "look at restkv.testing.Watch, which says what holds at every eviction"),
    Law("dense", sessions.dense, "look at slot_positions and keep: what is evicted has to be exactly what is masked"),
    Law(
        "compacted", sessions.compacted, "score an entry by its content and position, not by how many columns there are"
    ),
    Law("batch", sessions.alone, "score a row as it would be scored alone"),
)
GROUPS = (OBSERVED, LARGEST, NOTED, SESSIONS)  # as they are tried
