"""Writes the stories that the checkpoint in restkv/assets/tiny is trained on.

A story is filler around facts ("Mia has a gold kite.") that later sentences repeat ("Mia's kite is gold."), so a model must
look back for them: names, things and values are drawn anew for every story.
"""

from __future__ import annotations

import random

GIRLS = "Lily Mia Anna Sara Lucy Emma Rosie Ella Nora Ruby".split()
BOYS = "Tom Ben Max Sam Tim Jack Leo Finn Oscar Noah".split()
SYLLABLES = "ba do fi ga ju ka li mo na pe ri su ta vo wi zu".split()
COLOURS = "red blue green yellow pink black white brown purple grey silver gold".split()
FOODS = "bread soup cake honey rice cheese plums beans".split()
NUMBERS = "two three four five six seven eight nine".split()
VALUES = dict.fromkeys("ball kite hat book cup boat drum coat box bike lamp scarf".split(), COLOURS)
VALUES |= {"favourite food": FOODS, "lucky number": NUMBERS}
TELL, TELL_THING = "{name}'s {topic} is {value}.", "{name} has a {value} {topic}."
SLOTS = {
    "animal": "dog cat rabbit bird duck pony mouse frog".split(),
    "place": "park field river hill lake barn market school".split(),
    "mood": "happy sad tired proud brave hungry calm shy".split(),
}
OPENINGS = (
    "Once upon a time, there was a little {kind} named {name}.",
    "One day, a {kind} named {name} went to the {place}.",
    "There was a {mood} {kind} named {name}.",
)
MEETINGS = ("A {kind} named {name} came to the {place}.", "Soon a {mood} {kind} named {name} came along.")
FILLERS = (
    "{name} loved to play at the {place}.",
    "{He} saw a {animal} near the {place}.",
    "The {animal} was very {mood}.",
    "{He} ran to the {place} and laughed.",
    "The sun was warm and the sky was clear.",
    "It was a long day, and {name} was {mood}.",
    '"Hello," said {name} to the {animal}.',
    "The {animal} looked at {name} and smiled.",
    "{He} wanted to find the {animal}.",
    "Then the rain came and {name} went to the {place}.",
    "They walked to the {place} together.",
    "{name} and {friend} played near the {place} all day.",
    '"Look at the {animal}," said {friend}.',
    "The next day, {name} went back to the {place}.",
    "{He} told {friend} a story about a {animal}.",
    "They were good friends.",
    "The wind was cold, so they ran to the {place}.",
)
Piece = tuple[str, int | None]  # text; where it is a told value: how many other values of its sort the story has told


def story(rng: random.Random, sentences: int, filler: float) -> list[Piece]:
    """One story: so many sentences after the first two, `filler` of them about nothing in particular."""
    people: list[dict[str, str]] = []
    facts: dict[tuple[str, str], str] = {}
    pieces: list[Piece] = []

    def say(template: str, **slots: str) -> None:
        slots |= {name: rng.choice(words) for name, words in SLOTS.items()}
        pieces.append((" " * bool(pieces) + template.format(**slots), None))

    def introduce(templates: tuple[str, ...]) -> None:
        odd = ["".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize() for _ in range(4)]
        name = rng.choice([name for name in GIRLS + BOYS + odd if all(name != person["name"] for person in people)])
        girl = name in GIRLS or (name in odd and rng.random() < 0.5)
        people.append({"name": name, "kind": "girl" if girl else "boy", "He": "She" if girl else "He"})
        say(rng.choice(templates), **people[-1])

    def tell() -> None:
        key = rng.choice(people)["name"], rng.choice((*VALUES, "favourite food", "lucky number"))
        if key not in facts:
            facts[key] = rng.choice(VALUES[key[1]])
            template = TELL_THING if VALUES[key[1]] is COLOURS and rng.random() < 0.5 else TELL
            say(template, name=key[0], topic=key[1], value=facts[key])

    introduce(OPENINGS)
    tell()
    for _ in range(sentences):
        luck = rng.random()
        if luck < filler:
            person, friend = rng.choice(people), rng.choice(people)["name"]
            say(
                rng.choice([f for f in FILLERS if friend != person["name"] or "{friend}" not in f]),
                **person,
                friend=friend,
            )
        elif luck < filler + 0.55 * (1 - filler):
            (name, topic), value = rng.choice(list(facts.items()))
            say(TELL.removesuffix(" {value}."), name=name, topic=topic)
            rivals = {told for (_, other), told in facts.items() if VALUES[other] is VALUES[topic]} - {value}
            pieces.extend([(" " + value, len(rivals)), (".", None)])
        elif luck < 1 - 0.1 * (1 - filler) or len(people) == 4:
            tell()
        else:
            introduce(MEETINGS)
    say("The end.")
    return pieces


def text_of(seed: int, filler: float) -> str:
    """The text of one story."""
    return "".join(text for text, _ in story(random.Random(seed), 40, filler))
