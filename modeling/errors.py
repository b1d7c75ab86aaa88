"""What can go wrong with a checkpoint, said in one line: the value, its place, and the mend."""

from modeling.shown import one_line


class RestKVError(ValueError):
    """Base of every error a user can cause. `str()` of it is one line, fit for stderr: values are shown, not obeyed."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(RestKVError):
    """config.json says something this library does not know or cannot compute."""


class CheckpointError(RestKVError):
    """The weights of a folder are missing, broken, or do not fit its config.json."""


class TokenizerError(RestKVError):
    """The tokenizer files of a folder are missing or broken, or a chat template fails."""


class NumericError(RestKVError):
    """A model's logits are no numbers, so that nothing can be drawn from them."""


class ParallelError(RestKVError):
    """A model that cannot be shared as asked for, or another of the processes that share it has gone."""


class TooLargeError(RestKVError):
    """There is not enough memory for what was asked for; the line names the numbers to lower."""


class CompileError(RestKVError):
    """This machine cannot compile what was to be compiled."""


class TooManyShapes(CompileError):
    """torch.compile has compiled as many shapes of a function as it allows, and takes no other."""


class RestKVWarning(UserWarning):
    """A remark that stops nothing: the run goes on, and the reader should know why it may differ from hopes.

    `str()` of it is one line, as of an error.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())
