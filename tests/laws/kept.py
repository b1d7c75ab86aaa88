"""What a session of the engine holds, in the form in which its twins say it."""

from __future__ import annotations

from restkv.session import Session
from twins.stepwise import Kept


def engine_kept(session: Session, row: int) -> Kept:
    """Positions that one row of a session holds, as Row.kept() lists them."""
    kept: Kept = []
    for layer in session.cache.layers:
        slot_RC, pos_RC = layer.slots()
        lists = range(row * layer.heads, (row + 1) * layer.heads)
        keep = layer.pool.companions.get("keep")
        kept.append([])
        for r in lists:
            live = pos_RC[r] >= 0
            columns = live[None] if keep is None else keep[slot_RC[r]].T & live
            kept[-1].extend(sorted(pos_RC[r][line].tolist()) for line in columns)
    return kept
