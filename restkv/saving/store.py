"""Sessions on disk: one file (archive.py) with the entries, the policy that chose them and the model they belong to.

Letters: N layers, R = B*K page lists of a layer, n entries of all lists, list after list, D head dim.
Tensors: `k.N`, `v.N` [n, D], `pos.N` [n], `count.N` [R], companions `NAME.N` [n, ...], `queries.N` (ring buffers), `state.B.NAME`
(a policy's memory), `next_pos`, `lag`, `counted`, `logits`. The remarks hold everything else as JSON. What is read is checked
in saved.py before a session is made of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restkv.budgets import ALLOCATIONS, Allocation
from restkv.engine import Engine
from restkv.errors import ParallelError, PolicyError, PromptError, RestKVError, TooLargeError
from restkv.files import writable
from restkv.policies import Policy, policy_class
from restkv.saving.archive import opened, write_archive
from restkv.saving.checks import (
    SavedError,
    model_name,
    read_positions,
    read_tensors,
    record,
    remembered,
    require_job,
    revived_states,
    state_fields,
)
from restkv.saving.fingerprint import fingerprint
from restkv.saving.strict_json import shown
from restkv.session import Saved, Session

MOST_NAME = 100  # letters of a policy's name
MOST_SAID = 300  # letters of what is wrong with a file


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
    try:
        return cls(**{name: _tuples(value) for name, value in values.items()}, budget_by=kind(**allocation))
    except RestKVError:
        raise
    except Exception as error:  # options that the class does not have, or of types that it does not expect
        said = " ".join(f"{error}".split())[:200]
        raise PolicyError(f"{cls.name}: the saved options do not fit this version ({said})") from None


def _tuples(value: Any) -> Any:
    """JSON has lists where options have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def save_session(session: Session, path: str | Path, about: Mapping[str, Any]) -> None:
    """Write a session and JSON-ready remarks about it to one file; an older one is replaced at the very end.

    Links are followed, and the file gets the mode of the one it replaces, or that of any new file.

    Raises:
        OutputError: the file cannot be written.
        PolicyError: the policy's memory is no dataclass of tensors; or its class, or its allocation's, is none that its name
            stands for: the file could not be read again, or would be read as another policy.
        ParallelError: several ranks share the model.
    """
    _require_whole(session.engine, path)
    writable(path)
    _require_known(session.policy)
    remarks = {
        "model": fingerprint(session.engine.model),
        "policy": policy_to_dict(session.policy),
        "session": session.describe(),
        "about": dict(about),
    }
    write_archive(path, json.dumps(remarks), _tensors(session))


def _require_whole(engine: Engine, path: str | Path) -> None:
    """A file holds the entries of all heads, which no rank has alone."""
    if engine.model.ranks.size > 1:
        raise ParallelError(
            f"{path}: what {engine.model.ranks.size} ranks hold is neither saved to a file nor read from one yet; load without "
            "parallel for that"
        )


def _require_known(policy: Policy) -> None:
    kinds: list[tuple[Policy | Allocation, type | None]] = [
        (policy, policy_class(policy.name)),
        (policy.allocation, ALLOCATIONS.get(policy.allocation.name)),
    ]
    for one, known in kinds:
        if type(one) is not known:
            raise PolicyError(
                f"{type(one).__name__} is not what the name {one.name!r} stands for, and would be read back as something else; "
                "register it under a name of its own (docs/policies.md)"
            )


def _tensors(session: Session) -> dict[str, Tensor]:
    """Everything a session holds besides what describe() says; dead entries are left out."""
    cache = session.cache
    tensors = {
        "logits": session.logits_BV,
        "next_pos": cache.next_pos,
        "lag": cache.lag,
        "counted": session.evictor.counted_B,
    }
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
        for name, value in state_fields(session.policy, state).items():
            tensors[f"state.{row}.{name}"] = value
    return tensors


def load_session(engine: Engine, path: str | Path) -> tuple[Session, dict[str, Any]]:
    """Read what save_session wrote: the session, ready to go on, and the remarks, which the caller has to check.

    Raises:
        PromptError: no such file, a damaged one, not one of ours, one of another model (both are named), or one whose parts do
            not fit together.
        ParallelError: several ranks share the model.
    """
    _require_whole(engine, path)
    with opened(path) as archive, refused(path):
        remarks = record(archive.remarks, "model policy session about", "it")
        model, ours = model_name(remarks["model"]), fingerprint(engine.model)
        if model != ours:
            raise PromptError(f"{path}: made with the model {model}, this one is {ours}; load it with that model")
        policy = _policy(remarks["policy"])
        next_pos = read_positions(archive)
        described = require_job(remarks["session"], policy, next_pos, engine.model.config.vocab_size)
        queries = remembered(archive, len(next_pos))
        tensors = read_tensors(archive, engine.model, policy, next_pos)
        states = revived_states(policy, len(next_pos), tensors, engine.device)
        if not isinstance(remarks["about"], dict):
            raise SavedError(f"what is said about it is {shown(remarks['about'])}")
        session = _revived(engine, policy, described, queries, tensors)
        session.evictor.states = states
    return session, remarks["about"]


@contextlib.contextmanager
def refused(path: str | Path) -> Iterator[None]:
    """Around whatever reads a saved file: what cannot be is refused in one line that names the file.

    Raises:
        PromptError: instead of SavedError, and of errors of policies and templates.
    """
    try:
        yield
    except TooLargeError:
        raise
    except (SavedError, RestKVError) as error:
        said = str(error)
        if isinstance(error, PromptError) and said.startswith(f"{path}: "):
            raise
        if len(said) > MOST_SAID:
            said = f"{said[:MOST_SAID]}..."
        raise PromptError(f"{path}: no session that can go on: {said}; save it again") from None


def _policy(saved: Any) -> Policy:
    """policy_from_dict of what may be anything.

    Raises:
        SavedError, PolicyError: it is no policy.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("name"), str):
        raise SavedError(f"its policy is {shown(saved)}")
    by = saved.get("budget_by")
    if not isinstance(by, dict) or not isinstance(by.get("name"), str):
        raise SavedError(f"its policy's budget_by is {shown(by)}")
    if len(saved["name"]) > MOST_NAME or len(by["name"]) > MOST_NAME:
        raise SavedError(f"its policy is named {shown(saved['name'])}, its budget_by {shown(by['name'])}")
    return policy_from_dict(saved)


def _revived(
    engine: Engine, policy: Policy, described: Mapping[str, Any], queries: int, tensors: Mapping[str, Tensor]
) -> Session:
    lists = sum(tensors[f"count.{index}"].numel() for index in range(engine.model.config.num_layers))
    entries = sum(len(tensors[f"pos.{index}"]) for index in range(engine.model.config.num_layers))
    session = Session.restore(engine, policy, described, Saved(-(-entries // lists), queries))
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
    return session
