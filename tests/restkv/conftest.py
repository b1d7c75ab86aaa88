"""Fixtures of the tests of restkv: a checkpoint with a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import restkv
from make.chats import TEMPLATES
from restkv.lm import LM


@pytest.fixture(scope="module")
def templated(rambler, tmp_path_factory):
    """templated(name): the same checkpoint with a chat template."""
    made = {}

    def get(name: str) -> LM:
        if name not in made:
            folder = Path(shutil.copytree(rambler, tmp_path_factory.mktemp("templated") / name))
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            template = TEMPLATES.get(name, name)
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
            made[name] = restkv.load(folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def lm(rambler) -> LM:
    return restkv.load(rambler)
