"""Prefill: a prompt goes through the layers one by one, and only the entries its policy keeps stay.

Letters: L prompt length, E hidden width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from modeling.cache import KVCache
from modeling.forward import Attend, Watch, dense_layer
from modeling.layers import Decoder
from modeling.room import require
from modeling.sparse import sparse_attention
from restkv.evict import Evictor
from restkv.patterns import Pattern
from restkv.phrases import Phrases
from restkv.reading import Layer, embed, read_layers

Progress = Callable[[int, int], None]  # (layers or tokens done, of how many)


def prefill(
    model: Decoder,
    cache: KVCache,
    evictor: Evictor,
    ids: Sequence[int],
    progress: Progress | None = None,
    pattern: Pattern | None = None,
    attend: Attend = partial(sparse_attention, backend="sdpa"),  # noqa: B008 - it is no more mutable than a function
    phrases: Phrases = Phrases(),  # noqa: B008 - nor is this
) -> Tensor:
    """Prefill of a one-row cache, layer by layer: the full keys and values of ONE layer are alive at a time, or those of all
    where the policy's probe drafts (see read_layers).

    Args:
        cache, evictor: of the row alone (KVCache.row, Evictor.row).
        ids: the prompt's token ids.
        progress: called with the layers done and the layers in all.
        pattern: which part of the attention to compute; None: all of it.
        attend: to the blocks that the pattern chooses.
        phrases: for probes that ask for something.
    Returns:
        hidden state [1, E] of the last token after the last layer.
    """
    length, config = len(ids), model.config
    width = config.hidden_size + 2 * config.num_kv_heads * config.head_dim
    require(
        length * width * model.dtype.itemsize, model.device
    )  # the least of it: hidden states, one layer's keys and values
    last = max(
        evictor.policy.observed_prompt, cache.ring_size, 1
    )  # without a query nobody knows what is still in sight
    masses: dict[int, Tensor | None] = {}

    def watch(index: int) -> Watch | None:
        callback, masses[index] = evictor.watch_prompt(index, length)
        return callback

    def store(index: int, layer: Layer) -> None:
        evictor.store_prompt(cache, index, layer, masses.pop(index))
        if progress is not None:
            progress(index + 1, config.num_layers)

    x_1E = read_layers(
        model,
        ids,
        evictor.reading(ids, phrases),
        last,
        store,
        watch=watch,
        raw=evictor.policy.slot_positions,
        normed="normed" in evictor.policy.needs,
        pattern=pattern,
        attend=attend,
    )
    evictor.prompt_done(cache, length)
    return x_1E


def dense_hidden(model: Decoder, ids: Sequence[int]) -> Tensor:
    """Hidden states [L, E] after the last layer with the full cache; nothing is stored."""
    x_LE, rotary = embed(model, ids)
    for block in model.blocks:
        dense_layer(model, block, x_LE, rotary, last=0)
    return x_LE
