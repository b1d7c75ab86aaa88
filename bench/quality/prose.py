"""Filler text: short scenes from a village, in plain English, with no end and no numbers in it.

Sentences come from a seeded generator of our own wording. A scene has people who stay, a place and a time of day; within it
no sentence is used twice, so that the text reads like a story, and a model cannot skip it as a repeated line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from modeling.room import enough_memory, require
from restkv.errors import PromptError

MOST_MADE = 1 << 26  # tokens of all texts that a run makes before it begins
PER_TOKEN = 256  # bytes that a text takes at the least while it is made and encoded

# Things with names: they furnish the scenes, are what a needle marks, and are the words of the long lists.
NOUNS = (
    "anchor apron arrow axe bag barrel basket bell belt bench blanket boat book boot bottle bowl box brick bridge "
    "broom brush bucket button cabin cage candle cap card carpet cart chain chair chest chisel clock coat coin comb "
    "compass cord crate crown cup curtain desk dish door drawer drum envelope fan feather fence fiddle flag flask floor "
    "flute fork frame funnel gate glass glove hammer harp hat hinge hook horn hose jar jug kettle key kite knife ladder "
    "lamp lantern latch ledger lens letter lid lock loom map mask mat mirror mug nail napkin needle net notebook oar oven "
    "paddle pail pan pen pencil pillow pipe plank plate plough pot pouch pump purse quilt rake ribbon ring "
    "rope rug sack saddle sail saw scarf shawl shelf shell shield shoe shovel sieve sign sledge spade spoon "
    "stamp stool stove suitcase sword table tent thread ticket tile tin tool towel tower toy tray trunk umbrella "
    "vase vest violin wagon wallet watch wheel whistle window"
).split()
ADJECTIVES = (
    "amber ancient black blue bold brass bright broken brown carved cheap clean copper cracked crooked dark dusty empty "
    "faded fine flat gentle gilded golden green grey heavy hollow iron large leather light little lost narrow new noisy "
    "old orange painted pale pink plain polished purple quiet red rough round rusty sharp shiny silver small smooth soft "
    "square stone striped tall thick thin tiny torn white wide wooden yellow"
).split()
SYLLABLES = "ba do fi ga ju ka li mo na pe ri su ta vo wi zu".split()
# Words that no language has, such as "kari".
CODED_WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]

WOMEN = "Alma Clara Edith Greta Hanna Ida Lotte Marta Nora Olga Rosa Vera".split()
MEN = "Albert Bruno Emil Felix Hugo Jonas Karl Leo Otto Paul Rolf Simon".split()
PLACES = (
    "bakery barn bridge chapel church courtyard dairy farm ferry forge garden hall harbour inn library market meadow mill "
    "museum orchard park quarry school shop square stable station theatre village well yard"
).split()
SLOTS = {
    "animal": "cat cow crow dog donkey duck fox goat goose hare hen horse mouse owl pony sheep sparrow swan".split(),
    "food": "apples bread butter carrots cheese cherries cream honey onions pears plums soup".split(),
    "trade": "baker butcher carpenter doctor farmer ferryman gardener miller painter potter shepherd tailor".split(),
    "sky": "clear cloudy cold dry foggy grey hot mild windy".split(),
    "mood": "calm cheerful curious glad hungry patient proud silent sleepy tired worried".split(),
    "thing": NOUNS,
    "other": NOUNS,
}
TIMES = (
    "Early in the morning",
    "After breakfast",
    "Before noon",
    "At midday",
    "Late in the afternoon",
    "In the evening",
    "Shortly before dark",
    "On the first day of spring",
    "On a Sunday in summer",
    "One day in autumn",
    "In the middle of winter",
    "The day after the fair",
)
OPENINGS = (
    "{when}, {who} walked from the {place} to the {there}.",
    "{when}, {who} opened the door of the {place} and looked up at the sky.",
    "{when}, {who} and {friend} met in front of the {place}.",
    "{when}, a stranger came to the {place} and asked for {who}.",
    "{when}, the bell of the {place} rang, and {who} put down the {thing}.",
    "{when}, it was so quiet at the {place} that {who} could hear a {animal} far away.",
    "{when}, {who} found out that the {there} was closed.",
    "{when}, there was a letter for {who} at the {place}.",
    "{who} had worked at the {place} for many years and knew everybody there.",
    "{who} was the first to notice that something at the {place} had changed.",
    "Nobody at the {place} had seen {who} since the last harvest.",
    "The way from the {place} to the {there} is not long, but {who} took the whole day for it.",
)
MIDDLES = (
    "The day was {sky}, and the road to the {there} was empty.",
    "{She} carried {food} in a bag and was in no hurry.",
    "On the wall beside the door hung a {thing} that nobody used any more.",
    '"You are late," said {friend}, but {she} only smiled.',
    '"Have you seen the {trade}?" asked {friend}.',
    '"I would rather stay here," said {who}, "and wait until the rain is over."',
    '"That {thing} belonged to my mother," said {who} to {friend}.',
    "{friend} did not answer and went on mending the {thing}.",
    "They talked about the price of {food} and about the weather.",
    "A {animal} slept in the shade and took no notice of them.",
    "From the {there} came the sound of someone playing an old song.",
    "The {trade} had left a {thing} on the steps and would come back for it.",
    "{She} had promised to bring the {thing} back before the end of the week.",
    "In a corner stood a {thing}, and next to it a {other}.",
    "{friend} had once wanted to become a {trade}, but that was long ago.",
    "Whoever came by stopped for a moment and asked how things were.",
    "The children of the {trade} ran past and chased a {animal} across the yard.",
    "{She} counted the steps to the gate, as {she} had always done as a child.",
    "It smelled of {food} and of wet wood.",
    "{who} cut some bread and gave half of it to {friend}.",
    "Behind the {place} the grass was high, and the {animal} could hide in it.",
    "The {thing} was heavy, so they carried it together.",
    "{friend} knew a shorter way, but it led through deep mud.",
    "For a while neither of them said a word.",
    "Then {she} laughed, because the {animal} had stolen a {thing}.",
    "The {trade} shook his head and said that it could not be repaired.",
    "{She} felt {mood} and did not know why.",
    "At the {there} they were selling {food} that day.",
    "Someone had painted the door of the {place} a second time.",
    "The smoke rose straight up, which is a good sign in these parts.",
    "{friend} wrote everything down in order to forget nothing.",
    "{who} turned the {thing} in {her} hands and put it back on the shelf.",
    "Two women from the {there} wanted to know who had rung the bell.",
    "The old {trade} told them how the {place} had been built.",
    "The {trade} spoke slowly, as if every word had to be paid for.",
    "A cart full of {food} stood in the way, and the horse would not move.",
    "The {animal} watched all this from behind the fence of the {place}.",
    "{She} would have liked to buy the {thing}, but it was not for sale.",
    "Between the {place} and the {there} there is a small stream without a name.",
    "{friend} washed the {thing} in it and left it in the sun to dry.",
    "The wind grew stronger and blew leaves into the open door.",
    "It took them some time to find the {thing} under all the leaves.",
    "{who} asked for a glass of water and sat down on the bench.",
    "The {trade} had three sons, and none of them liked {food}.",
    "Nobody could say where the {animal} had come from.",
    "On the way back {she} met {friend}, who looked {mood}.",
    "They agreed to meet again at the {there} as soon as the work was done.",
    "{She} knew this story well and listened all the same.",
    "There was a crack in the {thing}, so fine that one could hardly see it.",
    "The lamp was lit early, for the days were getting shorter.",
    "{friend} had brought a {thing} and a bag of {food}.",
    "Since then the {place} has had a new roof and a better door.",
    "{who} had never seen such a big {animal} before.",
    "The first guests were {mood}, the last ones only tired.",
    "Under the window lay a {thing} that must have fallen down in the night.",
    "{She} leaned {her} bag against the fence and knocked.",
    "Upstairs somebody was moving a {thing} across the floor.",
    "It was the {trade} who had the idea of asking at the {there}.",
    "{friend} believed every word of it, and {who} did not.",
    "The soup was already cold when they came to the table.",
)
ENDINGS = (
    "So the day ended better than it had begun.",
    "After that they all went home, and the {place} was quiet again.",
    "{who} kept the {thing} and never spoke of it.",
    "That was all that happened at the {place} that day.",
    "When it was dark, {friend} closed the door and went to bed.",
    "{She} thought about it for a long time afterwards.",
    "The next morning the {animal} was gone.",
    "In the end {friend} was right about the {thing}.",
    "They still laugh about it at the {there}.",
    "{who} was {mood} and slept well that night.",
)
# Short sentences of many lengths, which bring a text to the length it was asked for.
PADS = (
    "Rain fell.",
    "Nobody spoke.",
    "It was late.",
    "The wind turned.",
    "A door closed.",
    "Nothing else happened.",
    "The fire was out.",
    "They waited a while.",
    "It was a quiet day.",
    "The road was long and dry.",
    "Somewhere a dog began to bark.",
    "The sun came out again after that.",
    "There was not much left to say now.",
    "The light in the hall went on and off.",
    "All of this took place a long time ago now.",
    "It may be that somebody else would tell it in another way.",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of one scene after the other, without end."""
    while True:
        people = [(name, "she", "her") for name in WOMEN] + [(name, "he", "his") for name in MEN]
        (who, she, her), (friend, _, _) = rng.sample(people, 2)
        place, there = rng.sample(PLACES, 2)
        fixed = {"who": who, "she": she, "She": she.capitalize(), "her": her, "friend": friend, "place": place}
        fixed |= {"there": there, "when": rng.choice(TIMES)}
        plan = [rng.choice(OPENINGS), *rng.sample(MIDDLES, rng.randint(5, 10)), rng.choice(ENDINGS)]
        for template in plan:
            sentence = template.format(**fixed, **{name: rng.choice(words) for name, words in SLOTS.items()})
            yield re.sub(r"(?<!\S)a (?=[aeiou])", "an ", sentence)


def listing(words: list[str] | tuple[str, ...]) -> str:
    """The words as a sentence lists them: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def require_room(tokens: int, at_once: int | None = None) -> None:
    """Refuse at once to make texts of so many tokens, `at_once` of them a single text (None: all).

    Raises:
        PromptError: nobody would wait for them. TooLargeError: there is not enough memory.
    """
    if tokens > MOST_MADE:
        raise PromptError(f"texts of {tokens} tokens would have to be made first, at most {MOST_MADE}; ask for less")
    with enough_memory(f"make texts of {tokens:,} tokens", "ask for shorter ones, or for fewer"):
        require(PER_TOKEN * (tokens if at_once is None else at_once))
