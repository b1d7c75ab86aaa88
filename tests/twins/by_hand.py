"""What the engine does around a policy, by hand: complete observations, and evictions after every step of a stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from restkv.observe import Observation
from restkv.testing.observed import collected, protected


def steps(policy, stream, prompt):
    """Evict after a prompt of that length and after every later token: yields the positions of each KV head.

    The prompt's observation carries all queries, later ones the newest; mass stays with its entry.
    """
    held = [list(range(prompt)) for _ in stream.k]
    mass: list[dict[int, float]] = [{} for _ in stream.k]
    for step in range(prompt, stream.k.shape[1] + 1):
        queries = np.arange(prompt) if step == prompt else np.array([step - 1])
        C = max(map(len, held))
        rows = [positions + [-1] * (C - len(positions)) for positions in held]
        pos = torch.tensor(rows)[None]
        k, v = (
            torch.tensor(np.take_along_axis(side, np.array(rows)[..., None], 1))[None] for side in (stream.k, stream.v)
        )
        obs = Observation(
            torch.tensor(stream.q[:, queries])[None], torch.tensor(queries)[None], k, v, pos, None, stream.scale
        )
        obs = replace(
            obs,
            protected=protected(policy, pos, obs.q_pos[:, -1], [policy.budget]),
            budget_B=torch.tensor([policy.budget]),
        )
        if "mass" in policy.needs:
            gained = collected(policy, obs)
            old = [[m.get(p, 0.0) for p in row] for m, row in zip(mass, rows, strict=True)]
            now = torch.tensor(old, dtype=torch.float64)[None] + gained
            obs = replace(obs, mass=now)
            mass = [dict(zip(row, m, strict=True)) for row, m in zip(rows, now[0].tolist(), strict=True)]
        if policy.budget < C:
            kept = policy.keep(obs)[0]
            held = [pos[0, h, kept[h]].tolist() for h in range(len(held))]
        yield held
        held = [[*positions, step] for positions in held]
