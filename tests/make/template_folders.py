"""Folders with a tokenizer and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

from restkv.cli.options import RECALL

HELLO = [{"role": "user", "content": "Hello"}]


TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def folder_with(place: Path, files: dict[str, str | bytes], **config: object) -> Path:
    """recall-mini's tokenizer with other entries in tokenizer_config.json, and other files beside it."""
    (place / "tokenizer.json").write_bytes((RECALL / "tokenizer.json").read_bytes())
    (place / "tokenizer_config.json").write_text(json.dumps(TOKENS | config))
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place
