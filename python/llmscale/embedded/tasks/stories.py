"""Small stories from a template grammar: a hero, a place, a wish or a trouble, a friend, an end.

Stories have no single right answer, so they are trained and sampled but not graded. The grammar gives more than
10^12 stories, so that a completion of "Once upon a time" reads as English without being memorized. O(1).
"""

import random

from llmscale.embedded.tasks.item import Item
from llmscale.embedded.tasks.vocabulary import ANIMALS, COLOURS, NAMES, OBJECTS

_SIZES = ("little", "small", "big", "young", "old", "brave", "shy", "clever", "kind", "funny", "lazy", "curious")
_PLACES = (
    "forest",
    "village",
    "garden",
    "valley",
    "quiet town",
    "house by the sea",
    "castle",
    "farm",
    "cave",
    "city by the river",
    "hut on a hill",
)
_OPENINGS = (
    "Once upon a time there was a {size} {hero} named {name}.",
    "Once upon a time, a {size} {hero} named {name} lived in a {place}.",
    "Long ago, in a {place}, there lived a {size} {hero} called {name}.",
    "There once was a {size} {hero} who lived in a {place}. The name of the {hero} was {name}.",
    "{name} was a {size} {hero} who lived in a {place}.",
    "In a {place} lived a {size} {hero} named {name}.",
)
_HABITS = (
    "Every day {name} liked to {play}.",
    "{name} loved to {play} and to {play2}.",
    "In the morning {name} went out to {play}.",
    "{name} had a {colour} {thing} and took it everywhere.",
    "All the animals liked {name}, because {name} was always {mood}.",
    "But {name} was often {sad}, because nobody wanted to {play}.",
)
_PLAYS = (
    "play in the sun", "sing songs", "swim in the lake", "climb trees", "look at the stars", "run in the rain",
    "read books", "dance", "bake bread", "pick flowers", "tell stories",
    "sleep under a tree", "count the clouds", "jump over stones",
)  # fmt: skip
_MOODS = ("happy", "kind", "friendly", "cheerful", "polite", "helpful")
_SADS = ("sad", "lonely", "tired", "bored", "afraid")
_TROUBLES = (
    "One day {name} lost the {colour} {thing}. {name} looked everywhere, but it was gone.",
    "One day a great storm came, and {name} could not find the way home.",
    "One morning {name} found a {colour} {thing} near the {spot}. Whose could it be?",
    "One night {name} heard a strange sound from the {spot}.",
    "Then winter came, and there was nothing left to eat.",
    "One day {name} saw a {size2} {friend} who was crying by the {spot}.",
    "One day {name} fell into a deep hole near the {spot} and could not get out.",
    "One evening a {size2} {friend} came to the door and asked for help.",
    "One day {name} wanted to see the world and walked far away.",
)
_SPOTS = ("river", "old tree", "lake", "bridge", "mill", "well", "road", "big stone", "hill", "gate")
_MEETINGS = (
    "Then a {size2} {friend} named {name2} came by.",
    "There {name} met {name2}, a {size2} {friend}.",
    "{name} asked {name2}, the {size2} {friend}, what to do.",
    "Just then {name2} the {friend} walked past.",
)
_TALKS = (
    '"Do not worry," said {name2}. "I will help you."',
    '"Why are you so {sad}?" asked {name2}. "Come, let us look together."',
    '"Hello," said {name2}. "Would you like to be my friend?"',
    '"I am {sad} too," said {name2}. "Shall we {play2}?"',
    '"Please help me," said {name}. "Of course," said {name2} with a smile.',
    '"I know what to do," said {name2}. "Follow me."',
)
_ACTIONS = (
    "They walked through the {place} all day and all night.",
    "They worked together, and soon the work was done.",
    "They looked under every stone, and at last they found the {colour} {thing}.",
    "They shared their bread and sat down by the {spot}.",
    "{name2} gave {name} a {colour2} {thing2}, and {name} was very {happy}.",
    "Step by step they found the way back to the {place}.",
    "{name} was afraid at first, but {name2} was brave.",
)
_HAPPIES = ("happy", "glad", "proud", "thankful", "surprised")
_ENDS = (
    "From that day on, {name} and {name2} were best friends.",
    "And they lived happily ever after.",
    "In the evening they went home and were {happy}.",
    "{name} was never {sad} again.",
    "And every year they met by the {spot} and laughed about that day.",
    "So {name} learned that it is good to have a friend.",
    "{name} thanked {name2}, and they danced until the moon came up.",
    "After that, they liked to {play2} together every day.",
)
_ASKS = (
    "Tell me a story about a {hero}.",
    "Tell me a small story about a {hero}.",
    "Write a story about a {hero}.",
    "A story about a {hero}, please.",
)
_ASKS_NAMED = (
    "Tell me a story about {name}.",
    "Write a story about {name} the {hero}.",
    "Tell me a story about a {hero} named {name}.",
)
_ASKS_ANY = ("Tell me a story.", "Please tell me a story.", "Write a short story.", "Can you tell me a story?")


def _scene(rng: random.Random) -> dict[str, str]:
    hero, friend = rng.sample((*ANIMALS, "boy", "girl", "king", "queen", "dragon", "giant"), 2)
    name, name2 = rng.sample(NAMES, 2)
    play, play2 = rng.sample(_PLAYS, 2)
    thing, thing2 = rng.sample(OBJECTS, 2)
    colour, colour2 = rng.sample([c for c in COLOURS if c != "orange"], 2)
    size, size2 = rng.sample([s for s in _SIZES if s != "old"], 2)
    return {
        "hero": hero, "friend": friend, "name": name, "name2": name2, "play": play, "play2": play2, "thing": thing,
        "thing2": thing2, "colour": colour, "colour2": colour2, "size": size, "size2": size2,
        "place": rng.choice(_PLACES),
        "spot": rng.choice(_SPOTS), "mood": rng.choice(_MOODS), "sad": rng.choice(_SADS), "happy": rng.choice(_HAPPIES),
    }  # fmt: skip


def _tell(rng: random.Random, scene: dict[str, str]) -> str:
    parts = [
        rng.choice(_OPENINGS),
        rng.choice(_HABITS),
        rng.choice(_TROUBLES),
        rng.choice(_MEETINGS),
        rng.choice(_TALKS),
    ]
    parts += rng.sample(_ACTIONS, rng.randint(1, 2))
    parts += [rng.choice(_ENDS)]
    return " ".join(part.format(**scene) for part in parts)


def story_text(rng: random.Random) -> str:
    """A story as plain text, for documents without a chat."""
    return _tell(rng, _scene(rng))


def story(rng: random.Random) -> Item:
    scene = _scene(rng)
    question = rng.choice(rng.choice((_ASKS, _ASKS_NAMED, _ASKS_ANY))).format(**scene)
    return Item((question,), _tell(rng, scene), "story", question)
