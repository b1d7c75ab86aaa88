"""What of a checkpoint is whose, where ranks share a model: sizes of one rank's Decoder, and its cut of every tensor."""

from __future__ import annotations

from dataclasses import replace

from modeling.checkpoint.tensor_file import Cut
from modeling.config import ModelConfig
from modeling.errors import ParallelError
from modeling.ranks import Ranks

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")  # cut by output
COLUMNS = ("o_proj", "down_proj")  # cut by input: the products are summed, and their bias is to be added once


def share_of(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The sizes of one rank's Decoder: its KV heads with their query heads, and its part of the MLP's width.

    Raises:
        ParallelError: the KV heads do not divide evenly, or a rank would have no part of the MLP or of the vocabulary.
    """
    if ranks.size == 1:
        return config
    if config.num_kv_heads % ranks.size:
        divisors = [str(n) for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == 0]
        raise ParallelError(
            f"parallel 'tensor': {config.num_kv_heads} KV heads do not divide among {ranks.size} ranks; start "
            f"{' or '.join(divisors)} of them"
        )
    for name, count in (("intermediate_size", config.intermediate_size), ("vocab_size", config.vocab_size)):
        if (ranks.size - 1) * ranks.each(count) >= count:
            raise ParallelError(
                f"parallel 'tensor': {name} {count} leaves nothing for the last of {ranks.size} ranks; start fewer"
            )
    width = ranks.part(config.intermediate_size)
    return replace(
        config,
        num_heads=config.num_heads // ranks.size,
        num_kv_heads=config.num_kv_heads // ranks.size,
        intermediate_size=width.stop - width.start,
    )


def cut_of(name: str, shape: tuple[int, ...], ranks: Ranks) -> Cut | None:
    """What a rank reads of a tensor, by Hugging Face's name and its whole shape; None: nothing, its place holds zeros."""
    module, leaf = name.split(".")[-2:]
    if module in ROWS:
        return Cut(0, ranks.part(shape[0]))
    if module in COLUMNS and leaf == "weight":
        return Cut(1, ranks.part(shape[1]))
    return None if module in COLUMNS and ranks.rank > 0 else Cut(0, slice(0, shape[0]))
