"""Trains recall-mini, the checkpoint that ships in restkv/assets/recall-mini, to answer the questions of bench/quality/tasks.py.

    python -m bench.recall_mini.train                # from nothing; overwrites the folder's weights and tokenizer
    python -m bench.recall_mini.train --begin 7      # go on with the seventh stage, from the folder's weights
    python -m bench.recall_mini.train --show 7       # print lesson number 7 of each kind and stop

The folder's config.json has the architecture; docs/recall-mini.md says what it took and what came out. Held-out accuracy is
measured by `restkv bench ruler`, like any other checkpoint's.

Letters: B batch rows, T tokens, E hidden width, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from tokenizers import Tokenizer
from torch import Tensor

from bench.recall_mini.lessons import ASKS, BOS, COUNTED, EOS, Lessons, make_tokenizer, show
from modeling.checkpoint.loading import tensor_slots
from modeling.families.registry import read_config
from modeling.layers import Decoder
from restkv.files import replaced, write_text

FOLDER = Path(__file__).parents[2] / "restkv" / "assets" / "recall-mini"
LM_WEIGHT = 0.1
STRETCHED, MOST_GAPS = 0.5, 8  # share of lessons whose positions have gaps, and how many at most


def stretched(ids_BT: Tensor, stop: int, reach: int, rng: random.Random) -> Tensor:
    """Positions [B, T] with gaps: a short lesson as it would stand in a text of up to `reach` tokens, most of them left out.

    Distances of thousands of tokens then cost no more to learn than those of hundreds; what lies between them comes later.
    Gaps are between sentences (`stop` is the token that ends one): what is said in one sentence stays side by side.
    """
    rows, length = ids_BT.shape
    pos_BT = torch.arange(length).repeat(rows, 1)
    for ids_T, pos_T in zip(ids_BT, pos_BT, strict=True):
        starts = ((ids_T[:-1] == stop).nonzero()[:, 0] + 1).tolist()
        if reach > length and starts and rng.random() < STRETCHED:
            gaps = [rng.random() for _ in range(rng.randint(1, MOST_GAPS))]
            room = rng.uniform(0, reach - length) / sum(gaps)
            for gap in gaps:
                pos_T[rng.choice(starts) :] += int(gap * room)
    return pos_BT


def hidden(model: Decoder, ids_BT: Tensor, pos_BT: Tensor) -> Tensor:
    """The residual stream [B, T, E] after the last layer, causal, without any cache."""
    ropes = model.rotary(pos_BT, pos_BT[:, -1] + 1)
    x_BTE = model.embed(ids_BT)
    for block in model.blocks:
        q, k, v = (t.transpose(1, 2) for t in block.project(x_BTE, *ropes[block.rope]))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=model.config.attn_scale, enable_gqa=True)
        x_BTE = block.finish(x_BTE, o.transpose(1, 2))
    return x_BTE


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), in float32.

    torch.optim.Muon iterates in bfloat16, which takes longer than the whole training step on a CPU without bfloat16 units.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(mean, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                update = update.T if tall else update
                update = update / (update.norm() + 1e-7)
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update + (2.0315 * gram @ gram - 4.7750 * gram) @ update
                update = update.T if tall else update
                matrix.add_(update, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def initialise(model: Decoder) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else 0.7 * parameter.shape[1] ** -0.5)


@dataclass(frozen=True)
class Stage:
    """Lessons of some lengths until the answers are right, or for a number of steps.

    Attributes:
        lengths: of the lessons, one drawn for each step.
        mix: weights of KINDS.
        filler: share of lessons with prose between the facts.
        pace: of learning, 1 = full.
        enough: share of right answers (running mean, of the worst of all ASKS but COUNTED) at which the next stage begins.
        steps: at most so many.
        reach: positions up to which STRETCHED of the lessons are stretched, 0 for none.
        falls: whether the pace falls to nothing in the stage (docs/recall-mini.md compares).
    """

    lengths: tuple[int, ...]
    mix: Mapping[str, float]
    filler: float
    pace: float
    enough: float
    steps: int
    reach: int = 0
    falls: bool = True


FACTS = {"codes": 0.68, "boxes": 0.27, "counts": 0.05}
LOOKED_UP = {"codes": 0.7, "boxes": 0.27, "counts": 0.03}
STAGES = (
    # Random sequences that repeat make the heads that copy. Without them answers were still guesses after ten times the steps.
    Stage((64,), {"repeats": 1.0}, 0.0, 1.0, 0.9, 1500, falls=False),
    # All kinds of questions at once: after single codes alone it was luck whether the several codes of one thing were learnt.
    Stage((128,), {"repeats": 0.3, "codes": 0.5, "boxes": 0.2}, 0.3, 1.0, 0.9, 800),
    Stage((128, 256), {"repeats": 0.1, "codes": 0.6, "boxes": 0.25, "counts": 0.05}, 0.7, 1.0, 0.9, 500, reach=512),
    Stage((256, 512), FACTS, 0.9, 0.8, 0.93, 400, reach=2048),
    Stage((512, 1024), FACTS, 0.9, 0.7, 0.95, 400, reach=4096),
    Stage((1024, 2048), FACTS, 0.9, 0.6, 0.95, 400, reach=8192),
    Stage((1024, 2048, 4096), FACTS, 0.9, 0.5, 0.95, 300, reach=8192),
    # One lesson of 8,192 tokens is a whole step, and takes as long as five of 1,024.
    Stage((1024, 2048, 4096, 8192), FACTS, 0.9, 0.5, 2.0, 250, reach=8192),
    Stage((2048, 4096, 8192, 8192), LOOKED_UP, 0.9, 0.4, 2.0, 180, reach=8192),
)
LEAST = 40  # steps in a stage, for the running mean to mean something


class Marks:
    """Running share of right answers, one for each of ASKS. An answer is right if every token of it is."""

    def __init__(self) -> None:
        self.right: dict[str, float] = {}

    def add(self, hit_N: Tensor, answer_N: Tensor, ask_N: Tensor, row_N: Tensor) -> None:
        """hit: whether the token was the likeliest; answer, ask: see Lessons.batch; row: of the batch."""
        key_N = row_N * (int(answer_N.max()) + 1) + answer_N
        _, which_N = key_N.unique(return_inverse=True)
        hits = torch.ones(int(which_N.max()) + 1).scatter_reduce(0, which_N, hit_N.float(), "amin")
        asks = torch.zeros(len(hits), dtype=torch.long).scatter(0, which_N, ask_N)
        for index in asks.unique().tolist():
            mean = hits[asks == index].mean().item()
            if ASKS[index] == "repeats":  # one long answer: its tokens are what is counted
                mean = hit_N[ask_N == index].float().mean().item()
            self.right[ASKS[index]] = 0.95 * self.right.get(ASKS[index], mean) + 0.05 * mean

    @property
    def worst(self) -> float:
        """Of what is looked up rather than counted."""
        return min(right for ask, right in self.right.items() if ask not in COUNTED)

    def __str__(self) -> str:
        return ", ".join(f"{ask} {right:.3f}" for ask, right in self.right.items())


def losses(
    model: Decoder, ids: Tensor, answer: Tensor, ask: Tensor, pos: Tensor, marks: Marks
) -> tuple[Tensor, Tensor]:
    """Mean loss (nats) of the answers' tokens, and of a tenth of the others."""
    x_BTE = hidden(model, ids[:, :-1], pos)
    next_BT, answer_BT = ids[:, 1:], answer[:, 1:]
    wanted = answer_BT >= 0
    logits_NV = model.head(x_BTE[wanted])
    marks.add(logits_NV.argmax(-1) == next_BT[wanted], answer_BT[wanted], ask[:, 1:][wanted], wanted.nonzero()[:, 0])
    also = ~wanted & (torch.rand(wanted.shape) < 0.1)  # the output matrix is a good part of the work
    return F.cross_entropy(logits_NV, next_BT[wanted]), F.cross_entropy(model.head(x_BTE[also]), next_BT[also])


def train(model: Decoder, lessons: Lessons, stage: Stage, tokens: int) -> None:
    """One stage: Muon for the matrices, AdamW for embedding and norms, 20 steps of warm-up, linear decay if the stage `falls`.

    Every stage has fresh optimizers, so that weights and seed are all there is to go on from.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    began, seen, marks = time.perf_counter(), 0, Marks()
    for step in count(1):
        length = lessons.rng.choice(stage.lengths)
        batch = lessons.batch(max(1, tokens // length), length, stage.mix, stage.filler)
        pos = stretched(batch[0][:, :-1], lessons.stop, stage.reach, lessons.rng)
        answers, rest = losses(model, *batch, pos, marks)
        (answers + LM_WEIGHT * rest).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace = stage.pace * min(1.0, step / 20) * (1 - step / (stage.steps + 1) if stage.falls else 1)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * pace
            optimizer.step()
            optimizer.zero_grad()
        seen += batch[0].numel()
        done = step == stage.steps or (step >= LEAST and marks.worst >= stage.enough)
        if step % 25 == 0 or done:
            print(
                f"{time.perf_counter() - began:5.0f} s  step {step}  {seen / 1e6:.2f}M tokens  length {length}  "
                f"answers {answers.item():.3f}  rest {rest.item():.3f}  right: {marks}",
                flush=True,
            )
        if done:
            return


def save(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """bfloat16 halves the file; config.json's dtype lets every reader compute in float32."""
    weights = {name: slot.to(torch.bfloat16).contiguous() for name, slot in tensor_slots(model).items()}
    with replaced(folder / "model.safetensors") as file:
        file.write(serialize(weights, metadata={"format": "pt"}))
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    write_text(folder / "tokenizer_config.json", json.dumps(special, indent=2) + "\n")


def load(model: Decoder, folder: Path) -> None:
    slots = tensor_slots(model)
    for name, weight in load_file(folder / "model.safetensors").items():
        slots[name].data.copy_(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="has config.json; gets weights and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="per step, or one lesson if that is longer")
    parser.add_argument(
        "--begin", type=int, default=1, help="the stage to begin with; after the first, from the folder's weights"
    )
    parser.add_argument("--show", type=int, metavar="SEED", help="print a lesson of each kind and stop")
    args = parser.parse_args()
    config = read_config(args.folder)
    tokenizer = make_tokenizer(config.vocab_size)
    assert tokenizer.get_vocab_size() == config.vocab_size, tokenizer.get_vocab_size()
    if args.show is not None:
        show(Lessons(tokenizer, args.show))
        return
    # Sharp attention's gradients are full of numbers below 1e-38, for which Intel's processors take 2 to 4 times as long.
    torch.set_flush_denormal(True)  # before the first parallel work: its threads inherit it
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = Decoder(config)
    initialise(model)
    for number, stage in enumerate(STAGES[args.begin - 1 :], args.begin):
        print(f"stage {number} of {len(STAGES)}: {stage}", flush=True)
        if number > 1:  # rounded as they were saved: a run in several sittings is the run in one
            load(model, args.folder)
        seed = args.seed + 1000 * (number - 1)
        torch.manual_seed(seed)
        train(model, Lessons(tokenizer, seed), stage, args.tokens)
        save(model, tokenizer, args.folder)


if __name__ == "__main__":
    main()
