"""Every policy by name."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from restkv.errors import PolicyError, RestKVError
from restkv.policies.adakv import AdaKV
from restkv.policies.base import Policy
from restkv.policies.caote import CAOTE
from restkv.policies.compactor import Compactor
from restkv.policies.curdkv import CurDKV
from restkv.policies.expected import ExpectedAttention
from restkv.policies.full import FullCache
from restkv.policies.h2o import H2O
from restkv.policies.keydiff import KeyDiff
from restkv.policies.keynorm import KeyNorm
from restkv.policies.kvzip import KVzip
from restkv.policies.kvzip_plus import KVzipPlus
from restkv.policies.lacache import LaCache
from restkv.policies.plugins import load_plugin, plugin_names
from restkv.policies.pyramidkv import PyramidKV
from restkv.policies.random import Random
from restkv.policies.rest import ReSTKV
from restkv.policies.rkv import RKV
from restkv.policies.snapkv import SnapKV
from restkv.policies.streaming import StreamingLLM
from restkv.policies.tova import TOVA

__all__ = [
    "CAOTE",
    "H2O",
    "POLICIES",
    "RKV",
    "TOVA",
    "AdaKV",
    "Compactor",
    "CurDKV",
    "ExpectedAttention",
    "FullCache",
    "KVzip",
    "KVzipPlus",
    "KeyDiff",
    "KeyNorm",
    "LaCache",
    "Policy",
    "PyramidKV",
    "Random",
    "ReSTKV",
    "SnapKV",
    "StreamingLLM",
    "default_policy",
    "get_policy",
    "known_policies",
    "policy_class",
]

DEFAULT_BUDGET = 1024  # entries per KV head, where nobody gives a budget
POLICIES: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        ReSTKV,
        SnapKV,
        PyramidKV,
        AdaKV,
        H2O,
        TOVA,
        CAOTE,
        ExpectedAttention,
        KVzip,
        KVzipPlus,
        Compactor,
        RKV,
        CurDKV,
        KeyNorm,
        KeyDiff,
        StreamingLLM,
        LaCache,
        Random,
        FullCache,
    )
}


def known_policies() -> tuple[str, ...]:
    """Names that get_policy takes: those of POLICIES, then those that installed packages register."""
    return (*POLICIES, *(name for name in plugin_names() if name not in POLICIES))


def policy_class(name: str) -> type[Policy]:
    """The class behind a name; a plugin is imported when it is asked for, and cannot replace what is here.

    Raises:
        PolicyError: unknown name (the message lists the known ones), or a plugin that cannot be used.
    """
    cls = POLICIES.get(name) or load_plugin(name)
    if cls is None:
        raise PolicyError(f"method {name!r} is unknown; choose from {', '.join(known_policies())}")
    return cls


def get_policy(name: str, /, preset: str | None = None, **options: Any) -> Policy:
    """Build a policy from its name.

    Args:
        name: one of known_policies().
        preset: a key of that policy's PRESETS; `options` override its values.
        options: fields of the policy, such as budget, interval or budget_by.

    Raises:
        PolicyError: unknown name, preset or option (the message lists the known ones), or a value out of range.

    >>> get_policy("restkv", preset="paper-ruler", budget=1024).kernel_size
    21
    """
    cls = policy_class(name)
    if preset is not None:
        if preset not in cls.PRESETS:
            known = f"choose from {', '.join(cls.PRESETS)}" if cls.PRESETS else "it has none"
            raise PolicyError(f"{name}: preset {preset!r} is unknown; {known}")
        options = {**cls.PRESETS[preset], **options}
    known_options = {field.name: field for field in fields(cls)}
    for option in options:
        if option not in known_options:
            raise PolicyError(f"{name}: option {option!r} is unknown; it takes {', '.join(known_options)}")
    if "budget" not in options and known_options["budget"].default is MISSING:
        raise PolicyError(f"{name}: budget is missing; give the entries to keep per head, or a fraction in (0, 1]")
    try:
        return cls(**options)
    except RestKVError:
        raise
    except Exception as error:  # a plugin that does not expect what it is given
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise PolicyError(f"{name}: cannot be made of these options ({said})") from error


def default_policy(preset: str, prefill: object = "dense", **options: Any) -> Policy:
    """What is taken where nobody names a method: a preset of ReST-KV, whichever has measured best for the use (docs/results.md).

    Args:
        preset: "draft" for answers to the prompt, "replay" for a text that is compressed before its questions.
        prefill: how the prompt is read; one that is read in chunks is observed by its last queries.
        options: fields of ReSTKV, which override the preset's; the budget is 1,024 entries if none is given.
    """
    probe = {"probe": "window"} if str(prefill) == "chunked" else {}
    return get_policy("restkv", preset, **{"budget": DEFAULT_BUDGET, **probe, **options})
