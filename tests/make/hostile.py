"""JSON that somebody has altered: another value in some place of it, of every kind that a file can hold."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st

DEEP: Any = json.loads("[" * 400 + "]" * 400)
HOSTILE = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 7, 20, 70, 71, 4096, 2 * 10**9, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400),
        *(0.0, 0.5, -0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf")),
        *("", "x", "none", "full", "chunked", "a" * 5000, "two\nlines", "\x1b[31m", "half \ud800"),
        *([], [0], [-1], [2**40], [[0, 1]], [[5, 1]], ["x"], [None], DEEP),
        *({}, {"name": "uniform"}, {"name": "global", "floor": 2}, {"name": 3}),
    ]
).map(copy.deepcopy)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something else could stand."""
    yield at
    if isinstance(value, dict | list) and len(at) < 5:
        for key, part in value.items() if isinstance(value, dict) else list(enumerate(value))[:3]:
            yield from places(part, (*at, key))


def alter_remarks(draw: Callable[..., Any], remarks: Any) -> Any:
    """Something else in one place, or one part more or fewer."""
    everywhere = list(places(remarks))
    way: list[Any] = [None, *everywhere[draw(st.integers(0, len(everywhere) - 1))]]
    last = way.pop()
    holder: Any = {None: remarks}
    top = holder
    for key in way:
        holder = holder[key]
    how = draw(st.sampled_from(["other", "other", "other", "gone", "more", "larger"]))
    if how == "gone" and last is not None:
        del holder[last]
    elif how == "more" and isinstance(holder[last], dict):
        holder[last][draw(st.sampled_from(["key", "", "lengths", "budget"]))] = draw(HOSTILE)
    elif how == "more" and isinstance(holder[last], list):
        holder[last].append(draw(HOSTILE))
    elif how == "larger" and type(holder[last]) in (int, float):
        holder[last] *= draw(st.sampled_from([-1, 2, 1000, 10**8]))
    else:
        holder[last] = draw(HOSTILE)
    return top[None]


def fits(number: float, dtype: torch.dtype) -> bool:
    """Whether a tensor can be filled with a number."""
    if dtype == torch.bool:
        return True
    if dtype.is_floating_point:
        return not math.isfinite(number) or abs(number) <= torch.finfo(dtype).max
    return math.isfinite(number) and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
