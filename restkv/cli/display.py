"""What the command line shows besides the answer: summary and tables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from inspect import getdoc, getmodule
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from modeling.shown import shown
from restkv.errors import PolicyError, RestKVError, RestKVWarning

if TYPE_CHECKING:
    from modeling.layers import Decoder
    from restkv.phrases import Phrases
    from restkv.policies import Policy
    from restkv.results import Generation, Stats


def titled(title: str, table: Table) -> Group:
    """A table under its title, which may be wider than the table: one of rich's own would break at the table's width."""
    return Group(Text(shown(title), style="table.title"), table)


def byte_text(count: float) -> str:
    """A number of bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"


def summary(generation: Generation) -> str:
    """What was kept, what it saved and how fast it was, in two lines."""
    return f"{holdings(generation.stats)}{balance(generation.stats)}\n{pace(generation)}"


def holdings(stats: Stats) -> str:
    """What the cache keeps and what that saves, in a line.

    Pages are handed out whole, so a short cache holds more bytes than a full one would count: that is said apart.
    """
    per_layer = [sum(rows) / len(rows) for rows in stats.kept]
    kept, saved = sum(per_layer) / len(per_layer), 1 - stats.allocated_bytes / stats.full_bytes
    held, full, live = map(byte_text, (stats.allocated_bytes, stats.full_bytes, stats.live_bytes))
    text = f"{stats.method}: kept {kept:.0f} of {stats.seen[0]} entries per KV head"
    if saved > 0:
        return f"{text}; cache {held}, full cache {full} ({saved:.0%} saved)"
    if all(layer == stats.seen for layer in stats.kept):
        budget = "" if stats.budget is None else f", all within the budget of {_budget_text(stats.budget)}"
        return f"{text}, nothing evicted{budget}; cache {live}, in whole pages {held}"
    return f"{text}; cache {live} of {full}, in whole pages {held}"


def balance(stats: Stats) -> str:
    """How evenly ranks share what is kept; nothing where there is one."""
    ranks = len(stats.rank_entries)
    return "" if ranks < 2 else f"; {ranks} ranks, the fullest holds {stats.imbalance:.2f} times their mean"


def _budget_text(budget: float | tuple[int, ...]) -> str:
    if isinstance(budget, tuple):
        return ",".join(map(str, budget))
    return f"{budget:,}" if isinstance(budget, int) else f"{budget:.0%}"


def pace(generation: Generation) -> str:
    """How fast an answer came, in a line."""
    stats = generation.stats
    return (
        f"first token after {stats.ttft_s:.2f} s of {stats.prompt_tokens[0]} prompt tokens; "
        f"{stats.new_tokens[0]} new tokens, {stats.tokens_per_s:.0f}/s, ended by {generation.finish_reason}"
    )


def methods_table() -> tuple[Table, str]:
    """Every method with its idea (first paragraph of its module), own options and presets; and what all take."""
    from restkv.policies import Policy, known_policies, policy_class

    common = fields(Policy)
    shared = {field.name: field.default for field in common}
    table = Table("method", "what stays", "options and defaults of its own", "presets", show_lines=True)
    for name in known_policies():
        try:
            cls = policy_class(name)
        except PolicyError as error:  # a broken plugin is no reason to hide the rest
            warnings.warn(str(error), RestKVWarning, stacklevel=2)
            continue
        idea = (getdoc(getmodule(cls)) or "").split("\n\n")[0]
        own = [
            _option(field) for field in fields(cls) if field.name not in shared or field.default != shared[field.name]
        ]
        table.add_row(name, " ".join(idea.split()), "\n".join(own), "\n".join(cls.PRESETS))
    return table, f"Every method takes {', '.join(map(_option, common))}."


def layer_entries(policy: Policy, context: int, num_layers: int) -> list[int]:
    """What a policy leaves of a prompt of `context` tokens: entries per head of every layer.

    Raises:
        PolicyError: the policy cannot have its budget in a model of so many layers.
    """
    if policy.budget is None:
        return [context] * num_layers
    return [min(budget, context) for budget in policy.layer_budgets(context, num_layers)]


def bytes_table(name: str, outline: Decoder, context: int, policies: Sequence[Policy]) -> Group:
    """What the cache of each policy holds after a prompt of `context` tokens.

    "Held here" counts live entries with their positions and companions (accumulated attention, unrotated keys, kept bits);
    pages add at most one page per head. "Per query head" is the same choice stored as the papers' released code does, one
    copy of keys and values for every query head. For granularity "query" the entries are the most that a group can hold.
    """
    from torch import int32

    from restkv.sizing import companions_of

    config, dtype = outline.config, outline.dtype
    pair = 2 * config.head_dim * dtype.itemsize
    full = context * config.kv_bytes_per_token(dtype)
    table = Table("method", "entries per KV head", "held here", "of a full cache", "per query head")
    for policy in policies:
        companions = companions_of(policy, outline).values()
        slot = pair + int32.itemsize + sum(math.prod(shape) * kind.itemsize for shape, kind in companions)
        budgets = layer_entries(policy, context, config.num_layers)
        union = config.group if policy.granularity == "query" and policy.budget is not None else 1
        entries = [min(budget * union, context) for budget in budgets]
        held, copied = sum(entries) * config.num_kv_heads * slot, sum(budgets) * config.num_heads * pair
        mean = sum(entries) / len(entries)
        table.add_row(policy.name, f"{mean:,.0f}", byte_text(held), f"{held / full:.1%}", byte_text(copied))
    return titled(name, table)


def ranks_table(outline: Decoder, context: int, policy: Policy) -> Group:
    """What ranks that share a model send one another, and what each of them holds.

    Raises:
        PolicyError: the budget is no whole number.
        ParallelError: the KV heads do not divide among 2.
    """
    from restkv.traffic import HEADS, LINKS, cells, sizes

    if not isinstance(policy.budget, int):
        raise PolicyError(
            f"--ranks: budget {_budget_text(policy.budget or 1.0)} is no number of entries; give one, as 1024"
        )
    table = Table(*HEADS)
    for ranks in sizes(outline.config):
        table.add_row(*cells(outline.config, outline.dtype, policy, context, ranks))
    links = " / ".join(f"{link.name} ({link.rate / 1e9:g} GB/s, {1e6 * link.latency:.0f} µs a call)" for link in LINKS)
    return titled(f"ranks under {policy.name}, a prompt of {context:,} tokens; ms over {links}", table)


def _option(field: Field[Any]) -> str:
    return field.name if field.default is MISSING else f"{field.name}={field.default}"


def checkpoint_table(name: str, outline: Decoder, context: int, entries: Sequence[int]) -> Group:
    """Shapes and sizes of a model; so many entries per KV head of each layer against a full cache of `context` tokens."""
    from modeling.checkpoint.expected import parameter_count
    from modeling.quant import weights_of

    config, held = outline.config, weights_of(outline)
    size = sum(parameter.nbytes for parameter in outline.parameters())
    per_token = config.kv_bytes_per_token(outline.dtype)
    kept = sum(entries) / len(entries)
    windows = [window for window in config.windows if window is not None]
    rows = {
        "family": config.family,
        "dtype": str(outline.dtype).removeprefix("torch."),
        "parameters": f"{parameter_count(config):,} ({byte_text(size)}{'' if held is None else f' as {held}'})",
        "layers": str(config.num_layers),
        "width, MLP width": f"{config.hidden_size:,}, {config.intermediate_size:,}",
        "query heads, KV heads": f"{config.num_heads}, {config.num_kv_heads} (groups of {config.group})",
        "head dim": str(config.head_dim),
        "vocabulary": f"{config.vocab_size:,}" + (" (tied output)" if config.tie_embeddings else ""),
        "positions": f"{config.max_positions:,}",
        "rope": ", ".join(f"{rope.kind} (theta {rope.theta:g})" for rope in config.ropes),
        "sliding window": f"{windows[0]:,} in {len(windows)} layers" if windows else "none",
        "cache per token": byte_text(per_token),
        f"full cache at {context:,} tokens": byte_text(per_token * context),
        f"cache at {kept:,.0f} entries per KV head": f"{byte_text(per_token * kept)} ({kept / context:.1%})",
    }
    table = Table(show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return titled(name, table)


SHOWN_PROBES = ("window", "prompt", "draft:8", "replay", "questions", "questions:12", "ask", "replay+questions:12")


def probes_table(outline: Decoder, context: int, phrases: Phrases) -> Group:
    """What probes read besides a prompt of `context` tokens, and what is alive at once until it has been evicted: those that ask
    are left out where there is no tokenizer to ask with.
    """
    from restkv.costs import cost_of

    table = Table("probe", "tokens read besides", "steps", "alive at once", "of that, keys and values")
    for probe in SHOWN_PROBES:
        try:
            cost = cost_of(probe, context, phrases)
        except RestKVError:
            continue
        full = context * outline.config.kv_bytes_per_token(outline.dtype)
        held = (
            f"all layers', {byte_text(full)}"
            if cost.steps
            else f"one layer's, {byte_text(full / outline.config.num_layers)}"
        )
        read = f"{cost.read:,}" + (f" and {cost.drafted:,} drafted" if cost.steps else "")
        table.add_row(probe, read, str(cost.steps), byte_text(cost.alive(outline.config, outline.dtype)), held)
    return titled(f"what a probe costs a prompt of {context:,} tokens, at most", table)
