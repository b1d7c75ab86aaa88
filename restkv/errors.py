"""Every error a user can cause, in one place: one line that names the value, its place and the mend."""

from modeling.errors import (
    CheckpointError,
    CompileError,
    ConfigError,
    NumericError,
    ParallelError,
    RestKVError,
    RestKVWarning,
    TokenizerError,
    TooLargeError,
    TooManyShapes,
)

__all__ = [
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "NumericError",
    "OutputError",
    "ParallelError",
    "PolicyError",
    "PromptError",
    "RestKVError",
    "RestKVWarning",
    "TokenizerError",
    "TooLargeError",
    "TooManyShapes",
]


class PolicyError(RestKVError):
    """A policy's name or one of its options makes no sense."""


class PromptError(RestKVError):
    """A prompt that cannot be run: empty, or with token ids the model does not have."""


class OutputError(RestKVError):
    """A place that cannot be written to."""
