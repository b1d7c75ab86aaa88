"""What a probe costs a prompt, before there is one: tokens read besides, steps, and bytes that are alive at once.

Letters: L tokens of the prompt, E hidden width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modeling.config import ModelConfig
from restkv.phrases import Phrases
from restkv.probes import parse_probe


@dataclass(frozen=True)
class Cost:
    """What is read after a prompt of some length.

    Attributes:
        read: tokens of texts, in one pass beside the prompt's own.
        drafted: tokens that the model goes on with and what is read between them, at most, of all texts.
        steps: passes of one token of every text that these take.
        observed: queries of the prompt's own.
        answered: those of `read` whose texts are gone on with.
    """

    length: int
    read: int = 0
    drafted: int = 0
    steps: int = 0
    observed: int = 0
    answered: int = 0

    def alive(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that are alive at once at most, besides the weights, what has been kept of earlier layers and a layer's temporary
        memory: hidden states, and keys and values of one layer, or of all layers where something is drafted.
        """
        pair = 2 * config.num_kv_heads * config.head_dim
        query, layers = config.num_heads * config.head_dim, config.num_layers if self.steps else 1
        plain = self.read - self.answered
        hidden = config.hidden_size * (self.length + plain)
        texts = (pair + query) * (plain + layers * (self.answered + self.drafted))
        return dtype.itemsize * (hidden + pair * self.length * layers + query * self.observed * layers + texts)


def cost_of(probe: str, length: int, phrases: Phrases) -> Cost:
    """What a probe costs a prompt of `length` tokens.

    Raises:
        PolicyError: there is no such probe, or it cannot ask this model.
    """
    read = drafted = steps = observed = answered = 0
    for one in parse_probe(probe):
        tokens = one.tokens(length, phrases)
        # What is drafted does not depend on the prompt's length.
        drafting = [side for side in one.sides(range(1), phrases) if side.drafts]
        plans = [sum(part.most + len(part.then) for part in side.drafts) for side in drafting]
        read, drafted, steps = read + tokens, drafted + sum(plans), max([steps, *plans])
        observed = max(observed, len(one.own(length)))
        answered += tokens if drafting else 0
    return Cost(length, read, drafted, steps, observed, answered)
