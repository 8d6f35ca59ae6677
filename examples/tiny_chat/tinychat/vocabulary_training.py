"""Trains the byte-level BPE vocabulary of 2,048 tokens on generated text.

Digits stay single tokens, because a tiny model learns column arithmetic only if a column is a token. Punctuation
before a digit keeps its trailing space (", 4" is two tokens, not three), which shortens lists by a fifth.
About 30 s for 60,000 items; deterministic for a seed. Knows nothing of the model.
"""

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmscale.embedded.tasks import TASKS, sample
from llmscale.embedded.tasks.stories import story_text
from tinychat.chat_format import SPECIAL_TOKENS

VOCABULARY_TOKENS = 2048
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+ (?=\p{N})| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _texts(items_per_task: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for task in TASKS:
        for _ in range(items_per_task):
            item = sample(task, rng, test=False)
            yield from item.turns
            yield item.answer
            yield "user\n"
            yield "assistant\n"
    for _ in range(items_per_task):
        yield story_text(rng)


def train_tokenizer(items_per_task: int = 3000, seed: int = 1) -> Tokenizer:
    """A byte-level BPE tokenizer with the special tokens at ids 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(items_per_task, seed), trainer)
    return tokenizer
