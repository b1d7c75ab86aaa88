"""Small random Llamas that are the same wherever they are made, and requests as fixed token ids: what KVzip is recorded and
tested with (tests/data/kvzip/record_kvzip.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, VOCAB = 32, 64
FIRST, LATER, SUFFIX = [11, 12, 13], [21, 22], [31]  # "repeat", "repeat, starting with", and what ends a request


@dataclass(frozen=True)
class Case:
    """A model, a prompt, and the tokens of a piece of its replay."""

    seed: int
    kv_heads: int
    group: int
    length: int
    piece: int
    layers: int = 3

    @property
    def ids(self) -> list[int]:
        return torch.randint(VOCAB, (self.length,), generator=torch.Generator().manual_seed(self.seed)).tolist()


CASES = [
    Case(0, 2, 2, 40, 2048),
    Case(1, 1, 4, 60, 60),
    Case(2, 2, 2, 60, 20),
    Case(3, 4, 1, 64, 16),
    Case(4, 2, 2, 41, 20),  # a last piece of one token
    Case(5, 2, 1, 47, 9),
]


def llama(case: Case) -> LlamaForCausalLM:
    """A float32 Llama whose attention is neither flat nor one-hot."""
    heads = case.kv_heads * case.group
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=case.kv_heads,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation("sdpa")
    random = torch.Generator().manual_seed(case.seed)
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape, generator=random) * (2 / HIDDEN) ** 0.5)
    return model
