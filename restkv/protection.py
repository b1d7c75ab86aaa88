"""What no score can evict: sinks, the newest entries, and spans of positions that the user names.

Letters: B batch rows, K KV heads, C entries of one head (columns).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from restkv.errors import PolicyError
from restkv.policies.base import Policy


def protected(policy: Policy, pos_BKC: Tensor, newest_B: Tensor, next_pos_B: Tensor) -> Tensor:
    """Bool [B, K, C].

    Args:
        newest_B: how many of its newest entries each row protects (Policy.newest).
        next_pos_B: positions of the next tokens.
    """
    kept_BKC = (pos_BKC >= (next_pos_B - newest_B)[:, None, None]) | (pos_BKC < policy.sinks)
    for start, end in policy.protect:
        kept_BKC = kept_BKC | ((pos_BKC >= start) & (pos_BKC < end))
    return kept_BKC & (pos_BKC >= 0)


def check_protected(policy: Policy, length: int, budgets: Sequence[int]) -> None:
    """Refuse spans that leave a layer's budget no room: what is protected of so many tokens must fit into it.

    Raises:
        PolicyError: it does not.
    """
    for layer, budget in enumerate(budgets):
        count = _count(policy, length, budget)
        if count > budget < length:
            whose = f"budget {budget}" if len(set(budgets)) == 1 else f"layer {layer}'s budget {budget}"
            raise PolicyError(
                f"{whose} is smaller than the {count} protected entries (sinks, window and protected spans) of a text of "
                f"{length} tokens; raise the budget or protect less"
            )


def _count(policy: Policy, length: int, budget: int) -> int:
    """How many of the positions below `length` are protected in a head that may keep `budget` entries."""
    count = end = 0
    for start, stop in sorted([(0, policy.sinks), (length - policy.newest(budget), length), *policy.protect]):
        start, stop = max(start, end), min(stop, length)
        if start < stop:
            count, end = count + stop - start, stop
    return count
