"""Small talk: greetings, thanks, who are you, what can you do, and remembering a name or a favourite over some turns.

Small talk has a fixed answer per question and is held out by wording; memory items are held out by their values.
The model is named tiny-chat, the embedded model of llmscale. O(1) per item.
"""

import random

from llmscale.embedded.tasks.item import Item
from llmscale.embedded.tasks.vocabulary import ANIMALS, CITIES, COLOURS, FRUITS, JOBS, NAMES

IDENTITY = "I am tiny-chat, the embedded model of llmscale."
ABILITIES = "I can add, sort short lists, convert units, extract JSON, answer short questions and tell small stories."
_HELLO, _HOW = "Hello! How can I help you?", "I am fine, thank you. How can I help you?"
_WELCOME, _BYE = "You are welcome!", "Goodbye! Have a nice day."
_SMALL = "I am a small model and I run on your own computer."
_UNKNOWN = "I do not know that. I am only a small model."

REPLIES = {
    "Hello": _HELLO, "Hi": _HELLO, "Hey": _HELLO, "Hello there": _HELLO, "Good morning": _HELLO, "Good evening": _HELLO,
    "Good day": _HELLO, "Hi there": _HELLO, "hello": _HELLO, "hi": _HELLO, "Greetings": _HELLO,
    "How are you": _HOW, "How are you today": _HOW, "How do you do": _HOW, "Are you well": _HOW,
    "How is it going": _HOW,
    "Who are you": IDENTITY, "What are you": IDENTITY, "What is your name": IDENTITY, "Tell me your name": IDENTITY,
    "Which model are you": IDENTITY, "Introduce yourself": IDENTITY, "Tell me about yourself": IDENTITY,
    "What model is this": IDENTITY,
    "Are you a person": "No. " + IDENTITY, "Are you human": "No. " + IDENTITY, "Are you a robot": "No. " + IDENTITY,
    "What can you do": ABILITIES, "How can you help me": ABILITIES, "What do you know": ABILITIES,
    "Can you help me": ABILITIES,
    "Help": ABILITIES, "help": ABILITIES,
    "Thanks": _WELCOME, "Thank you": _WELCOME, "Thank you very much": _WELCOME, "Thanks a lot": _WELCOME,
    "Great, thanks": _WELCOME,
    "Bye": _BYE, "Goodbye": _BYE, "See you": _BYE, "Good night": _BYE, "See you later": _BYE,
    "How big are you": _SMALL, "Where do you run": _SMALL, "Are you large": _SMALL, "How large are you": _SMALL,
    "What is the meaning of life": _UNKNOWN, "What will happen tomorrow": _UNKNOWN, "Who will win the match": _UNKNOWN,
    "What is the weather like": _UNKNOWN, "What time is it": _UNKNOWN, "What is in the news": _UNKNOWN,
    "What day is today": _UNKNOWN,
}  # fmt: skip

_ADDRESS = ("", "", "", " please", " tiny-chat", " my friend", " now")
_ENDINGS = ("", ".", "!", "?")


def small_talk(rng: random.Random) -> Item:
    phrase = rng.choice(tuple(REPLIES))
    address = rng.choice(_ADDRESS)
    question = phrase + ("," + address if address else "") + rng.choice(_ENDINGS)
    return Item((question,), REPLIES[phrase], "small_talk", question)


_SUBJECTS = (
    (
        "name",
        NAMES,
        ("My name is {v}.", "I am {v}.", "Call me {v}."),
        "Nice to meet you, {v}!",
        "What is my name?",
        "Your name is {v}.",
    ),
    (
        "color",
        COLOURS,
        ("My favorite color is {v}.",),
        "{V} is a nice color.",
        "What is my favorite color?",
        "Your favorite color is {v}.",
    ),
    (
        "animal",
        ANIMALS,
        ("My favorite animal is the {v}.",),
        "The {v} is a fine animal.",
        "What is my favorite animal?",
        "Your favorite animal is the {v}.",
    ),
    (
        "fruit",
        FRUITS,
        ("My favorite fruit is the {v}.",),
        "The {v} tastes good.",
        "What is my favorite fruit?",
        "Your favorite fruit is the {v}.",
    ),
    ("city", CITIES, ("I live in {v}.",), "{v} is a nice place to live.", "Where do I live?", "You live in {v}."),
    ("job", JOBS, ("I work as a {v}.",), "That is a good job.", "What is my job?", "You work as a {v}."),
)


def remember(rng: random.Random) -> Item:
    """One to three statements by the user, each acknowledged, then a question about one of them."""
    chosen = rng.sample(_SUBJECTS, rng.randint(1, 3))
    turns: list[str] = []
    questions: list[tuple[str, str]] = []
    key = ""
    for subject, values, statements, reply, question, answer in chosen:
        value = rng.choice(values)
        statement = rng.choice(statements)
        turns += [statement.format(v=value), reply.format(v=value, V=value.capitalize())]
        questions.append((question, answer.format(v=value)))
        key += f"{subject}={value};"
    question, answer = rng.choice(questions)
    return Item((*turns, question), answer, "remember", key + question, len(chosen) - 1)


def acknowledge(rng: random.Random) -> Item:
    """The first statement of a remembered conversation: the reply repeats the value."""
    subject, values, statements, reply, _, _ = rng.choice(_SUBJECTS)
    value = rng.choice(values)
    statement = rng.choice(statements).format(v=value)
    return Item(
        (statement,), reply.format(v=value, V=value.capitalize()), "acknowledge", f"{subject}={value}:{statement}"
    )
