"""Trains the checkpoint that ships in restkv/assets/tiny on the stories of bench/stories.py.

    python -m bench.train_tiny                  # about ten minutes in one thread; overwrites restkv/assets/tiny
    python -m bench.train_tiny --recall         # measure the model in restkv/assets/tiny
    python -m bench.train_tiny --story 7        # print story number 7 and stop

The folder's config.json has the architecture; docs/tiny.md says what came out.

Letters: B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from bench.stories import story, text_of
from modeling.families import read_config
from modeling.layers import Decoder
from modeling.loading import load_model, tensor_slots

FOLDER = Path(__file__).parent.parent / "restkv" / "assets" / "tiny"
BOS, EOS = "<s>", "</s>"
# (tokens per sequence, steps, share of filler sentences): dense facts in short texts first, until copying works.
SCHEDULE = ((128, 160, 0.2), (128, 150, 0.7), (256, 120, 0.8), (512, 90, 0.85), (1024, 50, 0.9))
TOKENS_PER_STEP = 4096
HELD_OUT = 1_000_003  # added to the seed for stories that measure
ANSWER_WEIGHT = 5.0  # of the loss at a value that the story has told before


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE that knows the stories' words whole and can still spell any other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text_of(seed, 0.5) for seed in range(4000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


class Stories:
    """Endless stories in rows of one length."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.rng = random.Random(seed)
        self.encode = lru_cache(1 << 17)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
        (self.bos,), (self.eos,) = self.encode(BOS), self.encode(EOS)

    def batch(self, rows: int, length: int, filler: float) -> tuple[Tensor, Tensor]:
        """ids [B, T+1] int64, and rivals [B, T+1] int64: of a told value that is repeated (see stories.Piece), else -1."""
        ids, rivals = [], []
        for _ in range(rows):
            row: list[tuple[int, int]] = []
            while len(row) <= length:
                row.append((self.bos, -1))
                sentences = length // 6 if self.rng.random() < 0.6 else self.rng.randint(8, length // 8)
                for text, rival in story(self.rng, sentences, filler):
                    row += [(token, -1 if rival is None else rival) for token in self.encode(text)]
                row.append((self.eos, -1))
            ids.append([token for token, _ in row[: length + 1]])
            rivals.append([rival for _, rival in row[: length + 1]])
        return torch.tensor(ids), torch.tensor(rivals)


def logits(model: Decoder, ids_BT: Tensor) -> Tensor:
    """Causal logits [B, T, V] float32, without any cache."""
    pos_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    ropes = model.rotary(pos_BT, pos_BT[:, -1] + 1)
    x_BTE = model.embed(ids_BT)
    for block in model.blocks:
        q, k, v = (t.transpose(1, 2) for t in block.project(x_BTE, *ropes[block.rope]))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=model.config.attn_scale, enable_gqa=True)
        x_BTE = block.finish(x_BTE, o.transpose(1, 2))
    return model.head(x_BTE)


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


def train(model: Decoder, stories: Stories, scale: float) -> None:
    """Muon for the matrices, AdamW for embedding and norms; 20 steps of warm-up, linear decay over the last 40 %."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    plan = [(length, filler) for length, steps, filler in SCHEDULE for _ in range(round(steps * scale))]
    began = time.perf_counter()
    for step, (length, filler) in enumerate(plan, 1):
        ids, rivals = stories.batch(TOKENS_PER_STEP // length, length, filler)
        weight = 1 + (ANSWER_WEIGHT - 1) * (rivals[:, 1:] >= 0)
        loss_BT = F.cross_entropy(logits(model, ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (loss_BT * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace = min(1.0, step / 20, (1 - step / len(plan)) / 0.4)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * pace
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0 or step == len(plan):
            print(
                f"{time.perf_counter() - began:5.0f} s  step {step}  length {length}  loss {loss.item():.3f}",
                flush=True,
            )


@torch.no_grad()
def recall(model: Decoder, stories: Stories) -> None:
    """Print how often a value is repeated rightly in held-out stories, by its rivals and by the tokens read before."""
    hits: dict[tuple[int, int], list[bool]] = defaultdict(list)
    for _ in range(60):
        ids, rivals = stories.batch(8, 1024, 0.9)
        right = logits(model, ids[:, :-1]).argmax(-1) == ids[:, 1:]
        first = (ids == stories.eos).cumsum(-1) == 0  # a prompt is one story, not the second of a row
        for row, place in ((rivals[:, 1:] >= 0) & first[:, 1:]).nonzero().tolist():
            edge = next(edge for edge in (128, 256, 512, 1024) if place < edge)
            hits[min(int(rivals[row, place + 1]), 3), edge].append(bool(right[row, place]))
    for (rival, edge), found in sorted(hits.items()):
        print(f"{rival}{'+' * (rival == 3)} rivals, below {edge} tokens: {sum(found) / len(found):.3f} of {len(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="has config.json; gets weights and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--story", type=int, help="print this story and stop")
    parser.add_argument("--recall", action="store_true", help="measure the folder's model instead of training one")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps, for a quick try")
    args = parser.parse_args()
    if args.story is not None:
        print(text_of(args.story, 0.8))
        return
    torch.set_num_threads(1)
    if args.recall:
        recall(
            load_model(args.folder),
            Stories(Tokenizer.from_file(str(args.folder / "tokenizer.json")), args.seed + HELD_OUT),
        )
        return
    torch.manual_seed(args.seed)
    config = read_config(args.folder)
    tokenizer = make_tokenizer(config.vocab_size)
    assert tokenizer.get_vocab_size() == config.vocab_size, tokenizer.get_vocab_size()
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else 0.7 * parameter.shape[1] ** -0.5)
    train(model, Stories(tokenizer, args.seed), args.scale)

    # bfloat16 halves the file; config.json's dtype lets every reader compute in float32.
    weights = {name: slot.to(torch.bfloat16).contiguous() for name, slot in tensor_slots(model).items()}
    save_file(weights, args.folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(args.folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (args.folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    recall(load_model(args.folder), Stories(tokenizer, args.seed + HELD_OUT))


if __name__ == "__main__":
    main()
