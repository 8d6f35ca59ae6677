"""Exact match of greedy answers on unseen items, per task.

An item counts when the generated text, up to the end token, equals the answer exactly. Items come from fixed seeds and
the test split alone, and no question is asked twice. Cost is that of decoding; prompts are grouped by length.
"""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from llmscale.embedded.tasks import TASKS, Item
from tinychat.chat_format import END_ID, END_OF_TEXT_ID, ChatEncoder
from tinychat.decode import greedy
from tinychat.model import LlamaWeights

MAX_ANSWER_TOKENS = 96
MAX_ROWS = 256
"""Rows decoded together: more gives no speed on two cores, and needs memory."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One answered item."""

    item: Item
    given: str

    @property
    def right(self) -> bool:
        return self.given == self.item.answer


def answer_items(weights: LlamaWeights, tokenizer: Tokenizer, items: Sequence[Item], *, workers: int) -> list[Graded]:
    """Greedy answers, in order of the prompts' lengths; every worker decodes whole batches in one thread."""
    encoder = ChatEncoder(tokenizer)
    by_length: dict[int, list[tuple[Item, tuple[int, ...]]]] = defaultdict(list)
    for item in items:
        prompt = encoder.item(item).prompt
        by_length[len(prompt)].append((item, prompt))
    parts = [
        rows[start : start + MAX_ROWS]
        for _, rows in sorted(by_length.items())
        for start in range(0, len(rows), MAX_ROWS)
    ]

    def answer(part: list[tuple[Item, tuple[int, ...]]]) -> list[Graded]:
        prompts = torch.tensor([ids for _, ids in part])
        outputs = greedy(weights, prompts, MAX_ANSWER_TOKENS, (END_ID, END_OF_TEXT_ID))
        texts = tokenizer.decode_batch(outputs, skip_special_tokens=False)
        return [Graded(item, text) for (item, _), text in zip(part, texts, strict=True)]

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [graded for answers in pool.map(answer, parts) for graded in answers]


def exact_match(graded: Sequence[Graded]) -> dict[str, tuple[int, int]]:
    """Per task, in the registry's order: (right, asked)."""
    counts = {task.name: [0, 0] for task in TASKS if task.graded}
    for answer in graded:
        counts[answer.item.task][0] += answer.right
        counts[answer.item.task][1] += 1
    return {name: (right, asked) for name, (right, asked) in counts.items() if asked}
