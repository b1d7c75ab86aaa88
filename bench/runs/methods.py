"""What is compared: methods written as text, and policies of equal bytes.

    restkv                                  the method with its defaults
    snapkv@official                         a preset of it
    restkv:aggregate=indicator:gqa=max      with options; several methods are separated by commas

Entries per KV head are what a cache's bytes go by. A policy with one set per KV head gets that number as its budget; one with
a set per query head stores the union of a group's sets, and gets the budget whose union costs as much.

Letters: L prompt length, H query heads, K KV heads, G = H / K.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.runs.folder import digest
from bench.runs.rows import FULL
from bench.runs.together import kept_mean, prefill_together
from restkv.cli.options import parse_field
from restkv.errors import PolicyError
from restkv.evict import Evictor
from restkv.lm import LM
from restkv.patterns import Pattern
from restkv.policies import Policy, get_policy, policy_class
from restkv.saving.fingerprint import fingerprint
from restkv.saving.store import policy_to_dict
from restkv.session import Session


@dataclass(frozen=True)
class Method:
    """A method, its preset and its options; `label` is how they were written.

    Attributes:
        once: evict the prompt and nothing after it, unless an option or a preset says otherwise.
    """

    label: str
    name: str = field(compare=False)
    preset: str | None = field(compare=False)
    options: Mapping[str, Any] = field(compare=False)
    once: bool = False

    @classmethod
    def parse(cls, text: str, once: bool = False) -> Method:
        """NAME[@PRESET][:OPTION=VALUE]..."""
        head, *rest = _parts(text)
        name, at, preset = head.partition("@")
        options: dict[str, Any] = {}
        for part in rest:
            option, equals, _ = part.partition("=")
            if not (option and equals):
                raise PolicyError(f"method {text!r}: {part!r} is not OPTION=VALUE, such as gqa=max")
            if option == "budget":
                raise PolicyError(f"method {text!r}: budgets are the bench's own option; leave them out here")
            options |= [parse_field(part)]
        policy_class(name)
        return cls(text, name, preset if at else None, options, once)

    @property
    def full(self) -> bool:
        return self.name == FULL

    def policy(self, entries: int) -> Policy:
        """The policy with a budget of so many entries per head.

        A default window fits into it (Policy.window_within), and a pyramid spends it exactly, unless it is the preset's. What
        an option or a preset says stays as it is.
        """
        if self.full:
            return get_policy(self.name, self.preset, **self.options)
        cls = policy_class(self.name)
        given = {**cls.PRESETS.get(self.preset or "", {}), **self.options}
        options = {**self.options, "budget": entries}
        if "window" not in given:
            options |= cls.window_within(entries)
        if self.once and "interval" not in given:
            options["interval"] = None
        policy = get_policy(self.name, self.preset, **options)
        as_preset = self.preset is not None and "budget_by" not in self.options
        if not as_preset and getattr(policy.allocation, "exact", True) is False:
            policy = replace(policy, budget_by=replace(policy.allocation, exact=True))  # type: ignore[call-arg]
        return policy

    def describe(self, entries: int) -> dict[str, Any]:
        """JSON-ready: what a manifest says of the method, for a budget of so many entries, and of the code it runs."""
        policy = self.policy(entries)
        return {"preset": self.preset, "policy": policy_to_dict(policy), "source": _source(type(policy))}


def _parts(text: str) -> list[str]:
    """What colons part: NAME[@PRESET], then options, whose values may have colons (probe=draft:8)."""
    parts: list[str] = []
    for part in text.split(":"):
        if len(parts) > 1 and part and "=" not in part:
            parts[-1] += f":{part}"
        else:
            parts.append(part)
    return parts


def _source(cls: type[Policy]) -> str | None:
    """A name for exactly the module that a policy is written in; None where it is not in a file."""
    try:
        return digest(inspect.getsource(sys.modules[cls.__module__]))
    except (KeyError, OSError, TypeError):
        return None


def parse_methods(text: str, once: bool = False) -> list[Method]:
    """Methods separated by commas (those in brackets separate nothing), the full cache first, no method twice.

    >>> [method.label for method in parse_methods("restkv:gqa=max,snapkv@official")]
    ['full', 'restkv:gqa=max', 'snapkv@official']
    """
    inside = 0
    parts = [""]
    for letter in text:
        inside += (letter == "[") - (letter == "]")
        if letter == "," and not inside:
            parts.append("")
        else:
            parts[-1] += letter
    labels = dict.fromkeys([FULL, *filter(None, map(str.strip, parts))])
    return [Method.parse(label, once) for label in labels]


def check(lm: LM, method: Method, entries: int, length: int, what: str) -> None:
    """Refuse a budget that a method cannot work with, before anything is run. what: where it comes from, for the message."""
    try:
        Evictor(lm.model, method.policy(entries), lm.engine.roots, [length])
    except PolicyError as error:
        raise PolicyError(f"{method.label}: {entries} entries per head ({what}): {error}") from None


def equal_bytes(
    lm: LM, method: Method, entries: int, prompt: Callable[[], Sequence[int]], pattern: Pattern | None = None
) -> Policy:
    """The policy that keeps `entries` entries per KV head of a prompt, or a little less.

    For sets per query head, whose unions depend on how much they overlap, the budget is searched for on `prompt()`: sixteen
    budgets at a time, between the one for disjoint sets and the one for equal sets. pattern: see prefill_together.
    """
    policy = method.policy(entries)
    group = lm.config.group
    if method.full or policy.granularity == "kv" or group == 1:
        return policy
    ids = prompt()
    shared = policy.window + policy.sinks  # all query heads keep these
    low, high = shared + max(0, entries - shared) // group, entries + 1
    low = max(low, 1)
    while high - low > 1:
        step = max(1, (high - low) // 16)
        budgets = [*range(low + step, high, step)]
        sessions = [Session(lm.engine, replace(policy, budget=budget), [len(ids)], 1) for budget in budgets]
        prefill_together(lm, sessions, ids, pattern)
        fits = [budget for budget, session in zip(budgets, sessions, strict=True) if kept_mean(session) <= entries]
        low = max(fits, default=low)
        high = min((budget for budget in budgets if budget > low), default=high)
    return replace(policy, budget=low)


def setting(lm: LM) -> dict[str, Any]:
    """Which model, where and how: what the results of every run depend on, for its arguments."""
    return {
        "model": fingerprint(lm.model),
        "tokenizer": lm.tokenizer.digest,
        "device": lm.device.type,
        "backend": lm.backend,
    }


def describe(lm: LM, methods: Sequence[Method], entries: int) -> dict[str, Any]:
    """What a manifest says besides the arguments: the policies in full (budgets and windows are said by each row), the model."""
    config = lm.config
    return {
        "methods": {method.label: method.describe(entries) for method in methods},
        "model": {
            "fingerprint": fingerprint(lm.model),
            "family": config.family,
            "layers": config.num_layers,
            "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
            "max_positions": config.max_positions,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "bytes_per_token": config.kv_bytes_per_token(lm.dtype),
        },
    }
