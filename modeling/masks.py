"""Masks: every question about who may see whom is a question to `pos`.

An entry at position p is visible to a query at position q if p is a position at all (0 <= p: neither empty nor evicted), it is
not in the query's future (p <= q), and the layer's sliding window still reaches it (p > q - window).
"""

from __future__ import annotations

from torch import Tensor


def visible(pos: Tensor, q_pos: Tensor, window: int | Tensor | None) -> Tensor:
    """Bool, broadcast over pos and q_pos (integers): may the query see the entry?

    >>> import torch
    >>> visible(torch.tensor([0, 1, 2, -1, 4]), torch.tensor(3), window=2).tolist()  # -1: evicted; 4: in the future
    [False, False, True, False, False]
    """
    seen = (pos >= 0) & (pos <= q_pos)
    return seen if window is None else seen & (pos > q_pos - window)
