"""Texts that go on from one prompt, each on its own, in one batch: what follows the prompt is read, then the model goes on.

All of them attend to the one full cache of the prompt, which is not copied, and each to what it has read itself.

Letters: H query heads, K KV heads, B texts, b those that a step reads, L tokens of the prompt, T tokens read at once, R room of a
text, D head dim, E hidden width, S kinds of sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from modeling.attention import branched_attention
from modeling.layers import Decoder
from restkv.probes import Side
from restkv.seen import Seen, stream_sizes

TEXTS = 32  # drafted at once: more would take more memory, and hardly less time
DRAFTED = -1  # in a plan: whatever the model says


class _Own(NamedTuple):
    """What a layer makes of the texts; columns that no text has reached hold nothing of use."""

    q_HBRD: Tensor
    k_KBRD: Tensor
    v_KBRD: Tensor
    sizes_SBR: Tensor


def draft(
    model: Decoder, entries: Sequence[tuple[Tensor, Tensor]], sides: Sequence[Side], x_1E: Tensor, normed: bool
) -> list[list[Seen]]:
    """Read texts after a prompt and let the model go on with each as it says, greedily.

    Args:
        entries: the prompt's keys and values [K, L, D] of every layer, after RoPE.
        sides: the texts, all with drafts; one without tokens goes on with the prompt itself.
        x_1E: of the prompt's last token after the last layer.
        normed: see stream_sizes.
    Returns:
        for every layer what the queries of each text see: those of its own tokens and of what was drafted.
    """
    seen: list[list[Seen]] = [[] for _ in entries]
    for start in range(0, len(sides), TEXTS):
        some = _Texts(model, entries, sides[start : start + TEXTS], normed)
        some.go_on(x_1E)
        for layer, more in zip(seen, some.seen(), strict=True):
            layer += more
    return seen


class _Texts:
    """Some texts and how far each has come."""

    def __init__(
        self, model: Decoder, entries: Sequence[tuple[Tensor, Tensor]], sides: Sequence[Side], normed: bool
    ) -> None:
        self._model, self._entries, self._sides, self._normed = model, entries, sides, normed
        self._length = entries[0][0].shape[1]
        self._counts = [0] * len(sides)  # tokens read so far
        plans = [[token for part in side.drafts for token in (DRAFTED,) * part.most + part.then] for side in sides]
        self._plans = [deque(plan) for plan in plans]
        # Texts are padded to the longest one before drafts take the padding's place.
        longest = max(len(side.ids) for side in sides)
        room = max(longest, *(len(side.ids) + len(plan) for side, plan in zip(sides, plans, strict=True)))
        self._own = [self._room(*pair, len(sides), room) for pair in entries]

    def _room(self, k_KLD: Tensor, v_KLD: Tensor, texts: int, room: int) -> _Own:
        heads, kinds = self._model.config.num_heads, 2 if self._normed else 1
        sizes_SBR = k_KLD.new_zeros(kinds, texts, room, dtype=torch.promote_types(k_KLD.dtype, torch.float32))
        q_HBRD = k_KLD.new_zeros(heads, texts, room, k_KLD.shape[-1])
        k_KBRD, v_KBRD = (x.new_zeros(len(x), texts, room, x.shape[-1]) for x in (k_KLD, v_KLD))
        return _Own(q_HBRD, k_KBRD, v_KBRD, sizes_SBR)

    def go_on(self, x_1E: Tensor) -> None:
        """Read all texts, then draft until every plan is through."""
        model, everyone = self._model, list(range(len(self._sides)))
        x_BE = x_1E.expand(len(everyone), -1)
        if longest := max(len(side.ids) for side in self._sides):
            padded = [[*side.ids, *[0] * (longest - len(side.ids))] for side in self._sides]
            counts = [len(side.ids) for side in self._sides]
            x_BTE = self._read(everyone, padded, counts)
            x_BE = torch.stack(
                [x_TE[count - 1] if count else x_1E[0] for x_TE, count in zip(x_BTE, counts, strict=True)]
            )
        else:
            x_BE = x_BE.clone()
        while going := [text for text in everyone if self._plans[text]]:
            said = model.head(x_BE[going]).argmax(-1).tolist()  # sync: the next step begins with it
            nexts = {text: self._next(text, token) for text, token in zip(going, said, strict=True)}
            step = {text: token for text, token in nexts.items() if token is not None}
            if step:
                some = list(step)
                x_BE[some] = self._read(some, [[token] for token in step.values()], [1] * len(some))[:, 0]

    def _next(self, text: int, said: int) -> int | None:
        """The token that a text reads next, after which the model would say `said`; None: its plan is through."""
        plan, ends = self._plans[text], self._model.config.eos_token_ids
        if said in ends:
            while plan and plan[0] == DRAFTED:
                plan.popleft()
        if not plan:
            return None
        token = plan.popleft()
        return said if token == DRAFTED else token

    def _read(self, texts: Sequence[int], ids: Sequence[Sequence[int]], counts: Collection[int]) -> Tensor:
        """Hidden states [b, T, E] after the last layer of tokens that some texts go on with; the first `counts` of them are no
        padding."""
        model, device = self._model, self._model.device
        text_b, ids_bT = torch.tensor(texts, device=device), torch.tensor(ids, device=device)
        first_b = torch.tensor([self._counts[text] for text in texts], device=device)
        column_bT = first_b[:, None] + torch.arange(ids_bT.shape[1], device=device)
        known_b = self._length + first_b + torch.tensor(counts, device=device)
        x_bTE = model.embed(ids_bT)
        rotary = model.rotary((self._length + column_bT).int(), known_b)
        where = slice(None), text_b[:, None], column_bT
        config = model.config
        for block, (k_KLD, v_KLD), own in zip(model.blocks, self._entries, self._own, strict=True):
            sizes_Sn = stream_sizes(block, x_bTE.flatten(0, 1), self._normed)
            own.sizes_SBR[where] = sizes_Sn.unflatten(1, column_bT.shape)
            q_bTHD, k_bTKD, v_bTKD = block.project(x_bTE, *rotary[block.rope])
            for target, new in ((own.q_HBRD, q_bTHD), (own.k_KBRD, k_bTKD), (own.v_KBRD, v_bTKD)):
                target[where] = rearrange(new, "b T X D -> X b T D")
            o_bTHD = branched_attention(
                q_bTHD,
                k_KLD,
                v_KLD,
                own.k_KBRD[:, text_b],
                own.v_KBRD[:, text_b],
                first_b,
                scale=config.attn_scale,
                softcap=config.attn_softcap,
                window=block.window,
            )
            x_bTE = block.finish(x_bTE, o_bTHD)
        for text, count in zip(texts, counts, strict=True):
            self._counts[text] += count
        return x_bTE

    def seen(self) -> list[list[Seen]]:
        """See draft."""
        return [[self._seen(own, text) for text in range(len(self._sides))] for own in self._own]

    def _seen(self, own: _Own, text: int) -> Seen:
        side, read = self._sides[text], slice(self._counts[text])
        q_HQD, k_KTD, v_KTD, sizes_SQ = (x[:, text, read] for x in own)
        return Seen(
            q_HQD,
            self._length,
            k_KTD,
            v_KTD,
            side.part,
            newest=not side.ids,
            sizes_SQ=sizes_SQ,
            probe=side.probe,
        )
