"""A small checkpoint that two and four ranks can share, and what one of them does with its part; alone, with the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from laws.kept import engine_kept
from modeling.checkpoint.loading import load_model, tensor_slots
from modeling.families.registry import read_config
from modeling.layers import Decoder
from modeling.ranks import Ranks
from restkv.errors import NumericError, RestKVError
from restkv.lm import LM
from restkv.meter import Meter
from restkv.observe import Observation
from restkv.policies import Policy, get_policy
from restkv.session import Session
from twins.stepwise import Kept

SIZES = {
    "model_type": "qwen2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "use_sliding_window": True,
    "sliding_window": 24,
    "max_window_layers": 1,
    "tie_word_embeddings": False,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}


def save_shared(folder: Path, **changes: Any) -> None:
    """Random weights: 4 KV heads of two query heads each, two layers, of which the second slides."""
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    torch.manual_seed(0)  # biases begin as random numbers
    model = Decoder(read_config(folder)).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4, generator=random))
        else:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5, generator=random)
    weights = {name: slot.clone().contiguous() for name, slot in tensor_slots(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lm_of(ranks: Ranks, folder: Path, backend: str = "sdpa", **options: Any) -> LM:
    return LM(load_model(folder, ranks=ranks, **options), None, backend)


def shards(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """A rank's tensors by name."""
    return {name: slot.clone() for name, slot in tensor_slots(load_model(folder, ranks=ranks)).items()}


def logits(ranks: Ranks, folders: Sequence[Path], ids: Sequence[int], prompt: int) -> list[tuple[Tensor, Tensor]]:
    """Of every checkpoint: logits at every position of `ids`, and those of decoding what follows the first `prompt` of them."""
    found = []
    for folder in folders:
        lm = lm_of(ranks, folder)
        session = Session(lm.engine, policy_of(("full", {})), [prompt], len(ids))
        session.prefill([ids[:prompt]])
        decoded = [session.logits_BV]
        for token in ids[prompt:]:
            session.feed(torch.tensor([token]))
            decoded.append(session.logits_BV)
        found.append((lm.logits(ids), torch.cat(decoded)))
    return found


Described = tuple[str, Mapping[str, Any]]
"""A method and its options."""


def policy_of(described: Described) -> Policy:
    name, options = described
    return get_policy(name, **options)


class Run(dict[str, Any]):
    """What a session came to: tokens, and the kept sets after the prompt and at the end."""


def runs(
    ranks: Ranks, folder: Path, policies: Sequence[Described], prompts: Sequence[Sequence[int]], new: int
) -> list[Run]:
    """Greedy answers of every policy."""
    lm = lm_of(ranks, folder)
    return [run(lm, policy_of(described), prompts, new) for described in policies]


def run(lm: LM, policy: Policy, prompts: Sequence[Sequence[int]], new: int, prefill: str = "dense") -> Run:
    session = Session(lm.engine, policy, [len(ids) for ids in prompts], new, prefill=prefill, chunk=16)
    session.prefill(prompts)
    first = kept(session)
    tokens = []
    for _ in range(new):
        ids_B = session.logits_BV.argmax(-1)
        tokens.append(ids_B.tolist())
        session.feed(ids_B)
    return Run(tokens=tokens, first=first, last=kept(session), evictions=session.evictor.evictions)


def compiled_runs(
    ranks: Ranks, folder: Path, policies: Sequence[Described], prompts: Sequence[Sequence[int]], new: int
) -> list[tuple[Run, tuple[int, int]]]:
    """The same with the backend flex, and how many graphs a first run has made, and a second one."""
    lm = lm_of(ranks, folder, "flex")
    found = []
    for described in policies:
        meter = Meter(lm.device)
        one = run(lm, policy_of(described), prompts, new)
        first = meter.graphs()
        run(lm, policy_of(described), prompts, new)
        found.append((one, (first, meter.graphs() - first)))
    return found


def kept(session: Session) -> list[Kept]:
    return [engine_kept(session, row) for row in range(len(session.active))]


def together(parts: Sequence[list[Kept]]) -> list[Kept]:
    """The kept sets of all heads, of those of every rank's."""
    return [
        [[line for heads in layers for line in heads] for layers in zip(*rows, strict=True)]
        for rows in zip(*parts, strict=True)
    ]


def answers(ranks: Ranks, folder: Path, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> dict[str, Any]:
    """LM.generate's tokens and stats, and what a compressed context says to a question."""
    lm = lm_of(ranks, folder)
    policy = policy_of(("restkv", {"budget": 15, "window": 4, "interval": 8}))
    made = lm.generate([list(ids) for ids in prompts], policy, max_new_tokens=14, **options)
    asked = lm.compress(list(prompts[0]), policy).ask([3, 4, 5], max_new_tokens=4, **options)
    stats = made[0].stats
    return {"tokens": [one.tokens for one in made], "asked": asked.tokens, "stats": stats, "imbalance": stats.imbalance}


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """What crosses meanwhile: ("sum" or "gather", bytes of the tensor that comes of it)."""
    crossed: list[tuple[str, int]] = []
    add, gather = Ranks.sum, Ranks.gather

    def counted_sum(self: Ranks, x: Tensor) -> Tensor:
        crossed.append(("sum", x.nbytes))
        return add(self, x)

    def counted_gather(self: Ranks, x: Tensor, dim: int) -> Tensor:
        crossed.append(("gather", x.nbytes * self.size))
        return gather(self, x, dim)

    with patch.object(Ranks, "sum", counted_sum), patch.object(Ranks, "gather", counted_gather):
        yield crossed


def crossed(
    ranks: Ranks, folder: Path, policies: Sequence[Described], ids: Sequence[int]
) -> list[list[list[tuple[str, int]]]]:
    """Of every policy, whose interval has two tokens: what crosses for a prompt, a token, and a token with an eviction."""
    lm, found = lm_of(ranks, folder), []
    for described in policies:
        session = Session(lm.engine, policy_of(described), [len(ids)], 2)
        steps = []
        for step in range(3):
            with counting() as one:
                session.feed(torch.tensor([step])) if step else session.prefill([ids])
            steps.append(one)
        found.append(steps)
    return found


@dataclass(frozen=True)
class Newest(Policy):
    """A policy of somebody who has not thought of ranks."""

    name: ClassVar[str] = "newest"

    def importance(self, obs: Observation) -> Tensor:
        return obs.pos.to(obs.dtype)


def chunked(
    ranks: Ranks, folder: Path, policies: Sequence[Described], prompts: Sequence[Sequence[int]], new: int
) -> list[Run]:
    """`runs` of prompts that are read in chunks of 16 tokens, and evicted between them."""
    lm = lm_of(ranks, folder)
    return [run(lm, policy_of(described), prompts, new, "chunked") for described in policies]


def narrow(ranks: Ranks, folder: Path, ids: Sequence[int]) -> Tensor:
    """Logits in bfloat16."""
    return lm_of(ranks, folder, dtype=torch.bfloat16).logits(ids)


def broken(ranks: Ranks, folder: Path, ids: Sequence[int]) -> list[str]:
    """What is said of weights that are no numbers, each in what one rank alone has."""
    lm, lines = lm_of(ranks, folder), []
    # The last of two ranks has these places of its part, the first one of the other's.
    last = ranks.rank == ranks.size - 1
    for weight, mine in (
        (lm.model.blocks[1].down_proj.weight[0, -1:], last),
        (lm.model.blocks[0].o_proj.weight[0, :1], ranks.rank == 0),
        (lm.model.embedding_of(ids[1]).flatten()[:1], True),
        (lm.model.norm.weight[:1], True),
    ):
        before = weight.clone()
        if mine:
            weight.fill_(torch.nan)
        try:
            lm.generate(list(ids), policy_of(("full", {})), max_new_tokens=2)
        except NumericError as error:
            lines.append(str(error))
        weight.copy_(before)
    return lines


def refused(ranks: Ranks, folder: Path) -> list[str]:
    """The lines of what cannot be done where ranks share a model."""
    lm = lm_of(ranks, folder)

    def generate() -> None:
        lm.generate([1, 2, 3], Newest(budget=8, window=4))

    def save() -> None:
        lm.compress([1, 2, 3], policy_of(("snapkv", {"budget": 8, "window": 4}))).save(folder / "context")

    def divide() -> None:
        lm_of(Ranks(0, 3), folder)

    lines = []
    for attempt in (generate, save, divide):
        try:
            attempt()
        except RestKVError as error:
            lines.append(str(error))
    return lines
