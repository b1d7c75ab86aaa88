"""Record what the KVzip press of NVIDIA kvpress scores and keeps on small random models (tests/make/zipped.py).

    PYTHONPATH=tests bench/speed/peers/.venv/bin/python tests/data/kvzip/record_kvzip.py tests/data/kvzip/kvzip.safetensors

The press asks for a replay in words; here these are token ids that are handed to both sides. Tensors of a case, by its number:
score_NKL, its scores, plus_NKL, those with kvzip_plus_normalization, and kept_NKL, what half of all entries is.

Letters: N layers, K KV heads, L prompt length.
"""

import dataclasses
import json
import sys
from importlib.metadata import version
from unittest.mock import Mock, patch

import torch
from kvpress.presses import kvzip_press
from safetensors.torch import save_file
from transformers import DynamicCache

from make.zipped import CASES, FIRST, LATER, SUFFIX, Case, llama


class Requests:
    """The tokenizer that the press asks for."""

    chat_template = None

    def encode(self, text: str, **_: object) -> torch.Tensor:
        ids = {"": [], "\n": SUFFIX}.get(text, FIRST if text.endswith("exactly.") else LATER)
        return torch.tensor([ids], dtype=torch.long)


@torch.no_grad()
def record(case: Case, plus: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model, seen = llama(case), {}
    press = kvzip_press.KVzipPress(
        (case.length - case.length // 2) / case.length, kvzip_plus_normalization=plus, chunk_size=case.piece
    )
    choose = press.compress_post

    def spy(model: torch.nn.Module) -> None:
        seen["score"] = press.score_val[:, 0].clone()
        choose(model)

    press.compress_post = spy
    with patch.object(kvzip_press, "AutoTokenizer", Mock(from_pretrained=lambda _: Requests())), press(model):
        model.model(input_ids=torch.tensor([case.ids]), past_key_values=DynamicCache())
    kept_NKL = torch.ones_like(seen["score"], dtype=torch.uint8)
    for index, layer in enumerate(model.model.layers):
        _, head, position = layer.self_attn.masked_key_indices
        kept_NKL[index, head.long(), position.long()] = 0
    return seen["score"], kept_NKL


def main() -> None:
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    for case in CASES:
        score, kept = record(case, plus=False)
        plus, _ = record(case, plus=True)
        tensors |= {f"{case.seed}.score_NKL": score, f"{case.seed}.kept_NKL": kept, f"{case.seed}.plus_NKL": plus}
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    about = {"cases": [dataclasses.asdict(case) for case in CASES], "versions": versions}
    save_file(tensors, sys.argv[1], {"about": json.dumps(about)})


if __name__ == "__main__":
    main()
