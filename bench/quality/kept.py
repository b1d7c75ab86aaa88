"""Which positions of a prompt each layer and head kept: as masks, on a terminal over the text, and as a picture.

Letters: N layers, K KV heads, G = H / K, H query heads, L prompt length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from rich.text import Text
from torch import Tensor

from bench.report.figures import COLOURS, new_figure
from bench.runs.together import prefill_together
from modeling.shown import shown
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.patterns import Pattern
from restkv.policies import Policy
from restkv.session import Session

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = " ░▒▓█"  # none, up to a quarter, half, three quarters, all of what a character stands for
MARK, GONE = "▼", "·"
CLOSE_UP = 48  # tokens of the picture's lower panel
INK = "Blues"  # white is gone, dark is kept


@dataclass(frozen=True)
class Kept:
    """What a policy kept of a prompt.

    Attributes:
        label: the method.
        pieces: the text of every token.
        share: [N, K, L] in [0, 1], how many of a KV head's query heads still have the entry (0 or 1 for one set per KV head).
        marks: [start, end) token spans to be pointed out, such as a needle's.
    """

    label: str
    pieces: tuple[str, ...]
    share: np.ndarray
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def title(self) -> str:
        """Method and entries stored: the union over a group's query heads."""
        return f"{self.label}: {(self.share > 0).sum(2).mean():.0f} of {self.share.shape[2]} entries per KV head"


def kept_masks(session: Session, length: int, row: int = 0) -> list[Tensor]:
    """Bool [H, L] per layer: the prompt positions that each query head of a session's row still has."""
    masks = []
    group = session.engine.model.config.group
    for layer in session.cache.row(row).layers:
        slot_KC, pos_KC = layer.slots()
        has_KCG = repeat(pos_KC >= 0, "K C -> K C G", G=group)
        if "keep" in layer.pool.companions:
            has_KCG = has_KCG & layer.pool.companions["keep"][slot_KC]
        inside_KC = (pos_KC >= 0) & (pos_KC < length)
        # One column more takes what is no position of the prompt.
        column_KC = torch.where(inside_KC, pos_KC, length).long()
        mask_KGL = torch.zeros(len(pos_KC), group, length + 1, dtype=torch.bool, device=pos_KC.device)
        mask_KGL.scatter_(2, repeat(column_KC, "K C -> K G C", G=group), rearrange(has_KCG, "K C G -> K G C"))
        masks.append(rearrange(mask_KGL[..., :length], "K G L -> (K G) L"))
    return masks


@torch.no_grad()
def look(
    lm: LM,
    ids: Sequence[int],
    policies: Sequence[tuple[str, Policy]],
    marks: Sequence[tuple[int, int]] = (),
    pattern: Pattern | None = None,
) -> list[Kept]:
    """Prefill a prompt once and see what each policy keeps of it. policies: (label, policy) pairs; pattern: see
    prefill_together."""
    sessions = [Session(lm.engine, policy, [len(ids)], 1) for _, policy in policies]
    prefill_together(lm, sessions, ids, pattern)
    stream = lm.tokenizer.stream(skip_special=False)
    pieces = [stream.push(token) for token in ids]
    pieces[-1] += stream.flush()
    seen = []
    for (label, _), session in zip(policies, sessions, strict=True):
        masks = torch.stack(kept_masks(session, len(ids)))
        share_NKL = reduce(masks.double(), "N (K G) L -> N K L", "mean", K=lm.config.num_kv_heads)
        seen.append(Kept(label, tuple(pieces), share_NKL.cpu().numpy(), tuple(marks)))
    return seen


def find_marks(lm: LM, text: str, strings: Sequence[str]) -> list[tuple[int, int]]:
    """Token spans [start, end) of strings in a prompt's text, every occurrence."""
    spans = []
    for string in strings:
        at = text.find(string)
        if not string or at < 0:
            raise PromptError(f"mark {string!r} does not occur in the prompt; give a part of it")
        while at >= 0:
            # The tokens of the text up to a place, less one that may reach over it.
            start, stop = (len(lm.tokenizer.encode(text[:end])) for end in (at, at + len(string)))
            spans.append((max(0, start - 1), stop))
            at = text.find(string, at + len(string))
    return sorted(spans)


# -- terminal


def terminal(kept: Kept, width: int = 100) -> Iterator[Text]:
    """Lines for a console: a map of all heads with its marks, then the text with what nobody kept as dots."""
    length = kept.share.shape[2]
    bins = spans(length, width)
    yield Text(shown(kept.title), style="bold")
    if kept.marks:
        hit = [any(start < stop and end > first for first, stop in kept.marks) for start, end in bins]
        yield Text(" " * 8 + "".join(MARK if mark else " " for mark in hit))
    for layer, heads in enumerate(kept.share):
        for head, line in enumerate(heads):
            means = [line[start:end].mean() for start, end in bins]
            yield Text(f"L{layer:<3}h{head:<3}") + Text("".join(SHADES[int(np.ceil(4 * mean))] for mean in means))
    yield Text("")
    yield over_text(kept)


def spans(length: int, width: int) -> list[tuple[int, int]]:
    """[start, stop) of what each character of a line stands for: `length` things in `width` characters, or one each.

    >>> spans(5, 3), spans(2, 80)
    ([(0, 2), (2, 3), (3, 5)], [(0, 1), (1, 2)])
    """
    return list(pairwise(np.linspace(0, length, min(width, length) + 1).round().astype(int).tolist()))


def over_text(kept: Kept) -> Text:
    """The prompt: bold what at least half of all heads kept, plain what some kept, dots for what is gone everywhere.

    Marked tokens are underlined.
    """
    text = Text()
    everywhere = kept.share.mean((0, 1))
    for index, (piece, share) in enumerate(zip(kept.pieces, everywhere, strict=True)):
        marked = any(start <= index < stop for start, stop in kept.marks)
        style = "bold" if share >= 0.5 else "" if share > 0 else "dim"
        visible = shown(piece) if share > 0 else "".join(letter if letter.isspace() else GONE for letter in piece)
        text.append(visible, style=f"{style} underline".strip() if marked else style)
    return text


# -- picture


def kept_figure(seen: Sequence[Kept]) -> Figure:
    """A map per policy: heads of all layers down, positions across, dark = kept; below it a close-up of the marked text."""
    first = seen[0]
    lines = first.share.shape[0] * first.share.shape[1]
    tall = min(0.5 + 0.09 * lines, 4.0)
    start, stop = _close_up(first)
    figure = new_figure(10, len(seen) * (tall + 0.55) + 1.6)
    heights = [tall] * len(seen) + [1.1]
    panels = figure.subplots(len(seen) + 1, 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, kept in zip(panels, seen, strict=False):
        _draw_map(axes, kept)
    everywhere = np.stack([kept.share.mean((0, 1))[start:stop] for kept in seen])
    axes = panels[-1]
    axes.imshow(everywhere, cmap=INK, vmin=0, vmax=1, aspect="auto", extent=(start, stop, len(seen), 0))
    visible = str.maketrans({"\n": "↵", " ": "␣"})
    labels = [piece.translate(visible)[:12] or "∅" for piece in first.pieces[start:stop]]
    axes.set_xticks(np.arange(start, stop) + 0.5, labels, rotation=90, fontsize=6)
    axes.set_yticks(np.arange(len(seen)) + 0.5, [kept.label for kept in seen], fontsize=7)
    axes.set_title(f"share of all heads that kept tokens {start} to {stop - 1}", fontsize=8)
    _draw_marks(axes, first, len(seen))
    axes.set_xlim(start, stop)
    return figure


def _draw_map(axes: Axes, kept: Kept) -> None:
    layers, heads, length = kept.share.shape
    axes.imshow(
        kept.share.reshape(layers * heads, length),
        cmap=INK,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
        extent=(0, length, layers * heads, 0),
    )
    draw_layers(axes, layers, heads)
    axes.set_title(kept.title, fontsize=9)
    _draw_marks(axes, kept, layers * heads)


def draw_layers(axes: Axes, layers: int, heads: int) -> None:
    """Name the layers of a map with a row per KV head, and draw lines between them."""
    for layer in range(1, layers):
        axes.axhline(layer * heads, color="#999999", linewidth=0.6)
    step = max(1, layers // 12)
    axes.set_yticks(
        [(layer + 0.5) * heads for layer in range(0, layers, step)],
        [f"layer {layer}" for layer in range(0, layers, step)],
        fontsize=7,
    )
    axes.tick_params(axis="x", labelsize=7)


def _draw_marks(axes: Axes, kept: Kept, bottom: int) -> None:
    """A frame around every marked span."""
    from matplotlib.patches import Rectangle

    for start, stop in kept.marks:
        frame = Rectangle(
            (start, 0), stop - start, bottom, fill=False, edgecolor=COLOURS[2], linewidth=1.2, clip_on=False
        )
        axes.add_patch(frame)


def _close_up(kept: Kept) -> tuple[int, int]:
    """The tokens of the lower panel: around the first mark, or the prompt's last ones."""
    length = kept.share.shape[2]
    width = min(CLOSE_UP, length)
    middle = sum(kept.marks[0]) // 2 if kept.marks else length
    start = min(max(0, middle - width // 2), length - width)
    return start, start + width
