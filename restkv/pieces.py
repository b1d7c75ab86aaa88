"""Functions over a fixed number of a prompt's columns, compiled: one graph for prompts of any length, and for all layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from modeling.compiled import compiled
from modeling.errors import CompileError, RestKVWarning

PIECE = 2048  # columns: what they make of llama-124m's heads stays in a CPU's cache
# Columns, times query heads times their dimensions, times queries that are scored one by one: so much a process scores eagerly
# before compiling has paid. Making the graph takes some seconds without kernels, and it saves 0.6 to 1 ns of each on an EPYC with
# AVX2 (docs/performance.md): 66 prompts of 8,192 tokens on llama-124m, 3 by the paper's own indicator.
PAYS_AFTER = 5_000_000_000


class Pieces:
    """Runs functions over PIECE columns, compiled once it pays; shared by all sessions of an engine.

    Args:
        possible: whether this engine compiles anything. False as soon as something failed to compile.
    Attributes:
        asked: compile at once: somebody who warms up wants it.
    """

    def __init__(self, possible: bool) -> None:
        self.asked, self.possible = False, possible
        self._scored = 0
        self._made: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}

    def pay(self, columns: int, width: int) -> bool:
        """Whether to run a layer's prompt in compiled pieces; what it comes to is counted.

        Args:
            columns: of the prompt; fewer than PIECE are eager.
            width: of what is computed of each; 0: nothing is done in pieces.
        """
        if columns < PIECE or not width or not self.possible:
            return False
        self._scored += columns * width
        return self.asked or self._scored > PAYS_AFTER

    def __call__(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """function(*arguments), compiled if that can be."""
        if self.possible:
            try:
                if function not in self._made:
                    self._made[function] = compiled(function)
                return self._made[function](*arguments)
            except CompileError as error:  # too many shapes are one, too
                self.possible = False
                warnings.warn(f"{error}. Prompts are scored eagerly from now on", RestKVWarning, stacklevel=3)
        return function(*arguments)


def fixed(inputs: Sequence[Any]) -> list[Any]:
    """The same, tensors with strides that tell nothing of how long the whole is."""
    return [one.contiguous() if isinstance(one, Tensor) else one for one in inputs]


def pieces(columns: int) -> Iterator[tuple[slice, int]]:
    """Slices of PIECE columns that cover at least so many, and how many of each the one before has had: the last is moved back.

    >>> list(pieces(5000))
    [(slice(0, 2048, None), 0), (slice(2048, 4096, None), 0), (slice(2952, 5000, None), 1144)]
    """
    for start in range(0, columns, PIECE):
        first = min(start, columns - PIECE)
        yield slice(first, first + PIECE), start - first
