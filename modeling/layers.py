"""The decoder that every supported family is an instance of, attention left out.

A forward pass is: embed, then per block project -> (someone's attention) -> finish, then head. Caches, masks and
kernels live elsewhere; what differs between families is said by ModelConfig's fields. Where
ranks share a model, each has a Decoder of its heads and of its part of the MLP's width and of the vocabulary; the residual stream
and the logits are whole on all of them.

Letters: B batch rows, T tokens, E hidden width, H query heads, K KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.config import ModelConfig
from modeling.quant import Quantised, Weight, dense, lookup
from modeling.ranks import ALONE, Ranks
from modeling.rope import Rotary, rotate

# A CPU without instructions for a narrow dtype multiplies many rows of it at a seventh of float32's rate (AVX2, bfloat16: 8
# against 55 GFLOP/s and core). From so many rows on, widening the weights costs less than it saves.
WIDENED_ROWS = 8
STREAMS = 4  # parts of a weight that one row meets side by side: 1.3 times the rate of one (float32) to 1.45 (bfloat16)
WIDENED_WEIGHTS = 1 << 22  # so many at a time (16 MiB)
NATIVE_ON_CPU = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias: every projection of the model goes through here.

    A single row in a graph compiled for the CPU is written as multiply and sum, of STREAMS parts of the weight: inductor makes
    one loop of them, in which the additions of one part do not wait for those of another. It reads the weights faster than
    aten's matrix product, and reading them is all a decode step does. Many rows of a dtype that the CPU does not multiply
    are widened to float32, which only moves the rounding from the products to the result.

    Few rows meet the codes of a quantised weight (Quantised.product); for many its rows are made anew, some at a time, in the
    dtype that is multiplied.
    """
    rows = x.numel() // x.shape[-1]
    if isinstance(weight, Quantised):
        y = weight.product(x.reshape(rows, -1))
        if y is None:
            return _in_pieces(x, weight, bias)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    if x.device.type == "cpu":
        if rows == 1 and torch.compiler.is_compiling():
            y = torch.cat([(piece * x.reshape(-1)).sum(-1) for piece in weight.chunk(STREAMS)]).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        if rows >= WIDENED_ROWS and not NATIVE_ON_CPU.get(x.dtype, True):
            return _in_pieces(x, weight, bias)
    return F.linear(x, weight, bias)


def _in_pieces(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product with some rows of the weight at a time, made in a dtype that is multiplied fast."""
    dtype = x.dtype if x.device.type != "cpu" or NATIVE_ON_CPU.get(x.dtype, True) else torch.float32
    if isinstance(weight, Quantised):
        pieces = (weight.rows(first, last, dtype) for first, last in weight.pieces(WIDENED_WEIGHTS))
    else:
        pieces = (piece.to(dtype) for piece in weight.split(max(1, WIDENED_WEIGHTS // weight.shape[1])))
    wide = x.to(dtype)
    y = torch.cat([F.linear(wide, piece) for piece in pieces], -1)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def activate(x: Tensor, name: str) -> Tensor:
    """The gate's nonlinearity, one of config.ACTIVATIONS."""
    if name == "silu":
        return F.silu(x)
    assert name in ("gelu", "gelu_pytorch_tanh"), name
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), which is x for small x and never beyond the cap; None leaves x alone."""
    return x if cap is None else cap * torch.tanh(x / cap)


def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as `dtype` would hold it (round half to even), computed without a tensor so that it traces."""
    mantissa, exponent = math.frexp(value)
    bits = 1 - int(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32 (Zhang & Sennrich 2019).

    Without `offset` the result is rounded to x's dtype before the weight is applied (Llama); with it the factor is
    1 + weight and is applied in float32 (Gemma). In bfloat16 the difference is visible.
    """

    def __init__(self, width: int, eps: float, offset: bool):
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """One layer of weights: what happens before attention (project) and after it (finish).

    Of ranks that share a model each has some columns of o_proj and down_proj, whose products are summed; rank 0 has their biases.
    """

    def __init__(self, config: ModelConfig, index: int, fused: bool = True, ranks: Ranks = ALONE):
        super().__init__()
        c = self.config = config
        self.ranks = ranks
        self.index = index
        self.window = c.windows[index]
        self.rope = c.layer_rope[index]
        self.fused = fused
        q_out, kv_out = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if fused:
            self.qkv_proj = nn.Linear(c.hidden_size, q_out + 2 * kv_out, bias=c.qkv_bias)
            self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        else:
            self.q_proj = nn.Linear(c.hidden_size, q_out, bias=c.qkv_bias)
            self.k_proj = nn.Linear(c.hidden_size, kv_out, bias=c.qkv_bias)
            self.v_proj = nn.Linear(c.hidden_size, kv_out, bias=c.qkv_bias)
            self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
            self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.o_proj = nn.Linear(q_out, c.hidden_size, bias=c.o_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, c.norm_eps, c.norm_offset)

        self.input_layernorm = norm(c.hidden_size)
        # Hugging Face's name means "before the MLP" in two-norm blocks and "after attention" in four-norm ones.
        self.post_attention_layernorm = norm(c.hidden_size)
        if c.post_norms:
            self.pre_feedforward_layernorm = norm(c.hidden_size)
            self.post_feedforward_layernorm = norm(c.hidden_size)
        if c.qk_norm:
            self.q_norm = norm(c.head_dim)
            self.k_norm = norm(c.head_dim)

    def project(self, x_BTE: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens: q [B,T,H,D], k [B,T,K,D], v [B,T,K,D], q and k after RoPE."""
        q_BTHD, k_BTKD, v_BTKD = self.unrotated(x_BTE)
        return rotate(q_BTHD, cos_BTD, sin_BTD), rotate(k_BTKD, cos_BTD, sin_BTD), v_BTKD

    def unrotated(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `project`, before RoPE.

        q is not multiplied with attn_scale. With fused weights v is a view into the joint product: inside a compiled
        graph copy it before FlexAttention reads it (docs/flexattention.md §1, bug 1).
        """
        c = self.config
        x_BTE = self.input_layernorm(x_BTE)
        if self.fused:
            qkv = linear(x_BTE, self.qkv_proj.weight, self.qkv_proj.bias)
            kv_out = c.num_kv_heads * c.head_dim
            q, k, v = qkv.split((c.num_heads * c.head_dim, kv_out, kv_out), dim=-1)
        else:
            q, k, v = (linear(x_BTE, p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_BTHD = q.unflatten(-1, (c.num_heads, c.head_dim))
        k_BTKD = k.unflatten(-1, (c.num_kv_heads, c.head_dim))
        v_BTKD = v.unflatten(-1, (c.num_kv_heads, c.head_dim))
        if c.qk_norm:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return q_BTHD, k_BTKD, v_BTKD

    def finish(self, x_BTE: Tensor, o_BTHD: Tensor) -> Tensor:
        """The block's output [B,T,E] from its input x and the attention output of every query head."""
        return self.add_mlp(self.add_attention(x_BTE, o_BTHD))

    def add_attention(self, x_BTE: Tensor, o_BTHD: Tensor) -> Tensor:
        """The residual stream [B,T,E] after attention."""
        y_BTE = self.ranks.sum(linear(o_BTHD.flatten(-2), self.o_proj.weight, self.o_proj.bias))
        return x_BTE + (self.post_attention_layernorm(y_BTE) if self.config.post_norms else y_BTE)

    def add_mlp(self, x_BTE: Tensor) -> Tensor:
        """The residual stream [B,T,E] after the MLP."""
        if self.config.post_norms:
            return x_BTE + self.post_feedforward_layernorm(self._mlp(self.pre_feedforward_layernorm(x_BTE)))
        return x_BTE + self._mlp(self.post_attention_layernorm(x_BTE))

    def _mlp(self, x_BTE: Tensor) -> Tensor:
        if self.fused:
            gate, up = linear(x_BTE, self.gate_up_proj.weight, self.gate_up_proj.bias).chunk(2, dim=-1)
        else:
            gate, up = (linear(x_BTE, p.weight, p.bias) for p in (self.gate_proj, self.up_proj))
        y_BTE = linear(activate(gate, self.config.activation) * up, self.down_proj.weight, self.down_proj.bias)
        return self.ranks.sum(y_BTE)

    def output_weight(self) -> Tensor:
        """W_O as [E, H, D], a view (of numbers made for it where it is quantised): query head h adds W_O[:, h] @ o_h to the
        layer's output, before any post norm."""
        w_EX = dense(self.o_proj.weight, self.input_layernorm.weight.dtype)
        return w_EX.unflatten(1, (self.config.num_heads, self.config.head_dim))


class Decoder(nn.Module):
    """All weights of a model. `fused` joins q, k, v and gate, up into one matrix each; the function is the same. The matrices may
    be quantised (modeling/quant.py).

    The embedding is left uninitialised: whoever builds a Decoder fills it (torch's own filling, of a matrix on the meta device,
    loads the whole compiler).

    Args:
        config: of one rank: its heads, and its part of the MLP's width; the vocabulary is the whole one's.
        ranks: that share the model.
    """

    def __init__(self, config: ModelConfig, fused: bool = True, ranks: Ranks = ALONE):
        super().__init__()
        self.config, self.ranks = config, ranks
        vocabulary = ranks.part(config.vocab_size)
        self._first_id, rows = vocabulary.start, vocabulary.stop - vocabulary.start
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(rows, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, index, fused, ranks) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.rotaries = nn.ModuleList(Rotary(rope) for rope in config.ropes)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, rows, bias=False)

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return cast(list[Block], list(self.layers))

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, which norms and biases are held in however the matrices are."""
        return self.norm.weight.dtype

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Residual stream [B,T,E] of token ids [B,T], in the model's dtype."""
        x_BTE = self._looked_up(ids_BT)
        if self.config.embed_scale == 1.0:
            return x_BTE
        # Gemma was trained with the factor itself rounded to the dtype (sqrt(3072) = 55.5 in bfloat16).
        return x_BTE * rounded(self.config.embed_scale, x_BTE.dtype)

    def _looked_up(self, ids_BT: Tensor) -> Tensor:
        """Rows of the embedding. A rank that lacks one adds zeros, which change no bit."""
        if self.ranks.size == 1:
            return lookup(self.embed_tokens.weight, ids_BT, self.dtype)
        row_BT, rows = ids_BT - self._first_id, self.embed_tokens.weight.shape[0]
        x_BTE = self.embed_tokens(row_BT.clamp(0, rows - 1))
        return self.ranks.sum(x_BTE.masked_fill(((row_BT < 0) | (row_BT >= rows))[..., None], 0))

    def embedding_of(self, token: int) -> Tensor:
        """[1, E], the token's row of the embedding, or what its codes stand for; [0, E] where another rank has it."""
        row, weight = token - self._first_id, cast(Weight, self.embed_tokens.weight)
        if isinstance(weight, Quantised):
            return weight.take(torch.tensor([row], device=self.device), self.dtype)
        return weight[max(0, row) : max(0, row + 1)]

    def rotary(self, pos_BT: Tensor, length_B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(cos, sin), each [B,T,D] in the model's dtype, one pair per config.ropes; block.rope indexes them.

        pos_BT: original positions, padding below 0 counts as 0. length_B: tokens known so far in each row, this step's
        included (prompt length in prefill, position + 1 in decoding); only "dynamic" ropes depend on it.
        """
        return [rotary(pos_BT, length_B, self.dtype) for rotary in self.rotaries]

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., V] float32 of the residual stream [..., E]: final norm, output matrix, softcap."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return softcap(self._whole(linear(self.norm(x), weight)).float(), self.config.final_softcap)

    def _whole(self, part: Tensor) -> Tensor:
        """Logits [..., V] of this rank's part, which only in the last one may be narrower than in the others."""
        if self.ranks.size == 1:
            return part
        vocabulary = self.config.vocab_size
        part = F.pad(part, (0, self.ranks.each(vocabulary) - part.shape[-1]))
        return self.ranks.gather(part, -1)[..., :vocabulary]
