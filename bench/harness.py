"""A model type for lm-evaluation-harness: every task it has, with a cache that evicts. docs/lm-eval.md shows how to run it.

What a task sends is encoded, truncated and stopped as by the harness's own `hf` model on the same checkpoint, so that with
method=full the two give the same figures (tests/bench/test_lm_eval.py). What differs is the cache: a context is prefilled and
evicted, then its continuations are scored on what is left, or the answer is generated from it.

Importing this module registers the model; it needs the extra `eval`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from bench.quality.teacher_forcing import Score, Tally, score_rows, score_unevicted
from bench.runs.benchmark import EAGER
from bench.runs.methods import Method
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL, make_policy, parse_field
from restkv.errors import OutputError, PromptError, RestKVWarning
from restkv.lm import load
from restkv.patterns import parse_prefill
from restkv.policies import Policy
from restkv.saving.fingerprint import fingerprint
from restkv.saving.store import policy_to_dict

NAME = "restkv"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
Ids = tuple[int, ...]


@register_model(NAME)
class RestKVHarness(TemplateLM):
    """LM of the harness over a restkv LM and a policy. Arguments come from --model_args, as the harness has read them.

    Args:
        pretrained: a checkpoint folder, or org/name[@revision] with the extra `hub`; recall-mini when none is given.
        method: NAME[@PRESET][:OPTION=VALUE]..., see bench/runs/methods.py.
        preset: another way to name one.
        budget: entries per KV head, a fraction of the context, or a list of one number per layer.
        dtype, device, backend, weights: see restkv.load.
        batch_size: contexts run as rows of one session.
        max_length: tokens of context and continuation, or of context and answer; the model's positions when not given.
        prefill: "dense", "chunked" or a sparse pattern, see Session.
        template_args: variables of the chat template, as an object or as JSON of one.
        options: any option of the method.
    Raises:
        PolicyError, PromptError, CheckpointError: one line that names the value and the mend.
    """

    def __init__(
        self,
        pretrained: str = str(RECALL),
        method: str = "restkv",
        preset: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        backend: str = EAGER,
        batch_size: int | str = 1,
        max_length: int | None = None,
        prefill: str = "dense",
        template_args: Mapping[str, Any] | str | None = None,
        weights: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        named = Method.parse(method)
        if named.preset and preset:
            raise PromptError(f"method {method!r} and preset {preset!r} name a preset each; drop one of the two")
        self.policy = make_policy(named.name, preset or named.preset, {**named.options, **_values(options)})
        parse_prefill(prefill)
        self.prefill = prefill
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.lm = load(str(pretrained), dtype=dtype, device=device, backend=backend, weights=weights)
        self.max_length = self.lm.config.max_positions
        if max_length is not None:
            self.max_length = _at_least_one("max_length", max_length)
        self.max_gen_toks = 256  # where a task does not say, as with `hf`
        self.kept: dict[str, Tally] = {}  # by kind of request
        self._device = self.lm.device
        self._template_args = _template_args(template_args)
        if self._template_args:
            self.tok.check_template(self._template_args)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> RestKVHarness:
        """See create_from_arg_obj."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> RestKVHarness:
        """What --model_args says goes before the harness's own options, of which batch_size and device are always there."""
        beside = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if beside.get("device") == "cuda:0" and not torch.cuda.is_available():
            del beside["device"]  # its default, whatever the machine
        return cls(**{**beside, **arg_dict})

    # -- text to ids and back

    @property
    def tok(self) -> Tokenizer:
        return self.lm.tokenizer

    @property
    def eot_token_id(self) -> int | None:
        return self.tok.eos_ids[0] if self.tok.eos_ids else None

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is none."""
        token = self.eot_token_id if self.tok.bos_id is None else self.tok.bos_id
        if token is None:
            raise PromptError("the tokenizer has neither BOS nor EOS to stand for an empty context; name one of them")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a BOS that the text itself begins with is not doubled."""
        return self.tok.encode(string, bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the records of the harness."""
        if isinstance(chat_template, str):
            raise PromptError(f"chat template {chat_template!r} cannot be chosen; the checkpoint's default is used")
        return self.tok.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` it ends with the last message, to be gone on with."""
        if add_generation_prompt:
            return self.tok.render(chat_history, True, self._template_args)
        return self.tok.render_open(chat_history, self._template_args)

    @property
    def tokenizer_name(self) -> str:
        return fingerprint(self.lm.model)

    # -- what the harness records

    def get_model_info(self) -> dict[str, Any]:
        """JSON-ready: what the figures are of, and how much of the caches was kept, by kind of request."""
        return {**self._identity(), "kept": {kind: asdict(tally) for kind, tally in self.kept.items()}}

    def _identity(self) -> dict[str, Any]:
        return {
            "policy": policy_to_dict(self.policy),
            "checkpoint": fingerprint(self.lm.model),
            "max_length": self.max_length,
            "prefill": self.prefill,
            **({"template_args": self._template_args} if self._template_args else {}),
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Go on with the results in a --use_cache file, which must be of this model and policy.

        The harness files them by their request alone, so that another method's would be taken for ours.
        """
        stored = cache_hook.dbdict
        mine = json.dumps(self._identity(), sort_keys=True)
        if stored is not None:
            if len(stored) and stored.get(NAME) != mine:
                raise OutputError("--use_cache: the file holds results of another model or policy; name another file")
            stored[NAME] = mine
        super().set_cache_hook(cache_hook)

    # -- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of every request (texts, context ids, continuation ids): log-probability in nats, and whether greedy."""
        asks: dict[tuple[Policy, Ids], list[int]] = {}
        targets: list[Ids] = []
        for index, (texts, context, continuation) in enumerate(requests):
            ids, target = self._fit(texts, context, continuation)
            targets.append(target)
            asks.setdefault((self.policy, ids), []).append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def done(index: int, score: Score) -> None:
            results[index] = (score.logprob, score.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])

        rows = [(policy, ids, indices) for (policy, ids), indices in asks.items()]
        self._score("loglikelihood", rows, targets, done, disable_tqdm)
        return results

    def _fit(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> tuple[Ids, Ids]:
        """Context and continuation of at most max_length + 1 tokens, since the last one is never read."""
        if not 0 < len(continuation) <= self.max_length:
            raise PromptError(
                f"a continuation of {len(continuation)} tokens, {texts[1][:40]!r}, cannot be scored; it must have 1 to "
                f"max_length={self.max_length}"
            )
        room = self.max_length + 1 - len(continuation)
        return tuple(self.lm.encode(context[-room:])), tuple(self.lm.encode(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in nats, in windows of max_length, each after one token of context.

        A window is fed token by token, so that a policy evicts every `interval` tokens; without one it never does. A budget
        that is a fraction is one of the window.
        """
        rows: list[tuple[Policy, Ids, list[int]]] = []
        targets: list[Ids] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, target in map(make_disjoint_window, windows):
                rows.append((self._for_window(len(context) + len(target)), tuple(context), [len(targets)]))
                targets.append(tuple(self.lm.encode(target)))
                owners.append(owner)
        sums, left = [0.0] * len(requests), [owners.count(owner) for owner in range(len(requests))]

        def done(index: int, score: Score) -> None:
            owner = owners[index]
            sums[owner] += score.logprob
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, sums[owner])

        self._score("loglikelihood_rolling", rows, targets, done, disable_tqdm)
        return sums

    def _for_window(self, tokens: int) -> Policy:
        if isinstance(self.policy.budget, float):
            return replace(self.policy, budget=self.policy.budget_for(tokens))
        return self.policy

    def _score(
        self,
        kind: str,
        rows: Sequence[tuple[Policy, Ids, list[int]]],
        targets: Sequence[Ids],
        done: Callable[[int, Score], None],
        quiet: bool,
    ) -> None:
        """Score `targets` after the contexts of `rows` (policy, context, indices of targets), in batches."""
        tally = self.kept.setdefault(kind, Tally())
        with tqdm(total=len(targets), desc=kind, disable=quiet) as bar:
            for batch in self._batches(rows, size=lambda row: len(row[1]) + len(targets[row[2][0]])):
                policy = batch[0][0]
                if policy.budget is None and kind == "loglikelihood_rolling":
                    scores = [[score_unevicted(self.lm, ids, targets[at]) for at in some] for _, ids, some in batch]
                else:
                    contexts = [ids for _, ids, _ in batch]
                    wanted = [[targets[at] for at in indices] for _, _, indices in batch]
                    scores = score_rows(self.lm, policy, contexts, wanted, self.prefill, tally)
                for (_, _, indices), row in zip(batch, scores, strict=True):
                    for index, score in zip(indices, row, strict=True):
                        done(index, score)
                        bar.update()
        self._remark(tally)

    def _batches(self, rows: Sequence[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Rows of the same first item, batch_size at a time, the largest first: what does not fit fails at once."""
        groups: dict[Any, list[Any]] = {}
        for row in sorted(rows, key=lambda row: -size(row)):
            groups.setdefault(row[0], []).append(row)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _remark(self, tally: Tally) -> None:
        """Say so when the figures are the full cache's although a method was asked for."""
        nothing_gone = tally.requests and not tally.evictions and tally.kept > tally.seen - 0.5
        if self.policy.budget is not None and nothing_gone:
            warnings.warn(
                f"{self.policy.name} with budget {self.policy.budget} evicted nothing in {tally.requests} requests: the "
                "contexts are too short for it, or (rolling tasks) it has no interval",
                RestKVWarning,
                stacklevel=4,
            )

    # -- generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string (left out), EOS, or max_gen_toks tokens."""
        tally = self.kept.setdefault("generate_until", Tally())
        answers = [""] * len(requests)
        rows = []
        for index, (context, given) in enumerate(request.args for request in requests):
            decoding = self._decoding(given)
            room = self.max_length - decoding["max_new_tokens"]
            if room < 1:
                raise PromptError(
                    f"max_gen_toks={decoding['max_new_tokens']} leaves no room for a context in max_length="
                    f"{self.max_length}; raise the one or lower the other"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            rows.append((json.dumps(decoding), ids[-room:], index))
        with tqdm(total=len(rows), desc="generate_until", disable=disable_tqdm) as bar:
            for batch in self._batches(rows, size=lambda row: len(row[1])):
                decoding = json.loads(batch[0][0])
                if decoding["temperature"] > 0:  # the harness seeds torch: --seed makes sampling repeatable too
                    decoding["seed"] = int(torch.randint(1 << 31, ()))
                prompts = [ids for _, ids, _ in batch]
                done = self.lm.generate(prompts, self.policy, prefill=self.prefill, **decoding)
                stats = done[0].stats
                tally.add(stats.seen, stats.kept, stats.evictions)
                for (_, _, index), answer in zip(batch, done, strict=True):
                    answers[index] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer.text)
                    bar.update()
        self._remark(tally)
        return answers

    def _decoding(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of Decoding that a task's generation_kwargs ask for."""
        wanted = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        eos = None if self.eot_token_id is None else self.tok.decode([self.eot_token_id], skip_special=False)
        decoding = {
            "stop": [text for text in handle_stop_sequences(wanted.pop("until"), eos) if text],
            "max_new_tokens": wanted.pop("max_gen_toks"),
            "temperature": 0.0,
            **{name: wanted.pop(name) for name in SAMPLING if name in wanted},
        }
        wanted.pop("do_sample")  # the temperature says it by now
        if wanted.get("num_beams") == 1:  # some tasks write out that they want no beams
            wanted.pop("num_beams")
        for name, value in wanted.items():
            raise PromptError(
                f"generation_kwargs: {name}={value!r} is not supported; restkv knows until, max_gen_toks, do_sample, "
                f"{', '.join(SAMPLING)}"
            )
        return decoding


def _values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a policy: what the harness left as words is read as by --set, and its lists become tuples."""
    read = {
        name: parse_field(f"{name}={value}")[1] if isinstance(value, str) else value for name, value in options.items()
    }
    return {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}


def _template_args(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Variables of the chat template: a mapping, or a JSON object as the command line has it."""
    try:
        read = json.loads(given) if isinstance(given, str) else given or {}
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, Mapping):
        raise PromptError(f'template_args {given!r}: give a JSON object, such as {{"enable_thinking": false}}')
    return dict(read)


def _at_least_one(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise PromptError(f"{name} {value!r}: give a whole number of at least 1")
    return int(value)
