"""A script, run in a process of its own: a GGUF file becomes a Hugging Face folder, weights in bfloat16.

    python bench/speed/peers/convert.py GGUF OUT

It imports nothing of ours, so that nothing of ours imports transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, out: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # it tells of the GGUF file; what is written is not quantised
        del config.quantization_config
    # A fresh model: the one that was read holds itself for quantised, and would say so again when it is saved.
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    for path in out.iterdir():  # safetensors' files are for their owner only, whatever umask says
        path.chmod((out / "config.json").stat().st_mode)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
