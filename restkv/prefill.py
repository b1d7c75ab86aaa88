"""Prefill: a prompt goes through the layers one by one, and only the entries its policy keeps stay.

Letters: L prompt length, E hidden width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from modeling.cache import KVCache
from modeling.forward import Attend, dense_layer
from modeling.layers import Decoder
from modeling.room import require
from modeling.sparse import sparse_attention
from restkv.evict import Evictor
from restkv.patterns import Pattern, chooser

Progress = Callable[[int, int], None]  # (layers or tokens done, of how many)


def prefill(
    model: Decoder,
    cache: KVCache,
    evictor: Evictor,
    ids: Sequence[int],
    progress: Progress | None = None,
    pattern: Pattern | None = None,
    attend: Attend = partial(sparse_attention, backend="sdpa"),  # noqa: B008 - it is no more mutable than a function
) -> Tensor:
    """Prefill of a one-row cache, layer by layer: the full keys and values of ONE layer are alive at a time.

    Args:
        cache, evictor: of the row alone (KVCache.row, Evictor.row).
        ids: the prompt's token ids.
        progress: called with the layers done and the layers in all.
        pattern: which part of the attention to compute; None: all of it.
        attend: to the blocks that the pattern chooses.
    Returns:
        hidden state [1, E] of the last token after the last layer.
    """
    length, config = len(ids), model.config
    width = config.hidden_size + 2 * config.num_kv_heads * config.head_dim
    require(
        length * width * model.dtype.itemsize, model.device
    )  # the least of it: hidden states, one layer's keys and values
    x_LE, rotary = embed(model, ids)
    last = max(
        evictor.policy.observed_prompt, cache.ring_size, 1
    )  # without a query nobody knows what is still in sight
    for index, block in enumerate(model.blocks):
        watch, mass_XL = evictor.watch_prompt(index, length)
        q_HWD, k_KLD, v_KLD, raw_KLD = dense_layer(
            model,
            block,
            x_LE,
            rotary,
            last,
            watch=watch,
            raw=evictor.policy.slot_positions,
            choose=chooser(pattern, config, block.window, length),
            attend=attend,
        )
        evictor.store_prompt(cache, index, q_HWD, k_KLD, v_KLD, raw_KLD, mass_XL)
        if progress is not None:
            progress(index + 1, config.num_layers)
    evictor.prompt_done(cache, length)
    return x_LE[-1:]


def dense_hidden(model: Decoder, ids: Sequence[int]) -> Tensor:
    """Hidden states [L, E] after the last layer with the full cache; nothing is stored."""
    x_LE, rotary = embed(model, ids)
    for block in model.blocks:
        dense_layer(model, block, x_LE, rotary, last=0)
    return x_LE


def embed(model: Decoder, ids: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Residual stream [L, E], which dense_layer updates in place, and the rotations of all positions."""
    ids_1L = torch.tensor([list(ids)], device=model.device)
    pos_1L = torch.arange(len(ids), dtype=torch.int32, device=model.device)[None]
    return model.embed(ids_1L)[0].clone(), model.rotary(pos_1L, pos_1L.amax(-1) + 1)
