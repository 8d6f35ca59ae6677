"""The generator of tiny-chat's text: answers are recomputed here by other means; the split and the tokenizer hold.

Method: a few hundred items per task from fixed seeds; the recomputation parses the question's text alone and shares no
code with the generator. The committed folder is checked against its own config. No model is run.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "tiny_chat"))
pytest.importorskip("torch", reason="tiny-chat is trained with torch")

from safetensors import safe_open  # noqa: E402
from tinychat.chat_format import END_ID, SPECIAL_TOKENS, ChatEncoder  # noqa: E402
from tinychat.dataset import BatchShape, BatchStream  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from llmscale.embedded import EMBEDDED_MODELS, UnknownEmbeddedModel, embedded_model_path  # noqa: E402
from llmscale.embedded.tasks import TASKS, Item, Task, is_test_key, sample  # noqa: E402
from llmscale.embedded.tasks.splits import unseen_items  # noqa: E402

ITEMS = 300
GRADED = tuple(task for task in TASKS if task.graded)


def items_of(task: Task, *, test: bool, seed: int = 11, count: int = ITEMS) -> list[Item]:
    rng = random.Random(seed)
    return [sample(task, rng, test=test) for _ in range(count)]


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def final_number(answer: str) -> int:
    return int(answer.rpartition(": ")[2])


def working_is_right(answer: str) -> bool:
    """Every `x+y+1=z` of a working holds."""
    for left, right in re.findall(r"([\d+*-]+)=(\d+)", answer):
        terms = re.split(r"([+*-])", left)
        value = int(terms[0])
        for operator, term in zip(terms[1::2], terms[2::2], strict=True):
            value = {"+": value + int(term), "-": value - int(term), "*": value * int(term)}[operator]
        if value != int(right):
            return False
    return True


def sum_is_right(item: Item) -> bool:
    return final_number(item.answer) == sum(numbers_in(item.question)) and working_is_right(item.answer)


def difference_is_right(item: Item) -> bool:
    return final_number(item.answer) == abs(int.__sub__(*numbers_in(item.question))) and working_is_right(item.answer)


def product_is_right(item: Item) -> bool:
    return final_number(item.answer) == int.__mul__(*numbers_in(item.question)) and working_is_right(item.answer)


def comparison_is_right(item: Item) -> bool:
    larger = any(word in item.question for word in ("larger", "bigger", "greater"))
    return int(item.answer) == (max if larger else min)(numbers_in(item.question))


def number_order_is_right(item: Item) -> bool:
    falling = "descending" in item.question or "from large" in item.question
    expected = sorted(numbers_in(item.question), reverse=falling)
    return item.answer == ", ".join(map(str, expected))


def word_order_is_right(item: Item) -> bool:
    return item.answer.split(", ") == sorted(item.question.partition(": ")[2].split(", "))


def list_answer_is_right(item: Item) -> bool:
    if item.question.startswith("Reverse"):
        return item.answer.split(", ") == item.question.partition(": ")[2].split(", ")[::-1]
    values = item.question.partition("? ")[2].split(", ")
    for word, expected in (("first", values[0]), ("last", values[-1]), ("many", str(len(values)))):
        if word in item.question.partition("?")[0]:
            return item.answer == expected
    return int(item.answer) == (max if "largest" in item.question else min)(int(value) for value in values)


def copy_is_right(item: Item) -> bool:
    return item.question.endswith(": " + item.answer)


def spelling_is_right(item: Item) -> bool:
    letters = item.answer.split("-")
    if "pell" in item.question:
        return "".join(letters) in re.findall(r"\w+", item.question)
    word = re.findall(r"(?:of|in|does) (\w+)", item.question)[-1]
    if "irst" in item.question:
        return item.answer == word[0]
    return item.answer == (word[-1] if "ast letter" in item.question else str(len(word)))


METERS = {"kilometers": 1000.0, "meters": 1.0, "centimeters": 0.01, "millimeters": 0.001}
SIZES = (
    METERS,
    {"tons": 1e6, "kilograms": 1e3, "grams": 1.0},
    {"liters": 1e3, "milliliters": 1.0},
    {"weeks": 604800.0, "days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0},
    {"years": 12.0, "months": 1.0},
    {"yards": 36.0, "feet": 12.0, "inches": 1.0},
    {"dozen": 12.0, "pieces": 1.0},
    {"dollars": 100.0, "cents": 1.0},
)


def conversion_is_right(item: Item) -> bool:
    (amount,) = numbers_in(item.question)
    source = re.findall(r"\d+ (\w+)", item.question)[0]
    result, target = item.answer.split()
    sizes = next(sizes for sizes in SIZES if source in sizes)
    return target in item.question and int(result) * sizes[target] == pytest.approx(amount * sizes[source])


def json_is_right(item: Item) -> bool:
    fields = json.loads(item.answer)
    return len(fields) >= 3 and all(re.search(rf"\b{value}\b", item.question) for value in fields.values())


def memory_is_right(item: Item) -> bool:
    value = item.answer.rstrip(".").split()[-1]
    return any(turn.rstrip(".").endswith(value) for turn in item.turns[:-1:2])


RECOMPUTED: dict[str, Callable[[Item], bool]] = {
    "add_two_digits": sum_is_right,
    "add_three_digits": sum_is_right,
    "subtract_two_digits": difference_is_right,
    "subtract_three_digits": difference_is_right,
    "multiply_table": product_is_right,
    "multiply_two_by_one_digit": product_is_right,
    "compare": comparison_is_right,
    "sort_numbers": number_order_is_right,
    "sort_long": number_order_is_right,
    "sort_words": word_order_is_right,
    "list_questions": list_answer_is_right,
    "repeat": copy_is_right,
    "spell": spelling_is_right,
    "convert": conversion_is_right,
    "extract_json": json_is_right,
    "remember": memory_is_right,
}
LOOKED_UP = {"facts", "small_talk", "acknowledge"}
"""Tables: their answers are data, so only that a question has one answer is checked."""


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_seed_gives_the_same_items_again(task: Task) -> None:
    assert items_of(task, test=False, count=50) == items_of(task, test=False, count=50)
    assert items_of(task, test=False, count=50) != items_of(task, test=False, seed=12, count=50)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_answers_equal_an_independent_recomputation(name: str) -> None:
    task = next(task for task in TASKS if task.name == name)
    wrong = [item for item in items_of(task, test=False) + items_of(task, test=True) if not RECOMPUTED[name](item)]
    assert wrong == []


def test_every_graded_task_is_recomputed_or_a_table() -> None:
    assert {task.name for task in GRADED} == set(RECOMPUTED) | LOOKED_UP


@pytest.mark.parametrize("task", GRADED, ids=lambda task: task.name)
def test_a_question_has_one_answer(task: Task) -> None:
    answers: dict[tuple[str, ...], str] = {}
    for item in items_of(task, test=False, count=1500) + items_of(task, test=True):
        assert answers.setdefault(item.turns, item.answer) == item.answer


@pytest.mark.parametrize("task", GRADED, ids=lambda task: task.name)
def test_no_test_question_is_ever_trained(task: Task) -> None:
    trained = items_of(task, test=False, count=1500)
    tested = items_of(task, test=True)
    assert not {item.key for item in trained} & {item.key for item in tested}
    assert not {item.turns for item in trained} & {item.turns for item in tested}
    assert all(is_test_key(task.name, item.key) for item in tested)


def test_a_held_out_sum_is_held_out_in_both_orders_and_every_wording() -> None:
    task = next(task for task in TASKS if task.name == "add_two_digits")
    trained = {tuple(sorted(numbers_in(item.question))) for item in items_of(task, test=False, count=3000)}
    tested = {tuple(sorted(numbers_in(item.question))) for item in items_of(task, test=True)}
    assert not trained & tested


def test_evaluation_asks_no_question_twice_and_gives_what_was_asked_for() -> None:
    items = unseen_items(1900, seed=5)
    assert len({item.turns for item in items}) == len(items) == 1900


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
class TestCommittedFolder:
    def test_tokenizer_round_trips_generated_and_foreign_text(self, model: str) -> None:
        tokenizer = Tokenizer.from_file(str(embedded_model_path(model) / "tokenizer.json"))
        texts = [item.question for task in TASKS for item in items_of(task, test=False, count=20)]
        for text in [*texts, "Grüße aus Köln, 你好 \U0001f600\n\ttabs  and   runs 3.14159"]:
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    def test_digits_are_single_tokens_and_special_tokens_have_fixed_ids(self, model: str) -> None:
        tokenizer = Tokenizer.from_file(str(embedded_model_path(model) / "tokenizer.json"))
        assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
        assert tokenizer.encode("90817").tokens == list("90817")

    def test_chat_template_renders_what_training_encoded(self, model: str) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        folder = embedded_model_path(model)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        item = items_of(next(task for task in TASKS if task.name == "remember"), test=False, count=1)[0]
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(item.turns)]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
        assert tuple(tokenizer.encode(text, add_special_tokens=False).ids) == ChatEncoder(tokenizer).item(item).prompt

    def test_weights_have_the_shapes_that_the_config_says(self, model: str) -> None:
        folder = embedded_model_path(model)
        config = json.loads((folder / "config.json").read_text())
        hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        query, pair = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
        for layer in range(config["num_hidden_layers"]):
            shapes = {
                "input_layernorm": [hidden],
                "post_attention_layernorm": [hidden],
                "self_attn.q_proj": [query, hidden],
                "self_attn.k_proj": [pair, hidden],
                "self_attn.v_proj": [pair, hidden],
                "self_attn.o_proj": [hidden, query],
                "mlp.gate_proj": [inner, hidden],
                "mlp.up_proj": [inner, hidden],
                "mlp.down_proj": [hidden, inner],
            }
            expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            kinds = {file.get_slice(name).get_dtype() for name in found}
        assert found == expected
        assert kinds == {"BF16"}

    def test_vocabulary_covers_every_embedding_row(self, model: str) -> None:
        folder = embedded_model_path(model)
        config = json.loads((folder / "config.json").read_text())
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == config["vocab_size"]

    def test_batches_train_answers_and_stories_but_never_questions(self, model: str) -> None:
        tokenizer = Tokenizer.from_file(str(embedded_model_path(model) / "tokenizer.json"))
        stream = BatchStream(ChatEncoder(tokenizer), seed=3)
        batch = stream.batch(0, BatchShape(single=((24, 8),), packed=()))
        assert batch.ids.tolist() == stream.batch(0, BatchShape(single=((24, 8),), packed=())).ids.tolist()
        assert batch.ids[batch.places + 1].tolist() == batch.targets.tolist()
        for row in range(8):
            trained = [t for p, t in zip(batch.places.tolist(), batch.targets.tolist(), strict=True) if p // 24 == row]
            ids = batch.ids[row * 24 : (row + 1) * 24].tolist()
            answer_start = len(ids) - ids[::-1].index(1) + len(tokenizer.encode("assistant\n").ids)
            assert trained == ids[answer_start : answer_start + len(trained)]
            assert trained[-1] == END_ID


def test_embedded_weights_take_at_most_12_megabytes() -> None:
    sizes = [(embedded_model_path(name) / "model.safetensors").stat().st_size for name in EMBEDDED_MODELS]
    assert 0 < sum(sizes) <= 12_000_000


def test_an_unknown_embedded_name_is_refused_by_name() -> None:
    with pytest.raises(UnknownEmbeddedModel, match="tiny-chat-huge"):
        embedded_model_path("tiny-chat-huge")
