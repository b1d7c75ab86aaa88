"""Whether a saved session is one that can go on: checked against the model and the policy before anything is made for it.

Digests (archive.py) say that a file is as it was written, not by whom. So everything in it that a later step relies on is
tested here: which tensors there are, their dtypes and shapes, counts, positions, and numbers that memory is asked for by.

Letters: N layers, B rows, K KV heads, R = B*K page lists of a layer, n entries of all lists of a layer, H query heads, D head
dim, V vocabulary, W queries that are remembered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from modeling.layers import Decoder
from restkv.budgets import LONGEST
from restkv.errors import PolicyError
from restkv.patterns import parse_prefill
from restkv.policies import Policy
from restkv.policies.base import TOO_MANY
from restkv.saving.archive import Archive, Place
from restkv.saving.strict_json import shown
from restkv.sizing import companions_of

MOST_CHUNK = 1 << 16  # tokens of a chunk, where the text so far is no longer
MOST_FORKS = 1 << 10
ROLES = ("system", "user", "assistant")


class SavedError(ValueError):
    """What is wrong with a file, without its name."""


# -- the remarks


def record(value: Any, names: str, what: str) -> dict[str, Any]:
    """A JSON object with exactly these keys."""
    if not isinstance(value, dict) or value.keys() != set(names.split()):
        raise SavedError(f"{what} has not the parts {', '.join(names.split())}")
    return value


def whole(value: Any, least: int, most: int, what: str) -> int:
    """A whole number in a range."""
    if type(value) is not int or not least <= value <= most:
        raise SavedError(f"{what} is {shown(value)}, not a whole number from {least} to {most}")
    return value


def model_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]{1,200}", value):
        raise SavedError(f"its model is {shown(value)}, no fingerprint")
    return value


def require_job(described: Any, policy: Policy, next_pos: list[int], vocab: int) -> dict[str, Any]:
    """What Session.describe said of a session that has read so many tokens of every row."""
    session = record(described, "job counters last_ids", "the session")
    job = record(session["job"], "lengths max_new_tokens prefill chunk extends forks", "the job")
    counters = record(session["counters"], "since_eviction evictions max_live", "the counters")
    lengths, longest, read = job["lengths"], max(next_pos), sum(next_pos)
    if not isinstance(lengths, list) or len(lengths) != len(next_pos):
        raise SavedError(f"the prompts' lengths are {shown(lengths)}, for {len(next_pos)} rows")
    for length, position in zip(lengths, next_pos, strict=True):
        whole(length, 1, position, "a prompt's length")
    whole(job["max_new_tokens"], 0, TOO_MANY - 1, "max_new_tokens")
    require_reading(job, longest)
    if not isinstance(job["extends"], bool):
        raise SavedError(f"extends is {shown(job['extends'])}, not true or false")
    whole(job["forks"], 0, MOST_FORKS, "forks")
    due = read if policy.interval is None or policy.budget is None else policy.interval - 1
    whole(counters["since_eviction"], 0, min(due, read), "since_eviction")
    whole(counters["evictions"], 0, read, "evictions")
    whole(counters["max_live"], 0, longest, "max_live")
    ids = session["last_ids"]
    if not isinstance(ids, list) or len(ids) not in (0, len(next_pos)):
        raise SavedError(f"the tokens drawn last are {shown(ids)}, for {len(next_pos)} rows")
    for token in ids:
        whole(token, 0, vocab - 1, "a token drawn last")
    return session


def require_reading(reading: Mapping[str, Any], longest: int) -> None:
    """How a prompt is read: Session's `prefill` and `chunk`, of a text that has been so long."""
    if not isinstance(reading["prefill"], str):
        raise SavedError(f"prefill is {shown(reading['prefill'])}, no text")
    parse_prefill(reading["prefill"])
    whole(reading["chunk"], 1, max(MOST_CHUNK, longest), "chunk")


def require_context(about: Mapping[str, Any], next_pos: list[int]) -> int:
    """What CompressedContext.save said; the tokens it has read."""
    context = _about(about, "context", "tokens", next_pos)
    return whole(context["tokens"], next_pos[0], next_pos[0], "tokens")


def require_chat(about: Mapping[str, Any], next_pos: list[int], vocab: int) -> None:
    """What Chat.save said."""
    chat = _about(about, "chat", "messages tokens template rendering reading spared", next_pos)
    if not isinstance(chat["messages"], list) or not isinstance(chat["tokens"], list):
        raise SavedError("the chat's messages and tokens are no lists")
    for message in chat["messages"]:
        record(message, "role content", "a message")
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise SavedError(f"a message is {shown(message)}, not a text of {', '.join(ROLES)}")
    for token in chat["tokens"]:
        whole(token, 0, vocab - 1, "a token of the chat")
    said = len(chat["tokens"])
    if said < next_pos[0]:
        raise SavedError(f"the chat has {said} tokens, its cache has read {next_pos[0]}")
    if not isinstance(chat["template"], bool):
        raise SavedError(f"template is {shown(chat['template'])}, not true or false")
    rendering = record(chat["rendering"], "template_name template_args", "how the chat is rendered")
    if not isinstance(rendering["template_name"], str | None) or not isinstance(rendering["template_args"], dict):
        raise SavedError(f"how the chat is rendered is {shown(rendering)}")
    require_reading(record(chat["reading"], "prefill chunk", "how the chat is read"), said)
    whole(chat["spared"], 0, said, "spared")


def _about(about: Mapping[str, Any], kind: str, names: str, next_pos: list[int]) -> dict[str, Any]:
    if about.get("kind") != kind:
        raise SavedError(f"it is {shown(about.get('kind'))}, not a {kind}")
    if len(next_pos) != 1:
        raise SavedError(f"it has {len(next_pos)} rows, a {kind} has one")
    return record(about, f"kind {names}", f"the {kind}")


# -- the tensors


def read_positions(archive: Archive) -> list[int]:
    """The next position of every row, the first thing to know: other numbers are bounded by it."""
    place = archive.places.get("next_pos")
    if place is None or place.dtype != torch.int32 or len(place.shape) != 1 or not place.size:
        raise SavedError("it does not say how many tokens were read")
    return [whole(position, 1, LONGEST, "next_pos") for position in archive.read("next_pos").tolist()]


def remembered(archive: Archive, rows: int) -> int:
    """W, the queries that every layer's ring remembers; 0 where there are no rings."""
    ring = archive.places.get("queries.0")
    slots = ring.shape[0] if ring is not None and ring.shape else rows
    if slots % rows:
        raise SavedError("queries.0 has another number of rows")
    return slots // rows - 1


def read_tensors(archive: Archive, model: Decoder, policy: Policy, next_pos: list[int]) -> dict[str, Tensor]:
    """All tensors of a session, on the CPU: small ones first, so that what does not fit together is refused before the rest
    is read.

    Raises:
        SavedError: they are not what this model and policy keep, or contradict one another.
        PromptError: they are not as they were written.
    """
    rows = len(next_pos)
    states = [state_fields(policy, policy.start()) for _ in range(rows)]
    expected = dict(_expected(archive, model, policy, rows, states))
    for name in (*expected, *archive.places):
        want, place = expected.get(name), archive.places.get(name)
        if want is None or place is None:
            raise SavedError(f"it {'lacks' if place is None else 'has a needless'} tensor {shown(name)}")
        if (place.dtype, place.shape) != want:
            raise SavedError(
                f"tensor {name} is {place.dtype} {list(place.shape)}, this model and policy have {want[0]} {list(want[1])}"
            )
    found: dict[str, Tensor] = {}
    for name in sorted(expected, key=lambda name: (not name.startswith("count."), archive.places[name].size)):
        found[name] = archive.read(name)
        _check(name, found, model.config.num_kv_heads, next_pos)
    live_B = found["count.0"].view(rows, -1)[:, 0]
    lag_B = found["next_pos"] - live_B if policy.slot_positions else torch.zeros_like(found["next_pos"])
    if not torch.equal(found["lag"], lag_B.to(torch.int32)):
        raise SavedError("lag is not what follows from the entries there are")
    return found


def state_fields(policy: Policy, state: Any) -> dict[str, Tensor]:
    """What a policy remembers of a row, by name.

    Raises:
        PolicyError: its memory is no dataclass of tensors.
    """
    if state is None:
        return {}
    found = {field.name: getattr(state, field.name) for field in fields(state)} if is_dataclass(state) else {}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise PolicyError(f"{policy.name}: its memory is no dataclass of tensors, and cannot be saved")
    return found


def revived_states(policy: Policy, rows: int, tensors: Mapping[str, Tensor], device: torch.device) -> list[Any]:
    """What a policy remembers of every row."""
    states = [policy.start() for _ in range(rows)]
    for row, state in enumerate(states):
        for name in state_fields(policy, state):
            setattr(state, name, tensors[f"state.{row}.{name}"].to(device))
        if state is not None and not policy.state_fits(state):
            raise SavedError(f"{policy.name} cannot remember what it has of row {row}")
    return states


Kind = tuple[torch.dtype, tuple[int, ...]]


def _expected(
    archive: Archive, model: Decoder, policy: Policy, rows: int, states: list[dict[str, Tensor]]
) -> Iterator[tuple[str, Kind]]:
    """Names, dtypes and shapes; only how many entries a layer has, and W, are the file's to say."""
    config = model.config
    for name in ("next_pos", "lag", "counted"):
        yield name, (torch.int32, (rows,))
    yield "logits", (torch.promote_types(model.dtype, torch.float32), (rows, config.vocab_size))
    slots = rows * (remembered(archive, rows) + 1)
    companions = companions_of(policy, model)
    for layer in range(config.num_layers):
        place = archive.places.get(f"pos.{layer}", Place(torch.int32, (0,), 0))
        n = place.shape[0] if place.shape else 0
        yield f"count.{layer}", (torch.int64, (rows * config.num_kv_heads,))
        yield f"pos.{layer}", (torch.int32, (n,))
        yield f"k.{layer}", (model.dtype, (n, config.head_dim))
        yield f"v.{layer}", (model.dtype, (n, config.head_dim))
        for name, (shape, dtype) in companions.items():
            yield f"{name}.{layer}", (dtype, (n, *shape))
        if slots > rows:
            yield f"queries.{layer}", (model.dtype, (slots, config.num_heads, config.head_dim))
    for row, state in enumerate(states):
        for name, value in state.items():
            yield f"state.{row}.{name}", (value.dtype, tuple(value.shape))


def _check(name: str, found: Mapping[str, Tensor], heads: int, next_pos: list[int]) -> None:
    """A tensor's values, given those that were read before it."""
    value, (kind, _, layer) = found[name], name.partition(".")
    next_B = torch.tensor(next_pos)
    if kind == "count" and (value < 0).any():
        raise SavedError(f"{name} counts fewer than no entries")
    if kind == "pos":
        count_R = found[f"count.{layer}"]
        if (count_R > len(value)).any() or count_R.sum() != len(value):
            raise SavedError(f"count.{layer} does not add up to the {len(value)} entries of the layer")
        list_n = torch.arange(len(count_R)).repeat_interleave(count_R)
        if (value < 0).any() or (value >= next_B[list_n // heads]).any():
            raise SavedError(f"{name} has positions that the text has not")
        if ((value.diff() <= 0) & (list_n.diff() == 0)).any():
            raise SavedError(f"{name} is in disorder")
    if kind == "counted" and ((value < 0) | (value > next_B)).any():
        raise SavedError("counted is not within the text")
    if kind == "mass" and (value < 0).any():
        raise SavedError(f"{name} has less than no attention")
    if kind == "queries":
        value = value.view(len(next_pos), -1, *value.shape[1:])[:, :-1]  # the last slot is padding's, whatever it is
    if value.is_floating_point() and not value.isfinite().all():
        raise SavedError(f"{name} has numbers that are not finite")
