"""The slow twin of every forward path: dense attention in plain PyTorch over a Decoder's own projections.

Letters: L tokens, C cached entries (with this step), H query heads, K KV heads, D head dim, E width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling.layers import Decoder


@dataclass
class DenseCache:
    """Keys after RoPE and values of everything seen so far, [C, K, D] per layer."""

    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0


@torch.no_grad()
def dense_logits(model: Decoder, ids_L: Tensor, cache: DenseCache | None = None) -> Tensor:
    """Logits [L, V] of token ids [L] that follow what the cache holds; the cache takes them in."""
    cache = cache or DenseCache()
    pos_L = torch.arange(cache.length, cache.length + len(ids_L), device=ids_L.device)
    cache.length += len(ids_L)
    pos_C = torch.arange(cache.length, device=ids_L.device)
    x_1LE = model.embed(ids_L[None])
    ropes = model.rotary(pos_L[None], torch.tensor([cache.length], device=ids_L.device))
    for block in model.blocks:
        q, k, v = (t[0] for t in block.project(x_1LE, *ropes[block.rope]))
        if block.index in cache.k:
            k, v = torch.cat((cache.k[block.index], k)), torch.cat((cache.v[block.index], v))
        cache.k[block.index], cache.v[block.index] = k, v
        seen_LC = pos_C[None] <= pos_L[:, None]
        if block.window is not None:
            seen_LC &= pos_C[None] > pos_L[:, None] - block.window
        o_1LHD = dense_attention(q, k, v, seen_LC, model.config.attn_scale, model.config.attn_softcap)[None]
        x_1LE = block.finish(x_1LE, o_1LHD)
    return model.head(x_1LE)[0]


def dense_attention(
    q_LHD: Tensor, k_CKD: Tensor, v_CKD: Tensor, seen_LC: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax(scale q k^T) v over the entries each query may see, [L, H, D]; head h reads KV head h // G."""
    group = q_LHD.shape[1] // k_CKD.shape[1]
    k_CHD, v_CHD = k_CKD.repeat_interleave(group, dim=1), v_CKD.repeat_interleave(group, dim=1)
    logit_HLC = torch.einsum("lhd,chd->hlc", q_LHD, k_CHD) * scale
    if softcap is not None:
        logit_HLC = torch.tanh(logit_HLC / softcap) * softcap
    # Softmax in float32 as transformers' eager attention has it.
    weight_HLC = logit_HLC.float().masked_fill(~seen_LC, -torch.inf).softmax(-1)
    return torch.einsum("hlc,chd->lhd", weight_HLC.to(v_CHD.dtype), v_CHD)
