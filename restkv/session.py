"""Generation over token ids: prefill each row, then decode all rows together, evicting every `interval` tokens.

Text lives in lm.py and cli.py. Letters: B batch rows, T new tokens, V vocabulary, E hidden width, K KV heads, D head dim.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.cache import KVCache
from modeling.modes import own_modes
from modeling.nonfinite import numeric_error, sound
from modeling.room import lacking
from restkv.budgets import LONGEST
from restkv.engine import Engine
from restkv.errors import NumericError, PromptError
from restkv.evict import Evictor
from restkv.patterns import Pattern, parse_prefill
from restkv.policies.base import TOO_MANY, Policy, require_policy
from restkv.prefill import Progress, prefill
from restkv.sampling import Sampling, sample
from restkv.schedule import Schedule
from restkv.seen import check_readable
from restkv.sizing import AHEAD, Job, mean_budgets, power, room_for, too_large

P = ParamSpec("P")
Result = TypeVar("Result")

CHUNK = 512  # tokens per chunk of a chunked prefill
BROKEN = -1  # drawn from logits that are no numbers
SAVED_ROOM = 64 << 20  # bytes of pages that a session read from a file may have ready beyond four times what it holds


class Saved(NamedTuple):
    """What a session that is read from a file brings along.

    Attributes:
        entries: of its page lists, on average.
        queries: how many each row remembers.
    """

    entries: int
    queries: int


def _says_what_to_lower(method: Callable[Concatenate[Session, P], Result]) -> Callable[Concatenate[Session, P], Result]:
    """A session's method in which lack of memory is one line."""

    @functools.wraps(method)
    def call(self: Session, *arguments: P.args, **options: P.kwargs) -> Result:
        try:
            return method(self, *arguments, **options)
        except (MemoryError, RuntimeError) as error:
            if (asked := lacking(error)) is None:
                raise
            wide = self.engine.model.dtype.itemsize > 2
            raise too_large(self._sized, self.policy, self._chunked, wide, asked) from None

    return call


class Session:
    """Rows of tokens over one paged cache: prefill, then decode step by step under a policy.

    Args:
        engine: model and backend.
        policy: what is evicted, and when.
        lengths: prompt lengths of the rows.
        max_new_tokens: how long the answer may get. A cache without a decode budget grows with it.
        prefill: "dense": each prompt in one piece, evicted when a layer is through (the paper); "chunked": `chunk` tokens at a
            time, each chunk attending before it is evicted, so that memory is bounded for prompts of any length; a Pattern of
            restkv.patterns or its text, such as "flexprefill:gamma=0.95": in one piece, and only a part of the attention is
            computed.
        extends: more tokens than one at a time will be appended later (`extend`).
        forks: forks alive at the same time to have pages ready for; more of them make the pool grow, which recompiles.
        saved: what is to be filled in from a file. Pages are made ready for what the policy asks for, unless that is much more
            than there is: a file does not say how much memory is to be taken.
    Attributes:
        logits_BV: after the last token of every row [B, V] float32.
        drawn_B: the tokens drawn last, not yet fed; None where there are none.
        ids: what every row has read, without what `feed` was given (the host may not know it).
    Raises:
        PolicyError: the policy is none, or the protected entries of a row do not fit into its budget.
        PromptError: there is no such prefill or chunk, or the policy remembers another number of queries than `saved` says.
    """

    @own_modes
    @_says_what_to_lower
    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        lengths: Sequence[int],
        max_new_tokens: int,
        *,
        prefill: str | Pattern = "dense",
        chunk: int = CHUNK,
        extends: bool = False,
        forks: int = 0,
        saved: Saved | None = None,
    ) -> None:
        prefill = str(prefill)
        self._pattern = parse_prefill(prefill)
        if not isinstance(chunk, int) or not 1 <= chunk < TOO_MANY:
            raise PromptError(f"chunk={chunk!r}: give the tokens of a chunk, a whole number from 1 to {TOO_MANY - 1}")
        self.engine, self.policy = engine, require_policy(policy, engine.model.ranks)
        self._job = {
            "lengths": list(lengths),
            "max_new_tokens": max_new_tokens,
            "prefill": prefill,
            "chunk": chunk,
            "extends": extends,
            "forks": forks,
        }
        self._chunked, self._chunk = prefill == "chunked", chunk
        check_readable(policy.probe, policy.refit, self._chunked and policy.budget is not None)
        # A compiled step knows few numbers of rows and of tokens: what is missing is padding.
        few = engine.backend == "flex"
        rows = power(len(lengths)) if few else len(lengths)
        self.evictor = Evictor(engine.model, policy, engine.roots, [*lengths, *[lengths[0]] * (rows - len(lengths))])
        self.evictor.pieces = engine.pieces
        layers = engine.model.config.num_layers
        mean = sum(map(sum, self.evictor.budgets)) / (layers * rows)
        limit = 0 if "mass" in policy.needs else max(min(map(min, self.evictor.budgets)), policy.high_water or 0)
        self.schedule = Schedule.of(policy, max_new_tokens, mean, engine.masks(policy), max(lengths), limit)
        self._sized = Job(
            lengths=lengths,
            budgets=mean_budgets(self.evictor.budgets, policy)[: len(lengths)],
            max_new_tokens=max_new_tokens,
            interval=self.schedule.interval,
            period=self.schedule.period,
            chunk=(power(chunk) if few else chunk) if extends or self._chunked else 0,
            forks=forks,
            compiled=few,
        )
        self.cache = self._new_cache(saved)
        self.ids: list[list[int]] = [[] for _ in lengths]
        self.logits_BV = torch.empty(0)
        self.drawn_B: Tensor | None = None
        self.active = [True] * len(lengths)
        self._active_B = torch.ones(len(lengths), dtype=torch.bool, device=engine.device)
        self._sound_B = torch.ones_like(self._active_B)  # the logits after every prompt and chunk were numbers

    def _new_cache(self, saved: Saved | None) -> KVCache:
        """An empty cache for this job."""
        policy, config = self.policy, self.engine.model.config
        room = room_for(self._sized, policy, config)
        queries = self._remembered()
        entries, forks, longest = room.entries, room.forks, room.longest
        if saved is not None:
            if saved.queries != queries:
                raise PromptError(f"{saved.queries} queries are remembered, {policy.name} looks at {queries}")
            per_entry = len(self._sized.lengths) * config.kv_bytes_per_token(self.engine.model.dtype)
            if per_entry * (entries + forks * room.page) > max(SAVED_ROOM, 4 * per_entry * saved.entries):
                entries, forks, longest = saved.entries + room.page, 0, 0
        uneven = policy.budget is not None and len(set(policy.layer_budgets(LONGEST, config.num_layers))) > 1
        return self.engine.new_cache(
            policy,
            len(self.evictor.states),
            entries,
            queries,
            ragged=policy.allocation.ragged or (policy.granularity == "query" and config.group > 1),
            shared=policy.allocation.across_layers or uneven,
            forks=forks,
            page=room.page,
            max_entries=room.max_entries,
            filled=None if room.every_row else len(self._sized.lengths),
            longest=longest,
        )

    def _remembered(self) -> int:
        """Queries to remember of every row: what an eviction looks at, and for accumulated attention all since the last one.

        Of a long interval or chunk no more than there can be; in few sizes, each of which is a graph.
        """
        policy, interval = self.policy, self.schedule.interval
        if not interval and (not self._chunked or policy.budget is None):
            return 0
        fresh = (interval or 0) + self._sized.chunk if "mass" in policy.needs else 0
        queries = max(policy.observed, 1, fresh)
        if self._job["extends"]:
            return queries
        most = max(self._sized.lengths) + self._sized.max_new_tokens
        return min(queries, max(AHEAD, power(most)))

    def _width(self, longest: int) -> int:
        """Tokens of a padded chunk whose longest row has so many."""
        if self.engine.backend != "flex":
            return longest
        return power(self._chunk) if self._chunk <= AHEAD else max(AHEAD, power(longest))

    @own_modes
    @_says_what_to_lower
    def prefill(self, prompts: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Run the prompts, one row at a time (a row of a batch is the same computation as the prompt alone).

        Raises:
            NumericError: the logits after one of them are no numbers.
        """
        engine, logits, numeric = self.engine, [], []
        for row, ids in enumerate(prompts):
            self.ids[row] = list(ids)
            cache, evictor = self.cache.row(row), self.evictor.row(row)
            first = ids[: self._chunk] if self._chunked else ids
            layers_done = None if self._chunked else progress
            how = layers_done, self._pattern, engine.attend, engine.phrases
            logits_1V = engine.model.head(prefill(engine.model, cache, evictor, first, *how))
            sound_1 = sound(logits_1V)
            if self._chunked and progress is not None:
                progress(len(first), len(ids))
            for start in range(len(first), len(ids), self._chunk):
                piece = ids[start : start + self._chunk]
                logits_1V = self._run(cache, [piece], logits_1V)
                sound_1 = sound_1 & sound(logits_1V)  # later chunks may have evicted what was none
                evictor.round(cache, compact=True)
                if progress is not None:
                    progress(start + len(piece), len(ids))
            logits.append(logits_1V)
            numeric.append(sound_1)
        self.cache.refresh()
        self.logits_BV, self._sound_B = torch.cat(logits), torch.cat(numeric)
        for row, numbers in enumerate(self._sound_B.tolist()):  # sync: once after a prompt
            if not numbers:
                raise self.numeric_error(row)

    @own_modes
    @_says_what_to_lower
    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Append several tokens per row (none for some, perhaps), in chunks, each attending before it is evicted.

        Rows share one count of tokens since the last eviction, and a chunk counts as many as its longest row has: a row with
        fewer tokens may be brought back to its budget sooner than `interval` tokens after its last eviction, never later.

        Raises:
            PolicyError: the text has grown into more protected entries than fit into the budget.
        """
        self._read(rows)
        for start in range(0, max(map(len, rows)), self._chunk):
            pieces = [ids[start : start + self._chunk] for ids in rows]
            self._take(self._run(self.cache, pieces, self.logits_BV))
            self._after(max(map(len, pieces)), compact=True)
            self.schedule.room = 0

    @own_modes
    @_says_what_to_lower
    def expect(self, rows: Sequence[Sequence[int]], judge: Callable[[int, Tensor], None]) -> None:
        """Append tokens as `extend` does, and show what was expected before each: by the cache as it was before its chunk, and by
        the chunk's earlier tokens.

        Args:
            judge: called for every row of every chunk with the row's number and the logits before each of its tokens [T, V],
                float32; one row at a time, since those of all would be large.
        Raises:
            PolicyError: see extend.
        """
        head = self.engine.model.head
        self._read(rows)
        for start in range(0, max(map(len, rows)), self._chunk):
            pieces = [ids[start : start + self._chunk] for ids in rows]
            x_BTE, logits = self._append(self.cache, pieces, self.engine.hidden), list(self.logits_BV)
            for row, piece in enumerate(pieces):
                if piece:
                    after_TV = head(x_BTE[row, : len(piece)])
                    judge(row, torch.cat([logits[row][None], after_TV[:-1]]))
                    logits[row] = after_TV[-1]
            self._take(torch.stack(logits))
            self._after(max(map(len, pieces)), compact=True)
            self.schedule.room = 0

    def _read(self, rows: Sequence[Sequence[int]]) -> None:
        self.ids = [[*before, *more] for before, more in zip(self.ids, rows, strict=True)]

    def _take(self, logits_BV: Tensor) -> None:
        """Logits after a chunk. Whether they are numbers is noted: the next chunk's may be, once what was none is evicted."""
        self.logits_BV = logits_BV
        self._sound_B = self._sound_B & (sound(logits_BV) | ~self._active_B)

    def numeric_error(self, row: int, fed: Sequence[int] = ()) -> NumericError:
        """What to raise about a row whose logits are no numbers; `fed`: the tokens that it was fed one by one."""
        return numeric_error(self.engine.model, [*self.ids[row], *fed], row if len(self.ids) > 1 else None)

    def _run(self, cache: KVCache, pieces: Sequence[Sequence[int]], logits_BV: Tensor) -> Tensor:
        """One chunk through the model: logits after it; rows that get no token keep theirs."""
        new_BV = self._append(cache, pieces, self.engine.decode)
        got_B1 = torch.tensor([bool(piece) for piece in pieces], device=self.engine.device)[:, None]
        return torch.where(got_B1, new_BV, logits_BV)

    def _append(self, cache: KVCache, pieces: Sequence[Sequence[int]], run: Callable[..., Tensor]) -> Tensor:
        """What `run` (Engine.decode or Engine.hidden) returns for one chunk, which the cache takes in."""
        engine, self.drawn_B = self.engine, None
        rows = len(pieces)
        pieces = [*pieces, *[[]] * (cache.rows - rows)]
        counts = [len(piece) for piece in pieces]
        width = self._width(max(counts))  # one compiled graph for all pieces
        padded = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
        ids_BT = torch.tensor(padded, device=engine.device)
        counts_B = torch.tensor(counts, dtype=torch.int32, device=engine.device)
        offset_T = torch.arange(width, dtype=torch.int32, device=engine.device)
        pos_BT = torch.where(offset_T < counts_B[:, None], cache.next_pos[:, None] + offset_T, -1)
        cache.reserve(counts)
        result = run(engine.model, ids_BT, pos_BT, cache.lag, cache.views(), cache.queries, cache.ring_size)
        cache.next_pos.add_(counts_B)
        return result[:rows]

    @own_modes
    def sample(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of every row [B] int64, from the current logits; not yet fed to the model."""
        self.drawn_B = sample(self.logits_BV, sampling, generators)
        return self.drawn_B

    @property
    def last_ids(self) -> list[int]:
        """The tokens drawn last, one per row; none once they have been fed."""
        return [] if self.drawn_B is None else self.drawn_B.tolist()  # sync: for whoever wants to know

    @own_modes
    def draw(
        self, max_tokens: int, sampling: Sampling, generators: Sequence[torch.Generator], ends_E: Tensor
    ) -> Tensor:
        """`sample` and `feed` by turns, up to `max_tokens` tokens without one being read: [N, B], the last of them not yet fed
        (drawn_B).

        It stops short of what the host is needed for. Rows that draw one of `ends_E` stop on the device; `finish` must follow
        once the host has read it. What such a row draws after its end means nothing. A row whose logits are no numbers draws
        BROKEN: whoever reads the tokens learns it with them.
        """
        ids_B = self.sample(sampling, generators)
        drawn = [self._marked(ids_B)]
        masks = self.engine.masks(self.policy) and not self.policy.protect  # a refused span would lose tokens
        while self.schedule.may_draw(len(drawn), max_tokens, masks):
            self._active_B = self._active_B & ~(ids_B[:, None] == ends_E).any(-1)
            self.feed(ids_B)
            ids_B = self.sample(sampling, generators)
            drawn.append(self._marked(ids_B))
        return torch.stack(drawn)

    def _marked(self, ids_B: Tensor) -> Tensor:
        return torch.where(self._sound_B & sound(self.logits_BV), ids_B, BROKEN)

    @own_modes
    @_says_what_to_lower
    def feed(self, ids_B: Tensor) -> None:
        """Append one token per active row and compute the next logits; evicts when the interval is over.

        Raises:
            PolicyError: the text has grown into more protected entries than fit into the budget.
            CompileError: the step cannot be compiled; the session is as it was, but for the token drawn.
        """
        cache, engine, schedule = self.cache, self.engine, self.schedule
        self.drawn_B = None
        if schedule.room == 0:
            ahead = schedule.ahead(cache.layers[0].pool.page)
            cache.reserve(ahead)
            schedule.room = ahead
        rows, active_B = len(ids_B), self._active_B
        if unused := cache.rows - rows:
            ids_B, active_B = F.pad(ids_B, (0, unused)), F.pad(active_B, (0, unused))
        pos_B1 = torch.where(active_B, cache.next_pos, -1)[:, None]
        logits_BV = engine.decode(
            engine.model, ids_B[:, None], pos_B1, cache.lag, cache.views(), cache.queries, cache.ring_size
        )
        self.logits_BV = logits_BV[:rows] if unused else logits_BV
        schedule.room, schedule.planned = schedule.room - 1, schedule.planned - 1
        cache.next_pos.add_(active_B)
        self._after(1, schedule.compacts_next, active_B)

    def _after(self, tokens: int, compact: bool, active_B: Tensor | None = None) -> None:
        """Count tokens; evict when an interval is over. active_B: rows that go on, where masks alone will do."""
        due, masked = self.schedule.take(tokens), False
        engine, cache, evictor, rows = self.engine, self.cache, self.evictor, self._padded(self.active)
        if active_B is not None and engine.masks(self.policy):
            if due and self.schedule.may_evict:
                masked = evictor.mask(cache, rows, active_B, engine.evict, engine.capacities)
            elif not due and self.schedule.evicts_soon and not engine.capacities.known(evictor.kind(cache)):
                # Nothing is evicted, but compiled: at an answer's begin, and not in the middle.
                evictor.mask(cache, self._padded([]), torch.zeros_like(active_B), engine.evict, engine.capacities)
        if not due:
            return
        if not masked:
            live = max(int(layer.live_counts().max()) for layer in cache.layers)
            evictor.count(evictor.round(cache, compact, rows), live)
        if compact:
            if masked:
                evictor.reclaim(cache)
            self.schedule.compacted()

    def _padded(self, active: Sequence[bool]) -> list[bool]:
        """For all rows of the cache."""
        return [*active, *[False] * (self.cache.rows - len(active))]

    def describe(self) -> dict[str, Any]:
        """JSON-ready: what `restore` needs besides the cache's contents."""
        counters = {
            "since_eviction": self.schedule.since_eviction,
            "evictions": self.evictor.evictions,
            "max_live": self.evictor.max_live,
        }
        return {"job": self._job, "counters": counters, "last_ids": self.last_ids}

    @classmethod
    @own_modes
    def restore(cls, engine: Engine, policy: Policy, described: Mapping[str, Any], saved: Saved) -> Session:
        """A session with an empty cache, otherwise as it was described (its pages hold no dead entries)."""
        job = dict(described["job"])
        session = cls(engine, policy, job.pop("lengths"), job.pop("max_new_tokens"), saved=saved, **job)
        # Pages are reserved from one compaction to the next, which has to fall on an eviction.
        session.schedule.since_eviction = session.schedule.since_compaction = described["counters"]["since_eviction"]
        session.schedule.limit = 0  # how long the rows have become since is in the cache
        session.evictor.count(described["counters"]["evictions"], described["counters"]["max_live"])
        if described["last_ids"]:
            session.drawn_B = torch.tensor(described["last_ids"], device=engine.device)
        return session

    def resume(self, max_new_tokens: int) -> None:
        """Let all rows go on, for about so many tokens."""
        self.active = [True] * len(self.active)
        self._active_B.fill_(True)
        self.schedule.planned = max_new_tokens

    @own_modes
    @_says_what_to_lower
    def fork(self, max_new_tokens: int = 0) -> Session:
        """A session that goes on from here on its own; pages are shared until one of the two writes."""
        twin = copy.copy(self)
        twin.cache, twin.evictor = self.cache.fork(), self.evictor.fork()
        self.schedule.room = 0  # the page both would write to next is shared now
        twin.schedule = replace(self.schedule, planned=max_new_tokens)
        twin.active, twin._active_B = list(self.active), self._active_B.clone()
        return twin

    def finish(self, row: int) -> None:
        """Stop a row: its cache stays as it is while the others go on."""
        self.active[row] = False
        self._active_B[row] = False

    @own_modes
    def kept(self) -> list[list[float]]:
        """Live entries per KV head (mean over this rank's heads), one list per layer with one number per row."""
        counts = [layer.live_counts()[: len(self.active)].double().mean(-1) for layer in self.cache.layers]
        return [count_B.tolist() for count_B in counts]  # sync: figures for a person, never while decoding
