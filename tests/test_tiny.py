"""The checkpoint that ships: the stories it learned from, its training, and what it can do."""

from __future__ import annotations

import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

import restkv
from bench import train_tiny
from bench.stories import COLOURS, VALUES, story, text_of
from restkv.options import TINY

TOLD = re.compile(r"(\w+)'s ([\w ]+?) is (\w+)\.|(\w+) has a (\w+) (\w+)\.")


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(TINY)


def question_of(text: str) -> list[tuple[tuple[str, str], str]]:
    """Every (name, topic) and the value told of it, in the order of a story."""
    facts = []
    for name, topic, value, name2, value2, topic2 in TOLD.findall(text):
        facts.append(((name or name2, topic or topic2), value or value2))
    return facts


# -- stories


def test_stories_repeat_and_never_contradict_themselves() -> None:
    assert text_of(3, 0.5) == text_of(3, 0.5) != text_of(4, 0.5)
    for seed in range(50):
        told: dict[tuple[str, str], str] = {}
        for key, value in question_of(text_of(seed, 0.3)):
            assert value in VALUES[key[1]]
            assert told.setdefault(key, value) == value


def test_marked_pieces_are_values_told_before_with_their_rivals() -> None:
    marked = 0
    for seed in range(50):
        before = ""
        for text, rivals in story(random.Random(seed), 40, 0.3):
            if rivals is not None:
                marked += 1
                name, topic = re.findall(r"(\w+)'s ([\w ]+?) is$", before)[-1]
                told = dict(question_of(before))
                assert told[name, topic] == text.strip()
                sort = {value for (_, other), value in told.items() if VALUES[other] is VALUES[topic]}
                assert rivals == len(sort) - 1
            before += text
    assert marked > 100


def test_filler_sets_the_share_of_sentences_about_nothing() -> None:
    def facts(filler: float) -> int:
        return sum(len(question_of(text_of(seed, filler))) for seed in range(20))

    assert facts(0.9) < facts(0.5) < facts(0.1)


def test_rows_hold_whole_stories_and_mark_their_values(lm: restkv.LM) -> None:
    assert lm.tokenizer is not None
    tokenizer = train_tiny.make_tokenizer(lm.config.vocab_size)
    ids, rivals = train_tiny.Stories(tokenizer, seed=1).batch(4, 200, 0.3)
    assert ids.shape == rivals.shape == (4, 201)
    assert (ids[:, 0] == tokenizer.token_to_id(train_tiny.BOS)).all()
    values = {value for sort in VALUES.values() for value in sort}
    marked = ids[rivals >= 0].tolist()
    assert len(marked) > 20 and all(tokenizer.decode([token]).strip() in values for token in marked)
    assert all(lm.tokenizer.decode([token]) == tokenizer.decode([token]) for token in marked)


# -- the shipped folder


def test_it_is_small_and_groups_its_queries(lm: restkv.LM) -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 2e6
    assert lm.config.group >= 2 and lm.dtype == torch.float32


def test_transformers_loads_it_and_says_the_same(lm: restkv.LM) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer((TINY / "story.txt").read_text().strip(), return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == lm.encode((TINY / "story.txt").read_text().strip())
    assert (reference(ids).logits[0] - lm.logits(ids[0].tolist())).abs().max() < 1e-3
    assert reference.dtype == torch.float32


def test_it_remembers_a_fact_and_so_does_its_compressed_cache(lm: restkv.LM) -> None:
    """One fact in a story of some 500 tokens, asked at the end.

    The prompt stops two words before the value: the word after the prompt still comes from the whole of it, and the value
    is the first thing that is read from what a method kept.
    """
    right = {"full": 0, "restkv": 0, "streamingllm": 0}
    rng, rounds = random.Random(5), 12
    for _ in range(rounds):
        name, thing, colour = rng.choice(("Lily", "Tom")), rng.choice(("ball", "kite")), rng.choice(COLOURS)
        filler = "".join(text for text, _ in story(rng, 50, 1.0)[2:-1])
        prompt = f"There was a happy girl named {name}. {name} has a {colour} {thing}.{filler} {name}'s {thing}"
        assert 400 < len(lm.encode(prompt)) < 600
        for method in right:
            policy = restkv.get_policy(method, **({} if method == "full" else {"budget": 64}))
            right[method] += lm.generate(prompt, policy, max_new_tokens=2).text == f" is {colour}"
    assert right["full"] >= 0.9 * rounds
    assert right["restkv"] >= 0.75 * rounds
    assert right["streamingllm"] <= 0.4 * rounds  # it has evicted the fact


def test_the_example_prompt_is_answered_from_the_compressed_cache(lm: restkv.LM) -> None:
    prompt = (TINY / "story.txt").read_text().strip()
    answer = lm.generate(prompt, restkv.ReSTKV(budget=64), max_new_tokens=3)
    assert "Lily has a purple ball." in prompt and answer.text == " is purple."
    assert answer.stats.kept[0][0] < 70 < 400 < answer.stats.seen[0]


# -- training


@pytest.mark.slow
def test_training_learns_and_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_tiny", "--folder", str(tmp_path), "--scale", "0.06"])
    train_tiny.main()
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 4.5  # it starts at ln 704 = 6.6
    assert restkv.load(tmp_path).generate("Once upon a time", restkv.FullCache(), max_new_tokens=5).tokens
