"""A prompt and what its probe reads after it go through the layers together, one layer at a time.

Letters: L prompt length, T tokens read after it, E hidden width, H query heads, K KV heads, D head dim, W last queries,
S kinds of sizes (Observation.sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.forward import CHUNK, Attend, Watch, dense_layer, side_layer
from modeling.layers import Block, Decoder
from restkv.patterns import Pattern, chooser
from restkv.probes import Reading, Seen


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
    early: Callable[[int, Layer], Layer] | None = None,
) -> Tensor:
    """Read a prompt, and what its probe reads after it. One layer's keys and values are alive at a time, unless drafts are to be
    made, which need those of all layers.

    Args:
        last: W, how many of the last queries each layer comes with.
        store: called with every layer, in order: when it has been read, or, with drafts, when these have been made.
        watch: what watches a layer's attention (dense_layer), asked for before the layer is read.
        raw: with unrotated keys.
        normed: with the second kind of sizes (Observation.sizes).
        pattern, attend: see prefill; what follows the prompt attends to all of it.
        early: where drafts are to be made, called with every layer when it has been read; what it returns is held, and comes
            to `store`.
    Returns:
        hidden state [1, E] of the prompt's last token after the last layer.
    """
    length = len(ids)
    x_LE, rotary = embed(model, ids)
    sides = [(side, *embed(model, side.ids, length)) for side in reading.sides]
    held: list[Layer] = []

    def read(index: int, block: Block) -> Layer:
        sizes_SW = _sizes(block, x_LE[max(0, length - max(last, reading.own)) :], normed)
        q_HWD, k_KLD, v_KLD, raw_KLD = dense_layer(
            model,
            block,
            x_LE,
            rotary,
            max(last, reading.own),
            watch=watch(index),
            raw=raw,
            choose=chooser(pattern, model.config, block.window, length),
            attend=attend,
        )
        seen = []
        if reading.own:
            own = slice(q_HWD.shape[1] - reading.own, None)
            seen.append(Seen(q_HWD[:, own], length - reading.own, gap=reading.gap, sizes_SQ=sizes_SW[:, own]))
        for side, x_TE, side_rotary in sides:
            sizes_ST = _sizes(block, x_TE, normed)
            q_HTD, k_KTD, v_KTD = side_layer(model, block, x_TE, side_rotary, k_KLD, v_KLD)
            seen.append(Seen(q_HTD, length, k_KTD, v_KTD, side.part, sizes_SQ=sizes_ST))
        newest = slice(max(0, q_HWD.shape[1] - last), None)
        return Layer(q_HWD[:, newest], k_KLD, v_KLD, raw_KLD, sizes_SW[:, newest], tuple(seen))

    for index, block in enumerate(model.blocks):
        layer = read(index, block)
        if reading.drafts:
            held.append(layer if early is None else early(index, layer))
        else:
            store(index, layer)
        del layer  # not kept alive while the next one is read
    if held:
        drafts = _draft(model, x_LE[-1:].clone(), held, reading.drafts, normed)
        for index, drafted in enumerate(drafts):
            store(index, held[index]._replace(seen=(*held[index].seen, drafted)))
    return x_LE[-1:]


def _draft(model: Decoder, x_1E: Tensor, layers: Sequence[Layer], count: int, normed: bool) -> list[Seen]:
    """Let the model go on greedily for `count` tokens, or until it ends the text; what these see in every layer."""
    length = layers[0].k_KLD.shape[1]
    none_H0D = [layer.q_HWD[:, :0] for layer in layers]
    seen = [
        Seen(
            none, length, layer.k_KLD[:, :0], layer.v_KLD[:, :0], newest=True, sizes_SQ=_sizes(block, x_1E[:0], normed)
        )
        for none, layer, block in zip(none_H0D, layers, model.blocks, strict=True)
    ]
    for step in range(count):
        token = int(model.head(x_1E).argmax())  # sync: the next step begins with it
        if token in model.config.eos_token_ids:
            break
        x_1E, rotary = embed(model, [token], length + step)
        for index, (block, layer, own) in enumerate(zip(model.blocks, layers, seen, strict=True)):
            assert own.k_KTD is not None and own.v_KTD is not None and own.sizes_SQ is not None
            sizes_SQ = torch.cat([own.sizes_SQ, _sizes(block, x_1E, normed)], 1)
            before = torch.cat([layer.k_KLD, own.k_KTD], 1), torch.cat([layer.v_KLD, own.v_KTD], 1)
            new = side_layer(model, block, x_1E, rotary, *before)
            q_HQD, k_KTD, v_KTD = (
                torch.cat(pair, 1) for pair in zip((own.q_HQD, own.k_KTD, own.v_KTD), new, strict=True)
            )
            seen[index] = own._replace(q_HQD=q_HQD, k_KTD=k_KTD, v_KTD=v_KTD, sizes_SQ=sizes_SQ)
    return seen


def _sizes(block: Block, x_TE: Tensor, normed: bool) -> Tensor:
    """Observation.sizes of the queries that this layer makes of a residual stream: [S, T]."""
    if not normed:
        return _length(x_TE)[None]
    pieces = [torch.stack([_length(x_tE), _length(block.input_layernorm(x_tE))]) for x_tE in x_TE.split(CHUNK)]
    return torch.cat(pieces, 1)


def _length(x_TE: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_TE, dim=-1, dtype=torch.promote_types(x_TE.dtype, torch.float32))


def embed(model: Decoder, ids: Sequence[int], start: int = 0) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Residual stream [L, E], which dense_layer updates in place, and the rotations of all positions, from `start` on."""
    ids_1L = torch.tensor([list(ids)], device=model.device)
    pos_1L = torch.arange(start, start + len(ids), dtype=torch.int32, device=model.device)[None]
    return model.embed(ids_1L)[0].clone(), model.rotary(pos_1L, pos_1L.amax(-1) + 1)
