"""What the commands have in common: options, and how their texts become values and a policy."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from modeling.text.characters import brief, decoded
from restkv.errors import PolicyError, PromptError, RestKVWarning, TooLargeError
from restkv.files import reason

if TYPE_CHECKING:
    from restkv.lm import LM
    from restkv.policies import Policy

# How long a thread of libgomp spins before it sleeps. A decode step is a hundred short parallel loops, and waking a thread for
# each costs a fifth to a half of them; threads that spin for as long as they do by default slow a busy machine down tenfold.
SPINS = "5000"
RECALL = Path(__file__).parents[1] / "assets" / "recall-mini"
DEEPEST = 50  # lists and objects within each other in a value of the command line
# For methods that need a budget when none is given: restkv.policies has the same number, but imports torch.
DEFAULT_BUDGET = 1024


def parse_budget(text: str) -> int | float | tuple[int, ...]:
    """Entries, entries per layer with commas, or (with a point) a fraction of the prompt.

    >>> parse_budget("64"), parse_budget("96,64,32"), parse_budget("0.05")
    (64, (96, 64, 32), 0.05)
    """
    try:
        if "," in text:
            return tuple(map(int, text.split(",")))
        return float(text) if any(sign in text for sign in ".e") else int(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number of entries, nor one per layer with commas, nor a fraction of the prompt"
        ) from None


# Options by the panel of --help in which they stand.
keep_option = partial(typer.Option, rich_help_panel="What to keep")
sample_option = partial(typer.Option, rich_help_panel="How to sample")
model_option = partial(typer.Option, rich_help_panel="Model")
text_option = partial(typer.Option, rich_help_panel="Prompt and output")

# The most that a command line may count: more than any honest use, and little enough to be computed with.
MOST_TOKENS = (1 << 31) - 1  # positions and entries are int32
MOST_TEXT = 1 << 24  # tokens of a text that is made
MOST_SAMPLES = 1_000_000  # of anything that is repeated
MOST_ROWS = 1 << 16  # of a batch
MOST_DEPTHS = 1001  # of a needle
MOST_THREADS = 1 << 12
FILE_NAME = "file name"  # marks an option that is no text: its bytes are those of a name on the disk
WHAT_STAYS = "What decides which entries stay; see `restkv methods`."

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face checkpoint folder, or org/name[@revision] to download it (extra: hub).",
        show_default="recall-mini, which comes with restkv",
    ),
    FILE_NAME,
]
BudgetOption = Annotated[
    float | None,
    keep_option(
        parser=parse_budget,
        metavar="N|FRACTION",
        help="Entries kept per KV head (N,N,...: by layer), or a fraction of the prompt such as 0.1.",
        show_default=str(DEFAULT_BUDGET),
    ),
]
ContextOption = Annotated[
    int | None, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of context.", show_default="the model's positions")
]
MethodOption = Annotated[str, keep_option(help=WHAT_STAYS)]
UNNAMED = "restkv, preset draft: eight tokens are drafted with the full cache alive; --probe window drafts none"
AnswerMethodOption = Annotated[str | None, keep_option(help=WHAT_STAYS, show_default=UNNAMED)]
PresetOption = Annotated[str | None, keep_option(help="A published setting; other options override it.")]
SetOption = Annotated[
    list[str] | None,
    keep_option("--set", metavar="NAME=VALUE", help="Any other option of the method. May be repeated."),
]
PrefillOption = Annotated[
    str,
    keep_option(
        metavar="dense|chunked|PATTERN",
        help="How the prompt is read. dense: in one piece. chunked: evict between chunks, for prompts of any length. Or compute "
        "only a part of its attention: flexprefill, vertical-slash, a-shape, with options as in flexprefill:gamma=0.95.",
    ),
]
LengthOption = Annotated[
    int, sample_option("--max-new-tokens", "-n", max=MOST_TOKENS, help="Length of the answer, at most.")
]
DtypeOption = Annotated[str, model_option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
WeightsOption = Annotated[
    str, model_option(help="auto (as the checkpoint holds them), int8 or int4: made while loading.")
]
DeviceOption = Annotated[str, model_option(help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")]
BackendOption = Annotated[
    str, model_option(help="flex (FlexAttention, compiled), sdpa, or auto: flex on CUDA, else sdpa.")
]
TemplateNameOption = Annotated[
    str | None,
    text_option(metavar="NAME", help="Which of the checkpoint's chat templates.", show_default="its default"),
]
TemplateArgOption = Annotated[
    list[str] | None,
    text_option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="A variable of the chat template, such as enable_thinking=false; JSON or a word. May be repeated.",
    ),
]


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn, and when they end."""

    max_new_tokens: LengthOption = 128
    temperature: Annotated[float, sample_option(help="0 takes the likeliest token.")] = 0.0
    top_k: Annotated[int, sample_option(max=MOST_TOKENS, help="Sample from the k likeliest; 0: from all.")] = 0
    top_p: Annotated[float, sample_option(help="Sample from this much of the mass.")] = 1.0
    min_p: Annotated[float, sample_option(help="Drop tokens less likely than this fraction of the likeliest.")] = 0.0
    seed: Annotated[int | None, sample_option(help="Makes sampling repeatable.")] = None
    stop: Annotated[list[str] | None, sample_option(help="End before this text. May be repeated.")] = None

    def decoding(self) -> dict[str, Any]:
        """As the fields of Decoding."""
        for text in self.stop or ():
            note_escapes("--stop", text)
        return vars(self) | {"stop": self.stop or ()}


@dataclass(frozen=True)
class LoadOptions:
    """In which numbers, where and how a model runs."""

    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"
    backend: BackendOption = "auto"
    weights: WeightsOption = "auto"

    def load(self, model: str, check_weights: bool = False, parallel: str = "none") -> LM:
        """See restkv.load; on a terminal the weights that are there are counted."""
        from restkv.cli.display import byte_text
        from restkv.cli.terminal import status
        from restkv.lm import load

        progress = status.progress("loading the weights", byte_text)
        return load(model, **vars(self), check_weights=check_weights, progress=progress, parallel=parallel)


TEXT_LIMIT = 1 << 30  # bytes of a file or a stream that is read as one text
PIECE = 1 << 20  # bytes of it that are read at once


@contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Around whatever reads a text from there.

    Raises:
        PromptError: it cannot be read, or is not UTF-8. TooLargeError: there is not enough memory for it.
    """
    try:
        yield
    except MemoryError:
        raise TooLargeError(f"{place}: not enough memory to read it; give a shorter text") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{place}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        mend = "give it a file or a pipe to read from" if place == "stdin" else "give another file"
        raise PromptError(f"{place}: cannot be read ({reason(error)}); {mend}") from None


def note_escapes(option: str, text: str, other_ways: str = "") -> None:
    """Remark on a text of the command line that seems to mean line breaks: no shell and nobody here makes them of \\n."""
    if "\\n" in text and "\n" not in text:
        warnings.warn(
            f"{option} has a backslash and an n, which are no line break and are taken as they stand; where one is meant, "
            f"give $'one\\ntwo' (in bash){other_ways}",
            RestKVWarning,
            stacklevel=2,
        )


def read_text(file: Path | None) -> str:
    """The text of a file, or of stdin for None: the same from both (see modeling.text.characters.decoded).

    Raises:
        PromptError: see reading; or it is a device, which may never end, or longer than TEXT_LIMIT.
    """
    place = "stdin" if file is None else file
    with reading(place):
        if file is not None:
            with file.open("rb") as opened:
                return decoded(_content(opened, place))
        stream = getattr(sys.stdin, "buffer", None)
        return decoded(sys.stdin.read().encode() if stream is None else _content(stream, place))


def _content(stream: BinaryIO, place: str | Path) -> bytearray:
    """All bytes of a file or a pipe."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # some streams of tests have no descriptor
        size = 0
    else:
        endless = (
            stat.S_ISCHR(status.st_mode) and not stream.isatty() and not os.path.samestat(status, os.stat(os.devnull))
        )
        if endless or stat.S_ISBLK(status.st_mode):
            raise PromptError(f"{place}: is a device, not a text; give a file or a pipe")
        size = status.st_size
    content = bytearray()
    while size <= TEXT_LIMIT and (piece := stream.read(PIECE)):
        content += piece
        size = max(size, len(content))
    if size > TEXT_LIMIT:
        raise PromptError(f"{place}: has more than the {TEXT_LIMIT:,} bytes that a text may have; give a shorter one")
    return content


def given_text(text: str) -> str:
    """A text of the command line, as read_text gives one of a file."""
    return decoded(text.encode())


def parse_template_args(texts: Sequence[str] | None) -> dict[str, Any]:
    """What --template-arg says: NAME=VALUE each, as of --set.

    Raises:
        PolicyError: one that is not, or a name that comes twice.
    """
    read: dict[str, Any] = {}
    for text in texts or ():
        name, value = parse_field(text, "--template-arg")
        if name in read:
            raise PromptError(f"--template-arg {name}: given twice; drop one of them")
        read[name] = value
    return read


def parse_span(text: str) -> tuple[int, int]:
    """START:END.

    >>> parse_span("0:20")
    (0, 20)
    """
    try:
        start, end = map(int, text.split(":"))
    except ValueError:
        raise PolicyError(f"--protect {text!r} is not START:END, two positions such as 0:20") from None
    return start, end


def parse_field(text: str, option: str = "--set") -> tuple[str, Any]:
    """NAME=VALUE; the value is read as JSON, or as a word where it is none ("none" and "null" mean None).

    Args:
        option: what the text belongs to, named in errors.
    Raises:
        PolicyError: not NAME=VALUE, or a value that nothing takes: lists in lists in lists, numbers without end.

    >>> parse_field("kernel_size=7"), parse_field("alpha=none"), parse_field("pooling=max")
    (('kernel_size', 7), ('alpha', None), ('pooling', 'max'))
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise PolicyError(f"{option} {brief(text)} is not NAME=VALUE, such as kernel_size=7")
    try:
        read = json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except ValueError:
        return name, None if value.lower() == "none" else value
    except RecursionError:
        read = math.nan
    if not _usable(read):
        raise PolicyError(f"{option} {brief(text)}: give a number, a word, or a list of a few of them")
    return name, read


def _usable(value: Any, depth: int = 0) -> bool:
    """Whether a value is finite, and no deeper than any that an option takes."""
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return depth < DEEPEST and all(_usable(one, depth + 1) for one in inner)
    return not isinstance(value, float) or math.isfinite(value)


def with_fields(options: dict[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """What options with flags of their own say, and what --set says of others.

    Raises:
        PolicyError: not NAME=VALUE, or an option that has been given by its own flag too.
    """
    named = dict(map(parse_field, fields or ()))
    for name in named:
        if name in options:
            raise PolicyError(f"--{name.replace('_', '-')} and --set {name}: one option given twice; drop one of them")
    return options | named


def parse_interval(text: str) -> int | None:
    """A number of tokens, or "none"."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise PolicyError(f"interval {text!r} is neither a number of tokens nor none") from None


def make_policy(method: str | None, preset: str | None, options: dict[str, Any], prefill: str = "dense") -> Policy:
    """get_policy, with the default budget where the method needs one and none is given.

    Without a method, a preset and options of restkv's own it is the default of answers, the preset `draft`
    (policies.default_policy).
    """
    from restkv.policies import Policy, default_policy, get_policy, policy_class

    own = set(options) - {field.name for field in fields(Policy)}
    unnamed, method = method is None and preset is None and not own, method or "restkv"
    if "preset" in options:
        raise PolicyError(f"{method}: option 'preset' is unknown; a preset is named by --preset, or with the method")
    if unnamed:
        return default_policy("draft", prefill, **options)
    cls = policy_class(method)
    if "budget" not in {**cls.PRESETS.get(preset or "", {}), **options}:
        by_name = {field.name: field for field in fields(cls)}
        if by_name["budget"].default is MISSING:
            options = {"budget": DEFAULT_BUDGET, **options}
    return get_policy(method, preset, **options)


def sizing_policy(method: str, budget: Any) -> Policy:
    """A method under a budget (the default one for None) to size its cache by, where nobody could choose a window
    (Policy.window_within).

    Raises:
        PolicyError: unknown method, or one that cannot have this budget.
    """
    from restkv.policies import policy_class

    if budget is None:
        return make_policy(method, None, {})
    options: dict[str, Any] = {"budget": budget}
    entries = min(budget) if isinstance(budget, tuple) else budget
    if isinstance(entries, int):
        options |= policy_class(method).window_within(entries)
    return make_policy(method, None, options)
