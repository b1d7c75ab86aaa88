"""Sessions on disk: one safetensors file with the entries, the policy that chose them and the model they belong to.

Letters: N layers, R = B*K page lists of a layer, n entries of all lists, list after list, D head dim.
Tensors: `k.N`, `v.N` [n, D], `pos.N` [n], `count.N` [R], companions `NAME.N` [n, ...], `queries.N` (ring buffers), `state.B.NAME`
(a policy's memory), `next_pos`, `lag`, `counted`, `logits`. The metadata hold everything else as JSON, and a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
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

FORMAT = "1"  # of the file; other versions are refused


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
    try:
        return cls(**{name: _tuples(value) for name, value in values.items()}, budget_by=kind(**allocation))
    except TypeError as error:
        raise PolicyError(f"{cls.name}: the saved options do not fit this version ({error})") from None


def _tuples(value: Any) -> Any:
    """JSON has lists where options have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def save_session(session: Session, path: str | Path, about: Mapping[str, Any]) -> None:
    """Write a session and JSON-ready remarks about it to one safetensors file; an older one is replaced at the very end.

    Links are followed, and the file gets the mode of the one it replaces, or that of any new file.

    Raises:
        OutputError: the file cannot be written.
        PolicyError: the policy's memory is no dataclass of tensors; or its class, or its allocation's, is none that its name
            stands for: the file could not be read again, or would be read as another policy.
    """
    place = _writable(path)
    _require_known(session.policy)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(session).items()}
    meta = json.dumps(
        {
            "model": fingerprint(session.engine.model),
            "policy": policy_to_dict(session.policy),
            "session": session.describe(),
            "about": dict(about),
        }
    )
    part = place.parent / f"{place.name}.part"
    try:
        part.touch()
        mode = (place if place.exists() else part).stat().st_mode & 0o7777  # save_file's own would be 0600
        save_file(tensors, part, {"restkv": FORMAT, "about": meta, "checksum": _checksum(meta, tensors)})
        part.chmod(mode)
        part.replace(place)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); choose another place") from None


def _writable(path: str | Path) -> Path:
    """Where a file of this name lies, all links followed; refuses what is there already and is no file."""
    if not str(path):
        raise OutputError("'': cannot be written (the name is empty); choose another place")
    place = Path(os.path.realpath(path))
    with contextlib.suppress(OSError):  # a place that cannot be looked at cannot be written either
        circular = place.is_symlink()  # a link still
        if circular or (place.exists() and not place.is_file()):
            what = "a folder" if place.is_dir() else "no regular file"
            raise OutputError(f"{path}: cannot be written (it is {what}); choose another place")
    return place


def _reason(error: OSError | SafetensorError) -> str:
    """Why, without the names of temporary files, which the libraries' own sentences contain."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else str(error)


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
        for name in _state_fields(session.policy, state):
            tensors[f"state.{row}.{name}"] = getattr(state, name)
    return tensors


def _state_fields(policy: Policy, state: Any) -> list[str]:
    """Names of what a policy remembers of a row."""
    if state is None:
        return []
    names = [field.name for field in fields(state)] if is_dataclass(state) else []
    if not names or not all(isinstance(getattr(state, name), Tensor) for name in names):
        raise PolicyError(f"{policy.name}: its memory is no dataclass of tensors, and cannot be saved")
    return names


def _checksum(meta: str, tensors: Mapping[str, Tensor]) -> str:
    """Of metadata and all tensors; safetensors checks lengths only."""
    total = zlib.crc32(meta.encode())
    for _, tensor in sorted(tensors.items()):
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def load_session(engine: Engine, path: str | Path) -> tuple[Session, dict[str, Any]]:
    """Read what save_session wrote: the session, ready to go on, and the remarks.

    Raises:
        PromptError: no such file, a damaged one, not one of ours, or one of another model (both are named).
    """
    path = Path(path)
    if path.is_dir():
        raise PromptError(f"{path}: is a folder; give the file that was saved")
    try:
        with safe_open(path, "pt") as file:
            labels = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; save to it first, or give another") from None
    except (OSError, SafetensorError) as error:
        raise PromptError(f"{path}: cannot be read as a saved context ({_reason(error)}); save it again") from None
    version, meta = labels.get("restkv"), labels.get("about", "")
    if version is None:
        raise PromptError(f"{path}: not written by restkv; give a file that a context or a chat was saved to")
    if version != FORMAT:
        raise PromptError(f"{path}: has format {version}, this version of restkv reads {FORMAT}; save it again")
    if labels.get("checksum") != _checksum(meta, tensors):
        raise PromptError(f"{path}: damaged since it was saved (its checksum is wrong); save it again")
    return _revived(engine, path, json.loads(meta), tensors)


def _revived(
    engine: Engine, path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Session, dict[str, Any]]:
    ours = fingerprint(engine.model)
    if meta["model"] != ours:
        raise PromptError(f"{path}: made with the model {meta['model']}, this one is {ours}; load it with that model")
    session = Session.restore(engine, policy_from_dict(meta["policy"]), meta["session"])
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
    session.logits_BV = here["logits"].clone()  # what is read from the file would change with it
    session.evictor.counted_B.copy_(here["counted"])
    for row, state in enumerate(session.evictor.states):
        for name in _state_fields(session.policy, state):
            setattr(state, name, here[f"state.{row}.{name}"].clone())
    return session, meta["about"]
