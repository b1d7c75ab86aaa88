"""Fixtures of the tests of text: a chat template, rendered."""

from __future__ import annotations

from typing import Any

import pytest

from make.template_folders import HELLO, folder_with
from modeling.text.tokenizer import Tokenizer


@pytest.fixture
def rendered(tmp_path):
    """rendered(template, messages, **variables): what Tokenizer.render gives for a folder with this template."""

    def call(template: str, messages: list = HELLO, **variables: Any) -> str:
        return Tokenizer.from_folder(folder_with(tmp_path, {}, chat_template=template)).render(messages, **variables)

    return call
