"""What the engine does around a policy, by hand: complete observations, and evictions after every step of a stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from make.observed import root_for
from restkv.observe import Observation, weighted_attention


def rotary(frequencies, factor=1.0):
    """RoPE of these frequencies as Observation.rotary, scaled by `factor` as YaRN does."""

    def at(pos_BT):
        angle_BTF = pos_BT.clamp_min(0)[..., None] * torch.tensor(frequencies, dtype=torch.float64)
        angle_BTD = torch.cat([angle_BTF, angle_BTF], -1)
        return angle_BTD.cos() * factor, angle_BTD.sin() * factor

    return at


def collected(policy, obs):
    """Attention the entries collect from the observed queries: per query head, or the mean over each group."""
    mass_BHC = weighted_attention(obs, (obs.q_pos >= 0).to(obs.dtype))
    return mass_BHC if policy.granularity == "query" else mass_BHC.unflatten(1, (-1, obs.group)).mean(2)


def protected(policy, pos_BKC, newest_B, budget):
    kept_BKC = (pos_BKC > (newest_B - policy.newest(budget))[:, None, None]) | (pos_BKC < policy.sinks)
    for start, end in policy.protect:
        kept_BKC = kept_BKC | ((pos_BKC >= start) & (pos_BKC < end))
    return kept_BKC & (pos_BKC >= 0)


def prepared(policy, obs, w_o):
    """The observation with all that the policy needs to keep its budget of it."""
    budget = obs.pos.shape[-1] if policy.budget is None else policy.budget
    half = obs.q.shape[-1] // 2
    return replace(
        obs,
        root=root_for(policy, w_o, obs.k.shape[1]),
        mass=collected(policy, obs) if "mass" in policy.needs else None,
        rotary=rotary([1.0 / 10**i for i in range(half)]) if "rotary" in policy.needs else None,
        protected=protected(policy, obs.pos, obs.q_pos[:, -1], budget),
        budget_B=torch.full((len(obs.pos),), budget),
        layer=1,
        num_layers=4,
    )


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
            protected=protected(policy, pos, obs.q_pos[:, -1], policy.budget),
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
