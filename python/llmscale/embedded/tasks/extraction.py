"""JSON extraction: a sentence about a person, an order or an event becomes one JSON object on one line.

The key is the sentence, and the values are drawn from so many combinations that held-out sentences are unseen.
Answers are compact `json.dumps` with a space after each colon and comma, as Python writes by default. O(1) per item.
"""

import json
import random

from llmscale.embedded.tasks.item import Item
from llmscale.embedded.tasks.vocabulary import CITIES, COLOURS, FRUITS, JOBS, NAMES, OBJECTS

_ASK = ("Extract JSON: {x}", "Give me JSON: {x}", "Turn this into JSON: {x}", "Make JSON from this: {x}")


def _person(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    name, age, city, job = rng.choice(NAMES), rng.randint(18, 89), rng.choice(CITIES), rng.choice(JOBS)
    kind = rng.randrange(5)
    if kind == 0:
        return f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}
    if kind == 1:
        return f"{name} from {city} is {age}.", {"name": name, "age": age, "city": city}
    if kind == 2:
        return f"{name} works as a {job} in {city}.", {"name": name, "job": job, "city": city}
    if kind == 3:
        return f"In {city} lives {name}, a {job}.", {"name": name, "job": job, "city": city}
    return f"{name}, {age}, is a {job}.", {"name": name, "age": age, "job": job}


def _order(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    name, count, price = rng.choice(NAMES), rng.randint(2, 60), rng.randint(2, 99)
    if rng.random() < 0.5:
        fruit = rng.choice(FRUITS)
        return f"{name} bought {count} pieces of {fruit} for {price} dollars.", {
            "name": name,
            "item": fruit,
            "count": count,
            "price": price,
        }
    thing, colour = rng.choice(OBJECTS), rng.choice(COLOURS)
    return f"{name} wants a {colour} {thing} for {price} dollars.", {
        "name": name,
        "item": thing,
        "color": colour,
        "price": price,
    }


def _event(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    event = rng.choice(("meeting", "concert", "party", "lesson", "match"))
    day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    hour, city = rng.randint(7, 22), rng.choice(CITIES)
    if rng.random() < 0.5:
        return f"The {event} is on {day} at {hour} in {city}.", {"event": event, "day": day, "hour": hour, "city": city}
    return f"On {day} there is a {event} in {city}.", {"event": event, "day": day, "city": city}


def extract_json(rng: random.Random) -> Item:
    sentence, fields = rng.choice((_person, _person, _order, _event))(rng)
    question = rng.choice(_ASK).format(x=sentence)
    return Item((question,), json.dumps(fields), "extract_json", sentence, min(2, len(fields) - 3))
