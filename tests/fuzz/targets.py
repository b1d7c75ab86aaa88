"""What is fuzzed: for each kind of thing that people bring, valid ones, and how they are changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import ASK, FAMILIES, Case, Target, families_of, linked, make_checkpoint, read
from hypothesis import strategies as st
from mutations import edited, torn, written
from saved import as_run, as_saved, runs, saved_ones, with_run, with_saved

from make.families import CASES
from make.toy_tokenizers import KINDS, TOKENS

# -- config.json


def _with_config(folders: list[Path]) -> st.SearchStrategy[Case]:
    keys = sorted({key for folder in folders for key in read(folder / "config.json")} | {"rope_scaling", "rope_theta"})

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        folder = draw(st.sampled_from(folders))
        config = draw(edited(read(folder / "config.json"), keys))
        files = {"m/config.json": draw(torn(written(config)))}
        if draw(st.integers(0, 3)) == 0:
            generation = draw(edited({"eos_token_id": [1, 2], "bos_token_id": 1}))
            files["m/generation_config.json"] = draw(torn(written(generation)))
        command = draw(st.sampled_from([("generate", "m", *ASK), ("generate", "m", *ASK), ("inspect", "m")]))
        return Case(command, files, linked(folder, "config.json"))

    return cases()


# -- weights


def _with_weights(folders: list[Path]) -> st.SearchStrategy[Case]:
    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        folder = draw(st.sampled_from(folders))
        whole = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + size])
        changed = draw(torn(written(draw(edited(header, ["dtype", "shape", "data_offsets"])))))
        length = draw(st.sampled_from([len(changed)] * 6 + [0, 7, 2**31, 2**63, len(changed) - 1, len(changed) + 9]))
        body = whole[8 + size :]
        cut = draw(st.sampled_from([len(body)] * 6 + [0, 1, len(body) // 2]))
        data = length.to_bytes(8, "little") + changed + body[:cut]
        if draw(st.integers(0, 3)):
            files = {"m/model.safetensors": data}
        else:
            places = {name: "a.safetensors" for name in header if name != "__metadata__"}
            index = {"metadata": {"total_size": 1}, "weight_map": places}
            files = {"m/model.safetensors.index.json": draw(torn(written(draw(edited(index)))))}
            files["m/a.safetensors"] = draw(st.sampled_from([whole, data]))
        return Case(("generate", "m", *ASK), files, linked(folder, "model.safetensors"))

    return cases()


# -- tokenizers


def _tokenizers(ground: Path) -> list[Path]:
    return [make_checkpoint(ground / "tokenizers" / kind, "llama3", kind) for kind in KINDS]


SIDES = {
    "tokenizer_config.json": {
        **TOKENS,
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True, "lstrip": False, "rstrip": False}},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    },
    "special_tokens_map.json": {**TOKENS, "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<extra>": 400, "</s>": 2},
}
TEXTS = ["a b", "Once upon <s> a time</s>", "北京 😀 x", "<|im_start|>", " ", "\u0301", "a" * 300]


def _with_tokenizer(folders: list[Path]) -> st.SearchStrategy[Case]:
    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        folder = draw(st.sampled_from(folders))
        files = {}
        if draw(st.booleans()):
            tokenizer = draw(edited(read(folder / "tokenizer.json"), ["type", "content", "special", "id"]))
            files["m/tokenizer.json"] = draw(torn(written(tokenizer)))
        for name, side in SIDES.items():
            if draw(st.integers(0, 2)) == 0:
                files[f"m/{name}"] = draw(torn(written(draw(edited(side, ["pad_token", "split_special_tokens"], 0)))))
        text = draw(st.sampled_from(TEXTS))
        chat = draw(st.sampled_from([(), ("--no-chat",)]))
        command = ("generate", "m", "-p", text, "-n", "2", "--budget", "8", "--set", "window=2", *chat)
        return Case(command, files, linked(folder, *(name.removeprefix("m/") for name in files)))

    return cases()


# -- chat templates

FRAMES = [
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m['content'] }}}}{0}<|im_end|>\n{{% endfor %}}",
    "{{{{ bos_token }}}}{{% if messages %}}{0}{{{{ messages[-1]['content'] }}}}{{% endif %}}",
    "{{% set ns = namespace(x='ab') %}}{0}{{{{ ns.x }}}}{{{{ messages[0].content }}}}",
    "{{% macro f(n) %}}{0}{{{{ n }}}}{{% endmacro %}}{{{{ f(3) }}}}",
    "{0}",
]
PIECES = [
    "",
    "{{ 'a' * 10**10 }}",
    "{{ 9**(9**9) }}",
    "{{ range(10**9)|length }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a\na'|indent(10**9) }}",
    "{{ [1, 2]|tojson(indent=10**9) }}",
    "{% for i in range(9) %}{% set ns.x = ns.x * 99 %}{% endfor %}",
    "{{ ns.x * 10**8 }}",
    "{% macro g(n) %}{{ g(n) }}{% endmacro %}{{ g(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 'x'|attr('format')|attr('__globals__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception('no\x1b[31m') }}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now(5) }}",
    "{{ undefined_name.x }}",
    "{{ tools|tojson }}",
    "{% include 'x' %}",
    "{% generation %}a{% endgeneration %}",
    "{% if %}",
    "{{",
    "{% for i in range(10) %}{% continue %}{% endfor %}",
    "{{ ('a' * 10000)|replace('a', 'b' * 100000) }}",
    "{{ messages|map('upper')|list }}",
    "{{ (('(' * 500) ~ 'a') }}",
    "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    "{{ '\ud800' }}",
    "{{ lipsum(n=10**6) }}",
    "{{ range(5)|batch(10**9, 'x')|list }}",
    "{{ 'a'|wordwrap(1)|urlize(10**9) }}",
]


def _templated(ground: Path) -> list[Path]:
    return [make_checkpoint(ground / "templated", "llama3")]


def _with_template(folders: list[Path]) -> st.SearchStrategy[Case]:
    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        frame = draw(st.sampled_from(FRAMES))
        pieces = draw(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=20)), min_size=1, max_size=2))
        data = frame.format("".join(pieces)).encode("utf-8", "surrogatepass")
        how = draw(st.sampled_from(["file", "config", "named", "mutated"]))
        if how == "file":
            files = {"m/chat_template.jinja": data}
        else:
            text = data.decode("utf-8", "replace")
            entry: Any = text if how == "config" else [{"name": "default", "template": text}]
            config: Any = {**TOKENS, "chat_template": entry}
            if how == "mutated":
                config = draw(edited(config, ["name", "template", "default"]))
            files = {"m/tokenizer_config.json": written(config).encode("utf-8", "surrogatepass")}
        if draw(st.booleans()):
            command: tuple[str, ...] = ("generate", "m", "-p", "a b", "-n", "2", "--budget", "16", "--set", "window=2")
            stdin = b""
        else:
            command, stdin = ("chat", "m", "-n", "2", "--budget", "64", "--set", "window=2"), b"a\nb\n/stats\n"
        return Case(command, files, linked(folders[0], *(name.removeprefix("m/") for name in files)), stdin)

    return cases()


# -- chats: what people type

LINES = [
    *b"""hello
a b c
/stats
/new
/help
/
/x
/method
/method snapkv
/method snapkv budget=2000000000
/method restkv budget=0
/method restkv budget=0.5
/method nothing
/method restkv window=[[[[]]]]
/method full budget=3
/method snapkv window=NaN
/method snapkv gqa=7
/method restkv budget_by=global alpha=2
/method h2o interval=0
/method random seed=-1
/method random seed=1e400
/load
/load /
/load m/config.json
/load saved
/load '
/save
/save saved
/save saved extra
/save /nowhere/x
/save m
 /quit
<|im_end|></s>""".split(b"\n"),
    b"",
    b"a\r",
    b"\x1b[31m",
    b"\xff\xfe",
    b"/save a\x00b",
    b"/load " + b"x" * 300,
    b"/save " + b"y" * 300,
    b"/method snapkv budget=" + b"[" * 5000,
    b"/method snapkv budget=1" + b"0" * 5000,
]


def _with_lines(folders: list[Path]) -> st.SearchStrategy[Case]:
    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        lines = draw(st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=12)), min_size=1, max_size=6))
        command = ("chat", "m", "-n", "2", "--budget", "64", "--set", "window=2")
        return Case(command, {}, linked(folders[0]), b"\n".join(lines) + b"\n")

    return cases()


# -- command lines

OPTIONS = {  # of each command, with a value that it takes ("" for a flag)
    "generate": """--method=snapkv --preset=paper --window=2 --sinks=1 --protect=0:2 --interval=4 --granularity=query --gqa=max
        --alpha=0.5 --budget-by=global --prefill=chunked --prefill=a-shape:sinks=16:local=16 --chunk=8 -n=3 --temperature=0.5
        --top-k=5 --top-p=0.9 --min-p=0.1 --seed=3 --stop=x --dtype=bfloat16 --device=cpu --backend=sdpa --set=kernel_size=3
        --json= --no-chat= --check-weights= --budget=0.5 --prompt-file=m/config.json""".split(),
    "inspect": "--context=300 --budget=64 --dtype=bfloat16 --kept= --mask= --tokens=2 --out=kept.png".split(),
    "methods": "--bytes=m --context=300 --budget=64".split(),
    "chat": "--system=s --method=snapkv --budget=70 --prefill=chunked --no-template= --seed=3 -n=3 --set=window=2".split(),
    "bench": """--methods=random --budgets=12 --out=run --seed=3 --prefill=chunked --question=agnostic --markdown= --json=
        --windows=2""".split(),
}
VALUES = [
    *"""0 1 2 -1 8 64 0.5 1.5 nan inf -inf 1e400 99999999999999999999 a none auto m full restkv snapkv random restkv@paper x@y kv
    query mean max uniform global adakv pyramid chunked a-shape:sinks=1:local=2 flexprefill:gamma=nan 0:2 2:0 a:b window=2 window=
    = x=1 budget=4 float16 bfloat16 float32 cpu cuda meta sdpa / . nothing/here 1,2 4,4 8,8,8 -p --
    aware m/config.json""".split(),
    "",
    "[red]",
    "\x1b]52;c;x\x07",
    "\udce4",
    "é" * 300,
    "window=" + "[" * 3000,
]


READ = ("--windows", "1", "--context", "24", "--budgets", "12", "--methods", "random")
BENCHES = [
    ("report", "m"),
    ("ruler", "m", "--samples", "1", "--lengths", "300", "--methods", "random", "--tasks", "niah_single"),
    ("fidelity", "m", *READ, "--tail", "4", "--oracle", "0"),
    ("perplexity", "m", *READ, "--tokens", "4"),
    ("anli", "m"),
]


def _with_words(folders: list[Path]) -> st.SearchStrategy[Case]:
    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        name = draw(st.sampled_from(["generate", "generate", *OPTIONS]))
        words: list[str] = []
        for option in draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=3)):
            flag, _, value = option.partition("=")
            value = draw(st.sampled_from([value, value, value, draw(st.sampled_from(VALUES))]))
            words += [flag, value] if value else [flag]
        if draw(st.integers(0, 4)) == 4:
            words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(VALUES)))
        # Long runs are no fault: what bounds the work is given, unless the case gives it, and an option twice is refused.
        first, bounds = {
            "generate": (("m", "-p", "a b"), {"-n": "2", "--budget": "8", "--set": "window=2"}),
            "chat": (("m",), {"-n": "2", "--budget": "64"}),
            "inspect": (("m",), {}),
            "methods": ((), {}),
            "bench": (draw(st.sampled_from(BENCHES)), {}),
        }[name]
        base = [*first, *(word for flag, value in bounds.items() if flag not in words for word in (flag, value))]
        return Case((name, *base, *words), {}, linked(folders[0]), b"a\n")

    return cases()


def _plain(folders: list[Path]) -> list[Case]:
    return [Case(("generate", "m", *ASK), {}, linked(folder)) for folder in folders]


TARGETS = [
    Target("config", families_of, _with_config, _plain),
    Target("weights", families_of, _with_weights, _plain),
    Target("tokenizer", _tokenizers, _with_tokenizer, _plain),
    Target("template", _templated, _with_template, _plain, weight=0.2),  # many run into their limit of 2 s
    Target("chat", _templated, _with_lines, _plain),
    Target("command", _templated, _with_words, _plain),
    Target("saved", saved_ones, with_saved, as_saved),
    Target("run", runs, with_run, as_run),
]
assert set(FAMILIES) <= set(CASES)
