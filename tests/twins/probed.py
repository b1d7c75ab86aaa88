"""The slow twin of probes: what a policy keeps of a prompt when other queries than its last ones are observed.

What a probe reads is appended to the prompt, a dense model reads both, and the entries of the appended text are dropped. Scores
are those of twins/reference.py, the selections those of twins/reference_budgets.py.

Letters: N layers, H query heads, K KV heads, X heads with a kept set of their own, L prompt length, W observed queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from modeling.layers import Block, Decoder
from restkv.observe import Observation
from restkv.policies import Policy
from restkv.testing.dense import Dense
from restkv.testing.watch import protected
from twins import reference, reference_budgets

NOTHING = -math.inf


@dataclass(frozen=True)
class Settings:
    """How probes are: tokens of a piece of the replay, the gap of `prompt`, and the requests in front of what is read: one for
    the first piece, one for later ones (before and after 8 quoted tokens), one for each question, one before each question of the
    model's own, and what is read between such a question and its answer, of which so many tokens are drafted.
    """

    piece: int
    gap: int
    first: Sequence[int] = ()
    later: tuple[Sequence[int], Sequence[int]] = ((), ())
    questions: Sequence[Sequence[int]] = ()
    eos: Sequence[int] = ()
    beginnings: Sequence[Sequence[int]] = ()
    reply: Sequence[int] = ()
    drafted: tuple[int, int] = (0, 0)


class Text(Dense):
    """A dense model's text, and of every layer the lengths of the residual stream before it, and after its norm."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.stream: list[list[float]] = [[] for _ in model.blocks]
        self.normed: list[list[float]] = [[] for _ in model.blocks]

    def run(self, ids: Sequence[int]) -> Tensor:
        with ExitStack() as stack:
            for block, *lengths in zip(self.model.blocks, self.stream, self.normed, strict=True):
                stack.enter_context(patch.object(block, "project", self._noting(block, *lengths)))
            return super().run(ids)

    @staticmethod
    def _noting(block: Block, stream: list[float], normed: list[float]) -> Callable[..., Any]:
        project = block.project

        def call(x_1TE: Tensor, *rest: Tensor) -> Any:
            stream.extend(x_1TE[0].norm(dim=-1).tolist())
            normed.extend(block.input_layernorm(x_1TE)[0].norm(dim=-1).tolist())
            return project(x_1TE, *rest)

        return call


@dataclass(frozen=True)
class View:
    """Queries at these positions of a dense model's text, and the columns (positions) that they share their attention among."""

    text: Text
    queries: Sequence[int]
    columns: Sequence[int]
    end: int | None = None
    gap: int = 0


def read(model: Decoder, ids: Sequence[int]) -> Text:
    text = Text(model)
    text.run(ids)
    return text


def drafted(text: Text, logits_V: Tensor, count: int, eos: Sequence[int]) -> Tensor:
    """Let a text go on greedily, one token after the other; logits after the last."""
    for _ in range(count):
        if int(logits_V.argmax()) in eos:
            break
        logits_V = text.run([int(logits_V.argmax())])
    return logits_V


def views(model: Decoder, probe: str, prompt: Sequence[int], window: int, settings: Settings) -> list[View]:
    """What each part of a probe observes."""
    L, found = len(prompt), []
    for part in probe.split("+"):
        name, _, number = part.partition(":")
        if name == "window":
            found.append(View(read(model, prompt), range(max(0, L - window), L), range(L)))
        elif name == "prompt":
            distance = math.ceil((L - L // 2) / int(number or 512))
            queries = [L - 1 - n for n in range(0, L - L // 2, distance)]
            found.append(View(read(model, prompt), queries[::-1], range(L), L, settings.gap))
        elif name == "draft":
            text = Text(model)
            drafted(text, text.run(prompt), int(number or 8), settings.eos)
            oldest = max(0, L - max(0, window - (text.length - L)))
            found.append(View(text, range(oldest, text.length), range(text.length)))
        elif name == "replay":
            for start in range(0, L, settings.piece):
                again = list(prompt[start : start + settings.piece])
                before, after = settings.later
                asked = [*before, *prompt[max(0, start - 8) : start], *after] if start else settings.first
                text = read(model, [*prompt, *asked, *again])
                sees = (
                    sorted({*range(min(4, start)), *range(start, start + len(again))})
                    if settings.piece < L
                    else range(L)
                )
                found.append(View(text, range(L, text.length), [*sees, *range(L, text.length)]))
        elif name == "questions":
            for asked in settings.questions:
                text = Text(model)
                drafted(text, text.run([*prompt, *asked]), int(number or 0), settings.eos)
                found.append(View(text, range(L, text.length), range(text.length)))
        else:
            for asked in settings.beginnings[: int(number)]:
                text, (question, answer) = Text(model), settings.drafted
                logits_V = drafted(text, text.run([*prompt, *asked]), question, settings.eos)
                for token in settings.reply:
                    logits_V = text.run([token])
                drafted(text, logits_V, answer, settings.eos)
                found.append(View(text, range(L, text.length), range(text.length)))
    return found or views(model, "window", prompt, window, settings)


def scores(
    model: Decoder, policy: Policy, views: Sequence[View], layer: int, length: int, budget: int
) -> list[list[float]]:
    """[X][L]: the most that any view says of an entry; nothing where no later query will see it."""
    block, config = model.blocks[layer], model.config
    H, G = config.num_heads, config.group
    scored = [range(h, h + G) for h in range(0, H, G)] if policy.gqa == "joint" else [range(h, h + 1) for h in range(H)]
    best = [[NOTHING] * length for _ in scored]
    w_o = [block.output_weight()[:, h].double().numpy() for h in range(H)]
    if not getattr(policy, "output_weight", True):
        w_o = [np.eye(config.head_dim)] * H
    for view in views:
        columns = torch.tensor(list(view.columns))
        obs = Observation(
            q=view.text.q[layer][list(view.queries)].transpose(0, 1)[None],
            q_pos=torch.tensor(list(view.queries))[None],
            k=view.text.k[layer][columns].transpose(0, 1)[None],
            v=view.text.v[layer][columns].transpose(0, 1)[None],
            pos=columns.expand(1, config.num_kv_heads, -1),
            root=None,
            softmax_scale=config.attn_scale,
            softcap=config.attn_softcap,
            sliding_window=block.window,
            end=view.end,
            gap=view.gap,
            sizes=torch.tensor(
                [[[sizes[layer][p] for p in view.queries] for sizes in (view.text.stream, view.text.normed)]]
            ),
        )
        heads = [reference.Head(obs, 0, h) for h in range(H)]
        for line, members in zip(best, scored, strict=True):
            mine = [heads[h] for h in members]
            for i, score in enumerate(reference.LINES[policy.name](mine, [w_o[h] for h in members], policy, budget)):
                p = mine[0].pos[mine[0].past[i]]
                if p < length:
                    line[p] = max(line[p], score)
    if policy.granularity == "kv" and policy.gqa != "joint":
        groups = [zip(*best[h : h + G], strict=True) for h in range(0, H, G)]
        best = [[max(several) if policy.gqa == "max" else sum(several) / G for several in group] for group in groups]
    if block.window is not None:
        best = [[NOTHING if p <= length - block.window else score for p, score in enumerate(line)] for line in best]
    return best


def kept(
    model: Decoder, policy: Policy, probe: str, prompt: Sequence[int], settings: Settings
) -> tuple[list[list[list[float]]], list[list[set[int]]]]:
    """Scores [X][L] of the layers that lose something, 0 for what is protected; and positions [N][X] that stay of a prompt."""
    L, config, share = len(prompt), model.config, policy.allocation.name
    budgets = policy.layer_budgets(L, config.num_layers)
    everything = [set(range(L))] * (config.num_heads if policy.granularity == "query" else config.num_kv_heads)
    seen = views(model, probe, prompt, policy.window, settings) if min(budgets) < L else []
    layers, out = [], []
    for index, budget in enumerate(budgets):
        if budget >= L:
            out.append(everything)
            continue
        score = scores(model, policy, seen, index, L, budget)
        always = protected(policy, range(L), L, budget)
        score = [[0.0 if p in always else float(s) for p, s in enumerate(line)] for line in score]
        layer = score, [range(L)] * len(score), [[p in always for p in range(L)]] * len(score)
        layers.append(layer)
        if share == "adakv":
            options = {name: getattr(policy.allocation, name) for name in ("floor", "normalize", "exact")}
            chosen = reference_budgets.adakv(*layer, budget, **options)
            out.append([{p for head, p in chosen if head == x} for x in range(len(score))])
        elif share != "global":
            out.append([reference.select(*one, budget) for one in zip(*layer, strict=True)])
    if share == "global" and layers:
        chosen = reference_budgets.whole_model(layers, budgets[0], vars(policy.allocation)["floor"])
        heads = range(len(everything))
        out = [[{p for n, x, p in chosen if (n, x) == (index, head)} for head in heads] for index in range(len(layers))]
    return [layer[0] for layer in layers], out
