"""Very small random models (restkv/testing/models.py), and compiled sessions without a compiler."""

from __future__ import annotations

from functools import partial

from restkv import engine as steps
from restkv.engine import Engine
from restkv.masking import evict
from restkv.testing.models import VOCAB, small_ids, small_lm, small_model

__all__ = ["VOCAB", "eagerly", "small_ids", "small_lm", "small_model"]


def eagerly(engine: Engine) -> Engine:
    """A compiled engine's sessions, with their padding, whose steps are the eager twins."""
    for name, run in (("decode", steps._decode), ("hidden", steps.step)):
        setattr(engine, name, lambda *arguments, run=run: run(*arguments, backend="sdpa"))
    engine.evict = partial(evict, regions=False)  # type: ignore[method-assign]
    return engine
