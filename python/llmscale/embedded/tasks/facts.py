"""Short questions about small tables of facts: capitals, colours, sounds, calendars, opposites, numbers in words.

A fact cannot be derived, so the key is the exact question: a held-out item asks a known fact in an unseen pairing of
fact and wording. Answers are one short sentence or one word, fixed by the wording. O(1) per item; a fact is one line.
"""

import random

from llmscale.embedded.tasks.item import Item

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Norway": "Oslo", "Ireland": "Dublin", "Greece": "Athens", "Egypt": "Cairo", "Japan": "Tokyo", "Poland": "Warsaw",
    "Finland": "Helsinki", "Hungary": "Budapest", "England": "London", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Russia": "Moscow", "China": "Beijing", "Canada": "Ottawa", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana",
    "Belgium": "Brussels", "Turkey": "Ankara", "Argentina": "Buenos Aires", "Australia": "Canberra",
    "India": "New Delhi",
}  # fmt: skip

COLOUR_OF = {
    "grass": "green", "snow": "white", "the sky": "blue", "a lemon": "yellow", "coal": "black", "blood": "red",
    "milk": "white",
    "a carrot": "orange", "chocolate": "brown", "a frog": "green", "the sun": "yellow", "a tomato": "red",
    "an elephant": "grey",
    "a cherry": "red", "a banana": "yellow", "the sea": "blue", "a raven": "black", "a pig": "pink",
}  # fmt: skip

SOUND_OF = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "lion": "roar",
    "owl": "hoot",
    "snake": "hiss", "horse": "neigh", "bee": "buzz", "frog": "ribbit", "mouse": "squeak", "wolf": "howl",
    "hen": "cluck",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "high": "low", "old": "new", "happy": "sad", "light": "dark",
    "hard": "soft",
    "full": "empty", "open": "closed", "early": "late", "strong": "weak", "rich": "poor", "near": "far", "wet": "dry",
    "good": "bad",
    "loud": "quiet", "day": "night", "left": "right", "up": "down", "yes": "no", "true": "false", "long": "short",
    "wide": "narrow",
    "clean": "dirty", "first": "last", "cheap": "expensive", "easy": "difficult", "inside": "outside", "sweet": "sour",
}  # fmt: skip

YOUNG_OF = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "hen": "chick",
    "duck": "duckling",
    "bear": "cub", "frog": "tadpole", "goat": "kid", "pig": "piglet", "lion": "cub",
}  # fmt: skip

LEGS_OF = {
    "dog": 4, "cat": 4, "bird": 2, "spider": 8, "ant": 6, "bee": 6, "horse": 4, "snake": 0, "fish": 0, "duck": 2,
    "cow": 4,
}  # fmt: skip

PLURALS = {
    "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "goose": "geese", "man": "men",
    "woman": "women",
    "cat": "cats", "dog": "dogs", "box": "boxes", "leaf": "leaves", "city": "cities", "fish": "fish", "sheep": "sheep",
    "book": "books", "wolf": "wolves", "knife": "knives", "berry": "berries",
}  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
KINDS = {
    "apple": "fruit", "banana": "fruit", "pear": "fruit", "cherry": "fruit", "carrot": "vegetable",
    "potato": "vegetable",
    "onion": "vegetable", "dog": "animal", "tiger": "animal", "owl": "animal", "horse": "animal", "red": "color",
    "blue": "color",
    "green": "color", "piano": "instrument", "violin": "instrument", "guitar": "instrument",
    "chair": "piece of furniture",
    "table": "piece of furniture", "bed": "piece of furniture", "Paris": "city", "London": "city", "Tokyo": "city",
}  # fmt: skip
GENERAL = {
    "How many days are in a week?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "How many hours are in a day?": "There are 24 hours in a day.",
    "How many minutes are in an hour?": "There are 60 minutes in an hour.",
    "How many letters are in the alphabet?": "There are 26 letters in the alphabet.",
    "What do bees make?": "Bees make honey.",
    "What do cows give us?": "Cows give us milk.",
    "What do plants need to grow?": "Plants need water, light and air to grow.",
    "What is ice?": "Ice is frozen water.",
    "What is the largest planet?": "The largest planet is Jupiter.",
    "Which planet do we live on?": "We live on Earth.",
    "What is the largest ocean?": "The largest ocean is the Pacific Ocean.",
    "What shines at night?": "The moon and the stars shine at night.",
    "What is the capital city?": "Please tell me the country.",
    "How many colors are in a rainbow?": "There are seven colors in a rainbow.",
    "What do we use to write?": "We use a pen to write.",
    "Where do fish live?": "Fish live in water.",
    "What do we drink when we are thirsty?": "We drink water when we are thirsty.",
    "How many wheels does a car have?": "A car has four wheels.",
    "How many sides does a triangle have?": "A triangle has three sides.",
    "How many sides does a square have?": "A square has four sides.",
    "Who bakes bread?": "A baker bakes bread.",
    "Who works in a hospital?": "Doctors and nurses work in a hospital.",
    "Which season comes after winter?": "Spring comes after winter.",
    "Which season comes after spring?": "Summer comes after spring.",
    "Which season comes after summer?": "Autumn comes after summer.",
    "Which season comes after autumn?": "Winter comes after autumn.",
}
_PREFIXES = ("", "", "Please tell me: ", "Question: ", "Quick question: ", "Hi! ", "I have a question. ")


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def capital(rng: random.Random) -> tuple[str, str]:
    country, city = rng.choice(tuple(CAPITALS.items()))
    return rng.choice(
        (
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Capital of {country}?", city),
            (f"Name the capital of {country}.", city),
            (f"Tell me the capital of {country}.", f"The capital of {country} is {city}."),
            (f"Which country has the capital {city}?", f"{city} is the capital of {country}."),
            (f"{city} is the capital of which country?", country),
        )
    )


def nature(rng: random.Random) -> tuple[str, str]:
    thing, colour = rng.choice(tuple(COLOUR_OF.items()))
    animal, sound = rng.choice(tuple(SOUND_OF.items()))
    parent, young = rng.choice(tuple(YOUNG_OF.items()))
    legged, legs = rng.choice(tuple(LEGS_OF.items()))
    return rng.choice(
        (
            (f"What color is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}."),
            (f"Which color does {thing} have?", colour),
            (
                f"What sound does {_article(animal)} {animal} make?",
                f"{_article(animal).capitalize()} {animal} goes {sound}.",
            ),
            (f"Which animal goes {sound}?", f"The {animal} goes {sound}."),
            (f"What is a baby {parent} called?", f"A baby {parent} is called a {young}."),
            (f"Young {parent}?", young),
            (f"How many legs does {_article(legged)} {legged} have?", str(legs)),
        )
    )


def language(rng: random.Random) -> tuple[str, str]:
    word, opposite = rng.choice(tuple(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, opposite = opposite, word
    single, plural = rng.choice(tuple(PLURALS.items()))
    thing, kind = rng.choice(tuple(KINDS.items()))
    number = rng.randrange(21)
    return rng.choice(
        (
            (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
            (f"Opposite of {word}?", opposite),
            (f"What is the plural of {single}?", plural),
            (f"Plural of {single}?", plural),
            (f"Is {thing} a fruit, an animal or something else?", f"{thing} is {_article(kind)} {kind}."),
            (f"What kind of thing is {thing}?", f"{thing} is {_article(kind)} {kind}."),
            (f"Write {number} in words.", NUMBERS[number]),
            (f"Write {NUMBERS[number]} as a number.", str(number)),
        )
    )


def calendar(rng: random.Random) -> tuple[str, str]:
    table = rng.choice((DAYS, MONTHS))
    noun = "day" if table is DAYS else "month"
    place = rng.randrange(len(table))
    now, after, before = table[place], table[(place + 1) % len(table)], table[place - 1]
    letter = rng.randrange(25)
    return rng.choice(
        (
            (f"What {noun} comes after {now}?", after),
            (f"Which {noun} follows {now}?", after),
            (f"What {noun} comes before {now}?", before),
            (f"Which {noun} is before {now}?", before),
            (f"What letter comes after {chr(65 + letter)}?", chr(66 + letter)),
            (f"Which letter follows {chr(65 + letter)}?", chr(66 + letter)),
        )
    )


def general(rng: random.Random) -> tuple[str, str]:
    return rng.choice(tuple(GENERAL.items()))


def answer_fact(rng: random.Random) -> Item:
    question, answer = rng.choice((capital, capital, nature, nature, language, language, calendar, general))(rng)
    question = rng.choice(_PREFIXES) + question
    return Item((question,), answer, "facts", question)
