"""A prompt and what its probe reads after it go through the layers together, one layer at a time.

Letters: L prompt length, T tokens read after it, E hidden width, H query heads, K KV heads, D head dim, W last queries,
S kinds of sizes (Observation.sizes).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.forward import Attend, Watch, dense_layer, side_layer
from modeling.layers import Block, Decoder
from restkv.drafting import draft
from restkv.patterns import Pattern, chooser
from restkv.seen import Reading, Seen, stream_sizes


class Layer(NamedTuple):
    """One layer of a prompt that has been read.

    q_HWD: the last queries; k_KLD, v_KLD and, if asked for, unrotated keys raw_KLD of all tokens. sizes_SW: of the last queries
    (see Observation). seen: what the probe observes besides the window.
    """

    q_HWD: Tensor
    k_KLD: Tensor
    v_KLD: Tensor
    raw_KLD: Tensor | None = None
    sizes_SW: Tensor | None = None
    seen: tuple[Seen, ...] = ()


def read_layers(
    model: Decoder,
    ids: Sequence[int],
    reading: Reading,
    last: int,
    store: Callable[[int, Layer], None],
    *,
    watch: Callable[[int], Watch | None],
    raw: bool,
    normed: bool,
    pattern: Pattern | None,
    attend: Attend,
) -> Tensor:
    """Read a prompt, and what its probe reads after it. One layer's keys and values are alive at a time, and what was read after
    the prompt; with drafts those of all layers, until these are made, and still one layer's of what else is read.

    Args:
        last: W, how many of the last queries each layer comes with.
        store: called with every layer, in order: when it has been read, or, with drafts, when these have been made.
        watch: what watches a layer's attention (dense_layer), asked for before the layer is read.
        raw: with unrotated keys.
        normed: with the second kind of sizes (Observation.sizes).
        pattern, attend: see prefill; what follows the prompt attends to all of it.
    Returns:
        hidden state [1, E] of the prompt's last token after the last layer.
    """
    length = len(ids)
    x_LE, rotary = embed(model, ids)

    def read(index: int, block: Block) -> Layer:
        """A layer of the prompt alone."""
        queries = max(last, length - reading.own.start if reading.own else 0)
        sizes_SW = stream_sizes(block, x_LE[max(0, length - queries) :], normed)
        q_HWD, k_KLD, v_KLD, raw_KLD = dense_layer(
            model,
            block,
            x_LE,
            rotary,
            queries,
            watch=watch(index),
            raw=raw,
            choose=chooser(pattern, model.config, block.window, length),
            attend=attend,
        )
        seen = []
        if own := reading.own:
            at = slice(q_HWD.shape[1] - (length - own.start), None, own.step)
            q_HQD, sizes_SQ = q_HWD[:, at].contiguous(), sizes_SW[:, at]
            seen.append(Seen(q_HQD, own.start, gap=reading.gap, sizes_SQ=sizes_SQ, step=own.step))
        newest = slice(max(0, q_HWD.shape[1] - last), None)
        q_HwD = q_HWD[:, newest].clone() if own.step > 1 else q_HWD[:, newest]  # those between what is observed go
        return Layer(q_HwD, k_KLD, v_KLD, raw_KLD, sizes_SW[:, newest], tuple(seen))

    def observed(block: Block, layer: Layer, drafted: Iterator[Seen]) -> Layer:
        """The same with what its probe sees there, in the order of the reading."""
        seen = list(layer.seen)
        for side, embedded in beside:
            if embedded is None:
                seen.append(next(drafted))
                continue
            x_TE, side_rotary = embedded
            sizes_ST = stream_sizes(block, x_TE, normed)
            q_HTD, k_KTD, v_KTD = side_layer(model, block, x_TE, side_rotary, layer.k_KLD, layer.v_KLD)
            seen.append(Seen(q_HTD, length, k_KTD, v_KTD, side.part, sizes_SQ=sizes_ST, probe=side.probe))
        return layer._replace(seen=tuple(seen))

    held: deque[Layer] = deque()
    if reading.drafts:
        held.extend(read(index, block) for index, block in enumerate(model.blocks))
    drafting = [side for side in reading.sides if side.drafts]
    entries = [(layer.k_KLD, layer.v_KLD) for layer in held]
    drafted: list[list[Seen]] = [[] for _ in model.blocks]
    if held:
        drafted = draft(model, entries, drafting, x_LE[-1:], normed)
    del entries  # each layer's go once it has been stored
    beside = [(side, None if side.drafts else embed(model, side.ids, length)) for side in reading.sides]
    for index, block in enumerate(model.blocks):
        layer = observed(block, held.popleft() if held else read(index, block), iter(drafted[index]))
        store(index, layer)
        del layer  # not kept alive while the next one is read
    return x_LE[-1:]


def embed(model: Decoder, ids: Sequence[int], start: int = 0) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Residual stream [L, E], which dense_layer updates in place, and the rotations of all positions, from `start` on."""
    ids_1L = torch.tensor([list(ids)], device=model.device)
    pos_1L = torch.arange(start, start + len(ids), dtype=torch.int32, device=model.device)[None]
    return model.embed(ids_1L)[0].clone(), model.rotary(pos_1L, pos_1L.amax(-1) + 1)
