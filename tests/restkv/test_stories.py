"""The two commands of the first milestone on a real pretrained checkpoint, stories260k, as they are given there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import transformers

import restkv
from restkv.lm import LM
from restkv.policies import FullCache, ReSTKV, SnapKV

PROMPT = "Once upon a time, there was a little girl named Lily."
BEGINNING = "She loved to play outside in the park. One day, she saw a big, red ball."
SHORT = ReSTKV(budget=64, window=16, interval=16, budget_by="uniform")


@pytest.fixture(scope="module")
def eager(stories260k) -> LM:
    return restkv.load(stories260k, backend="sdpa")


@pytest.fixture(scope="module")
def compiled(stories260k):
    torch._dynamo.reset()
    yield restkv.load(stories260k, backend="flex")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def theirs(stories260k) -> list[int]:
    """transformers' greedy continuation, 100 tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(stories260k, attn_implementation="eager")
    ids = transformers.AutoTokenizer.from_pretrained(stories260k)(PROMPT, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :].tolist()


def distinct_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_the_full_cache_tells_transformers_story(backend, theirs, request):
    done = request.getfixturevalue(backend).generate(PROMPT, FullCache(), max_new_tokens=100, temperature=0)
    assert done.text.startswith(BEGINNING)
    assert done.tokens == theirs
    assert len(theirs) == 100
    assert done.stats.graphs == (backend == "compiled")


def test_a_short_cache_tells_a_story_of_400_tokens_with_two_graphs(eager, compiled):
    first = compiled.generate(PROMPT, SHORT, max_new_tokens=400, temperature=0)
    assert first.text.startswith(BEGINNING)
    assert len(first.tokens) == 400
    assert first.stats.max_kept == 64 + 16
    assert first.stats.evictions > 15
    assert first.stats.graphs == 2, "one of the step and one of the eviction"
    assert first.stats.evicts == "compiled"
    assert all(count <= 64 + 16 for layer in first.stats.kept for count in layer)
    assert first.stats.live_bytes < first.stats.full_bytes / 4
    # Still English: to the model with its full cache every word of it is likely, and few are of its own making.
    ids = eager.tokenizer.encode(PROMPT)
    logp_LV = eager.logits(ids + first.tokens).log_softmax(-1)[len(ids) - 1 : -1]
    assert float(logp_LV.gather(1, torch.tensor(first.tokens)[:, None]).mean()) > -0.8
    full = eager.generate(PROMPT, FullCache(), max_new_tokens=400)
    words = distinct_words(first.text)
    assert len(words) > 40
    assert len(words & distinct_words(full.text)) > 0.8 * len(words)

    again = compiled.generate("Tim and his mom went to the park. They saw a cat on a tree.", SHORT, max_new_tokens=60)
    assert again.stats.graphs == 0, "another prompt length, and another job, must not recompile"
    assert eager.generate(PROMPT, SHORT, max_new_tokens=400).tokens == first.tokens


def test_a_batch_of_stories_is_each_story_alone(eager):
    prompts = [
        PROMPT,
        "Tom had a dog. The dog was big and his name was",
        "One day, a bird sat in a tree near the house of Sue.",
    ]
    for policy in (SHORT, SnapKV(budget=32, window=8, interval=8)):
        batch = eager.generate(prompts, policy, max_new_tokens=70)
        for prompt, row in zip(prompts, batch, strict=True):
            alone = eager.generate(prompt, policy, max_new_tokens=70)
            assert row.tokens == alone.tokens
            assert row.text == alone.text


@pytest.mark.parametrize(
    ("options", "policy", "count"),
    [
        ("--method full", FullCache(), 100),
        ("--method restkv --budget 64 --window 16 --interval 16 --budget-by uniform", SHORT, 400),
    ],
    ids=["full", "restkv"],
)
def test_the_command_prints_the_story(options, policy, count, stories260k, eager):
    """As a user types it, in a process of its own."""
    arguments = ["generate", str(stories260k), "-p", PROMPT, *options.split(), "--max-new-tokens", str(count)]
    command = [sys.executable, "-m", "restkv", *arguments, "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(BEGINNING)
    assert done.stdout.strip() == eager.generate(PROMPT, policy, max_new_tokens=count).text.strip()
