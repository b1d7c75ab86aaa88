"""The mask that decoding attends through: which pages of the pool each head's list holds and reads, and how full they are.

On a terminal a line per KV head, in a picture a row; both run over the pages of the pool, as FlexAttention's block lists do.
Letters: P pages of the pool, R KV heads of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.text import Text

from bench.quality.kept import GONE, INK, SHADES, draw_layers, spans
from bench.report.figures import COLOURS, new_figure
from bench.runs.together import prefill_together
from modeling.occupancy import Blocks, PageList, cache_lists, total
from modeling.shown import shown
from restkv.lm import LM
from restkv.patterns import Pattern
from restkv.policies import Policy
from restkv.session import Session

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = "pages"  # what a line runs over
FIGURES = 34  # letters of the figures at the end of a line
LEGEND = (
    f"blank: not on the head's list; {GONE}: on it, but nothing there is alive, so it is skipped; {SHADES[1:]}: up to a quarter, "
    "half, three quarters, all slots alive"
)
DEAD = COLOURS[5]


@dataclass(frozen=True)
class Mask:
    """The page lists of a cache after a prompt and some tokens.

    Attributes:
        label: the method.
        prompt, decoded: tokens read, and tokens decoded after them.
        layers: the lists of all KV heads, layer by layer.
    """

    label: str
    prompt: int
    decoded: int
    layers: tuple[tuple[PageList, ...], ...]

    @property
    def lists(self) -> list[PageList]:
        return [one for heads in self.layers for one in heads]

    @property
    def blocks(self) -> Blocks:
        """Of all lists together."""
        return total(one.blocks for one in self.lists)

    @property
    def title(self) -> str:
        """What it is of, and its figures."""
        blocks, lists = self.blocks, self.lists
        return (
            f"{self.label}, {self.prompt} tokens read and {self.decoded} decoded: {blocks.read} of {blocks.held} pages on the "
            f"lists are read ({lists[0].page} slots each), {blocks.skipped / blocks.pool:.0%} of the pool's blocks are skipped, "
            f"{blocks.dead_share:.0%} of the slots written are dead, {blocks.alive / len(lists):.0f} entries alive per KV head"
        )

    def as_json(self) -> dict[str, Any]:
        """JSON-ready: the figures of all, and every list with its own."""
        layers = [[asdict(one) | {"blocks": _figures(one.blocks)} for one in heads] for heads in self.layers]
        about = {"method": self.label, "prompt_tokens": self.prompt, "decoded_tokens": self.decoded}
        return about | {"blocks": _figures(self.blocks), "layers": layers}


def _figures(blocks: Blocks) -> dict[str, Any]:
    derived = {name: getattr(blocks, name) for name in ("skipped", "skipped_held", "dead_share")}
    return asdict(blocks) | derived


@torch.no_grad()
def masks(
    lm: LM, ids: Sequence[int], policies: Sequence[tuple[str, Policy]], tokens: int, pattern: Pattern | None = None
) -> list[Mask]:
    """The mask of each policy after a prompt and the `tokens` likeliest tokens, ends of answers included.

    Args:
        policies: (label, policy) pairs. pattern: see prefill_together.
    """
    sessions = [Session(lm.engine, policy, [len(ids)], max(1, tokens)) for _, policy in policies]
    prefill_together(lm, sessions, ids, pattern)
    found = []
    for (label, _), session in zip(policies, sessions, strict=True):
        for _ in range(tokens):
            session.feed(session.logits_BV.argmax(-1))
        found.append(Mask(label, len(ids), tokens, tuple(map(tuple, cache_lists(session.cache)))))
        session.cache.free()
    return found


# -- terminal


def terminal(mask: Mask, width: int) -> Iterator[Text]:
    """Lines for a console of so many letters: the figures, and a map with a line per KV head and its own figures."""
    bins = spans(max(one.pool for one in mask.lists), max(1, width - FIGURES - 8))
    yield Text(shown(mask.title), style="bold")
    across = max(len(bins), len(ACROSS))
    yield Text(f"{'':8}{ACROSS:{across}}{'read/held':>12}{'dead':>6}{'alive':>8}{'skipped':>8}")
    for layer, heads in enumerate(mask.layers):
        for head, one in enumerate(heads):
            blocks = one.blocks
            figures = f"{f'{blocks.read}/{blocks.held}':>12}{blocks.dead_share:>6.0%}{blocks.alive:>8}"
            skipped = f"{blocks.skipped / blocks.pool:>8.0%}"
            yield Text(f"L{layer:<3}h{head:<3}{_line(one, bins):{across}}{figures}{skipped}")


def _line(one: PageList, bins: Sequence[tuple[int, int]]) -> str:
    """One letter for each span of the pool's pages: how much of those on the list is alive."""
    share_P = _shares(one, one.pool)
    letters = []
    for start, stop in bins:
        held = share_P[start:stop][~np.isnan(share_P[start:stop])]
        letters.append(" " if not len(held) else SHADES[int(np.ceil(4 * held.mean()))] if held.any() else GONE)
    return "".join(letters)


def _shares(one: PageList, pool: int) -> np.ndarray:
    """[P] in [0, 1]: living entries of a page over its slots; NaN for pages that are not on the list."""
    share_P = np.full(pool, np.nan)
    share_P[list(one.pages)] = np.array(one.alive) / one.page
    return share_P


# -- picture


def mask_figure(found: Sequence[Mask]) -> Figure:
    """A panel per mask: KV heads of all layers down, pages of the pool across; dark is alive, orange is held and skipped."""
    from matplotlib.patches import Patch

    tall = [min(0.6 + 0.11 * len(mask.lists), 5.0) for mask in found]
    figure = new_figure(10, sum(tall) + 0.75 * len(found) + 0.5)
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=tall)[:, 0]
    for axes, mask in zip(panels, found, strict=True):
        _draw(axes, mask)
    panels[-1].set_xlabel("page of the pool", fontsize=8)
    kinds = {
        "all slots alive": "#08306b",
        "a quarter": "#6aaed6",
        "on the list, skipped": DEAD,
        "not on the list": "white",
    }
    patches = [Patch(facecolor=colour, edgecolor="#999999", label=kind) for kind, colour in kinds.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=7, frameon=False)
    return figure


def _draw(axes: Axes, mask: Mask) -> None:
    lists = mask.lists
    pool = max(one.pool for one in lists)
    share_RP = np.stack([_shares(one, pool) for one in lists])
    place: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "extent": (0, pool, len(lists), 0)}
    # A page with little alive must not look like one that is not held: the map's lower third is left out.
    axes.imshow(np.ma.masked_where(~(share_RP > 0), share_RP), cmap=INK, vmin=-0.5, vmax=1, **place)
    skipped_RP = np.ma.masked_where(share_RP != 0, np.ones_like(share_RP))
    axes.imshow(skipped_RP, cmap=_one_colour(DEAD), vmin=0, vmax=1, **place)
    draw_layers(axes, len(mask.layers), len(mask.layers[0]))
    first, _, rest = mask.title.partition(": ")
    axes.set_title(f"{first}\n{rest}", fontsize=8)


def _one_colour(colour: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([colour])
