"""Sessions on disk: one safetensors file with the entries, the policy that chose them and the model they belong to.

Letters: N layers, R = B*K page lists of a layer, n entries of all lists, list after list, D head dim.
Tensors: `k.N`, `v.N` [n, D], `pos.N` [n], `count.N` [R], companions `NAME.N` [n, ...], `queries.N` (ring buffers), `state.B.NAME`
(a policy's memory), `next_pos`, `lag`, `counted`, `logits`. The metadata hold everything else as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling.layers import Decoder
from restkv.budgets import ALLOCATIONS, Allocation
from restkv.errors import OutputError, PolicyError, PromptError
from restkv.generate import Engine, Session
from restkv.policies import Policy, policy_class

FORMAT = 1


def fingerprint(model: Decoder) -> str:
    """A name for exactly these weights: family, shape, dtype, and a hash over config and a sample of every tensor."""
    config = model.config
    digest = hashlib.sha256(repr(config).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024)].float().cpu()  # sync: once per model
        digest.update(name.encode() + sample.numpy().tobytes())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{config.family}-{config.num_layers}x{config.hidden_size}-{dtype}-{digest.hexdigest()[:16]}"


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """A policy as JSON-ready values: its name, its fields, and its allocation by name and fields."""
    values = {field.name: getattr(policy, field.name) for field in fields(policy)}
    values["budget_by"] = {"name": policy.allocation.name, **asdict(policy.allocation)}
    return {"name": policy.name, **values}


def policy_from_dict(saved: Mapping[str, Any]) -> Policy:
    """The inverse of policy_to_dict.

    Raises:
        PolicyError: unknown name or option.
    """
    values = dict(saved)
    cls = policy_class(values.pop("name"))
    allocation: dict[str, Any] = dict(values.pop("budget_by"))
    kind: type[Allocation] | None = ALLOCATIONS.get(allocation.pop("name"))
    if kind is None:
        raise PolicyError(f"budget_by {saved['budget_by']['name']!r} is unknown; choose from {', '.join(ALLOCATIONS)}")
    if isinstance(values.get("budget"), list):
        values["budget"] = tuple(values["budget"])
    values["protect"] = tuple(tuple(span) for span in values["protect"])
    try:
        return cls(**values, budget_by=kind(**allocation))
    except TypeError as error:
        raise PolicyError(f"{cls.name}: the saved options do not fit this version ({error})") from None


def save_session(session: Session, path: str | Path, about: Mapping[str, Any]) -> None:
    """Write a session and JSON-ready remarks about it to one safetensors file.

    Raises:
        OutputError: the file cannot be written.
    """
    path, cache = Path(path), session.cache
    tensors: dict[str, Tensor] = {"logits": session.logits_BV, "next_pos": cache.next_pos, "lag": cache.lag}
    tensors["counted"] = session.evictor.counted_B
    for index, layer in enumerate(cache.layers):
        slot_RC, pos_RC = layer.slots()
        live_RC = pos_RC >= 0
        slot_n = slot_RC[live_RC]
        tensors[f"k.{index}"], tensors[f"v.{index}"] = layer.pool.k[0, 0, slot_n], layer.pool.v[0, 0, slot_n]
        tensors[f"pos.{index}"], tensors[f"count.{index}"] = pos_RC[live_RC], live_RC.sum(-1)
        for name, slab in layer.pool.companions.items():
            tensors[f"{name}.{index}"] = slab[slot_n]
    for index, ring in enumerate(cache.queries):
        tensors[f"queries.{index}"] = ring
    for row, state in enumerate(session.evictor.states):
        tensors.update({f"state.{row}.{name}": value for name, value in (vars(state) if state else {}).items()})
    meta = {
        "format": FORMAT,
        "model": fingerprint(session.engine.model),
        "policy": policy_to_dict(session.policy),
        "session": session.describe(),
        "about": dict(about),
    }
    part = path.with_name(path.name + ".part")
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, {"restkv": json.dumps(meta)}
        )
        part.replace(path)  # a reader never sees half a file, nor does a failed write cost an older one
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written ({error}); choose another place") from None


def load_session(engine: Engine, path: str | Path) -> tuple[Session, dict[str, Any]]:
    """Read what save_session wrote: the session, ready to go on, and the remarks.

    Raises:
        PromptError: no such file, not a file of ours, or one of another model (both are named).
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("restkv", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; save a context there first") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise PromptError(f"{path}: not a saved context ({error}); save it again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise PromptError(f"{path}: not a context saved by this version of restkv; compress the text again")
    ours = fingerprint(engine.model)
    if meta["model"] != ours:
        raise PromptError(f"{path}: made with the model {meta['model']}, this one is {ours}; load it with that model")
    policy = policy_from_dict(meta["policy"])
    session = Session.restore(engine, policy, meta["session"])
    cache, device = session.cache, engine.device
    here = {name: tensor.to(device) for name, tensor in tensors.items()}
    for index, layer in enumerate(cache.layers):
        count_R, start = here[f"count.{index}"].tolist(), 0  # sync: once per layer, when a file is read
        for row in range(layer.rows):
            counts = count_R[row * layer.heads : (row + 1) * layer.heads]
            stop = start + sum(counts)
            keep_KC = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
            companions = {name: here[f"{name}.{index}"][start:stop] for name in layer.pool.companions}
            k_nD, v_nD, pos_n = (here[f"{name}.{index}"][start:stop] for name in ("k", "v", "pos"))
            layer.append_chosen(row, keep_KC, k_nD, v_nD, pos_n, companions)
            start = stop
    for index, ring in enumerate(cache.queries):
        ring.copy_(here[f"queries.{index}"])
    cache.next_pos.copy_(here["next_pos"])
    cache.lag.copy_(here["lag"])
    session.logits_BV = here["logits"]
    session.evictor.counted_B.copy_(here["counted"])
    for row, state in enumerate(session.evictor.states):
        for name in vars(state) if state else ():
            setattr(state, name, here[f"state.{row}.{name}"])
    return session, meta["about"]
