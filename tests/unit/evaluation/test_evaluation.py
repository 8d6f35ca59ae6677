"""Evaluation: probabilities are transformers', statistics are the textbook's, and the command says both."""

from __future__ import annotations

import json
import math
from math import comb
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmscale.cli import app
from llmscale.embedded import embedded_model_path
from llmscale.errors import ConfigError
from llmscale.evaluation import scorer as scorer_module
from llmscale.evaluation.comparison import PairedCounts, paired
from llmscale.evaluation.evaluation import evaluate
from llmscale.evaluation.executors import ModelChoice
from llmscale.evaluation.items import evaluation_items
from llmscale.evaluation.scorer import ScoredRequest, Scorer
from llmscale.tokenizer import Tokenizer
from tests.models_support import VOCABULARY, write_tiny_model

MINI = embedded_model_path("tiny-chat-mini")


def scored(scorer: Scorer, requests: list[ScoredRequest]) -> list[torch.Tensor]:
    parts: list[list[torch.Tensor]] = [[] for _ in requests]
    for index, first, rows in scorer.log_probabilities(requests):
        assert first == sum(part.shape[0] for part in parts[index])
        parts[index].append(rows)
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_probabilities_are_those_of_transformers(executor: str, tmp_path: Path) -> None:
    oracle = write_tiny_model("llama_grouped", tmp_path)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for length, first in ((2, 1), (40, 1), (33, 30), (300, 290), (64, 64), (7, 3)):
        requests.append(ScoredRequest(tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()), first))
    found = scored(
        Scorer(ModelChoice(tmp_path, "float32", threads=1, executor=executor)), [one for one in requests if one.targets]
    )
    for request, rows in zip([one for one in requests if one.targets], found, strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([request.tokens])).logits[0]
        expected = logits.log_softmax(dim=-1)[request.first - 1 : -1]
        assert torch.allclose(rows, expected, atol=1e-3)


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_long_text_is_the_same_in_chunks(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tuple(torch.randint(2_048, (300,), generator=torch.Generator().manual_seed(1)).tolist())
    requests = [ScoredRequest(tokens, 1), ScoredRequest(tokens, 150), ScoredRequest(tokens[:50], 10)]
    choice = ModelChoice(MINI, "float32", threads=1, executor=executor)
    whole = scored(Scorer(choice), requests)
    monkeypatch.setattr(scorer_module, "MAX_STEP_TOKENS", 96)
    pieces = scored(Scorer(choice), requests)
    for one, other in zip(whole, pieces, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-3)


def test_keys_and_values_as_bytes_are_scored_near_those_that_are_not_and_are_refused_by_torch() -> None:
    tokens = tuple(torch.randint(2_048, (200,), generator=torch.Generator().manual_seed(2)).tolist())
    requests = [ScoredRequest(tokens, 100)]
    plain, rounded = (
        scored(Scorer(ModelChoice(MINI, "float32", threads=1, executor="native", kv_dtype=kv_dtype)), requests)[0]
        for kv_dtype in ("auto", "int8")
    )
    assert 0 < float((plain.exp() - rounded.exp()).abs().max()) < 0.1
    with pytest.raises(ConfigError, match="leave it at auto"):
        Scorer(ModelChoice(MINI, threads=1, executor="torch", kv_dtype="int8"))


def test_pairs_are_counted() -> None:
    model, reference = [True, True, False, False, True], [True, False, True, False, False]
    counts = paired(model, reference)
    assert counts == PairedCounts(both=1, only_model=2, only_reference=1, neither=1)
    assert counts.difference_points == pytest.approx(20)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 19), (19, 5), (1, 0), (10, 10), (300, 420), (9_000, 9_400)])
def test_mcnemars_test_is_the_binomial_tail(first: int, second: int) -> None:
    counts = PairedCounts(100, first, second, 7)
    total, fewer = first + second, min(first, second)
    if total <= 1_000:
        expected = min(1.0, 2 * sum(comb(total, k) for k in range(fewer + 1)) / 2**total)
    else:
        expected = math.erfc((total / 2 - fewer - 0.5) / math.sqrt(total / 2))
    assert counts.mcnemar_p() == pytest.approx(expected, rel=1e-2 if total > 1_000 else 1e-9)


def test_the_interval_is_that_of_a_difference_of_pairs() -> None:
    counts = PairedCounts(both=900, only_model=20, only_reference=40, neither=40)
    low, high = counts.interval_points(0)
    error = 1.96 * math.sqrt((60 / 1_000 - (20 / 1_000) ** 2) / 1_000) * 100
    assert low == pytest.approx(-2 - error, abs=0.15)
    assert high == pytest.approx(-2 + error, abs=0.15)
    assert counts.interval_points(0) == (low, high)
    assert PairedCounts(5, 0, 0, 5).interval_points(0) == (0.0, 0.0)


def test_a_model_beside_itself_differs_in_nothing() -> None:
    tokenizer = Tokenizer(MINI)
    items = evaluation_items("tiny-chat", tokenizer, 40, 3, 2_048)
    choice = ModelChoice(MINI, threads=1)
    found = evaluate(choice, items, choice)
    assert found.reference == found.model
    assert found.divergence is not None
    assert found.divergence.mean_nats == 0
    assert found.divergence.same_best_share == 1
    assert found.pairs is not None
    assert found.pairs.only_model == found.pairs.only_reference == 0
    assert found.pairs.both == sum(found.model.graded) > 30
    assert 1 < found.model.perplexity < 1.2
    assert sum(task.asked for task in found.model.tasks) == len(items) == 40


def test_items_depend_on_the_seed_alone_and_are_bounded(tmp_path: Path) -> None:
    tokenizer = Tokenizer(MINI)
    first, again, other = (evaluation_items("tiny-chat", tokenizer, 30, seed, 2_048) for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ConfigError, match="limit is 0 items, it must be 1 to 1,000,000"):
        evaluation_items("tiny-chat", tokenizer, 0, 1, 2_048)
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps({"prompt": "a " * 90, "answer": "b"}))
    with pytest.raises(ConfigError, match=r"item 1 needs \d+ tokens with room for its answer, the model allows 64"):
        evaluation_items(str(file), tokenizer, None, 1, 64)
    file.write_text(json.dumps({"text": "a"}))
    with pytest.raises(ConfigError, match="item 1 has fewer than two tokens"):
        evaluation_items(str(file), tokenizer, None, 1, 64)


def test_another_vocabulary_is_no_reference(tmp_path: Path) -> None:
    write_tiny_model("llama_grouped", tmp_path)
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "ab ab"}))
    items = evaluation_items(str(tmp_path / "items.jsonl"), Tokenizer(MINI), None, 0, 512)
    with pytest.raises(ConfigError, match="a vocabulary of 2,048 ids, the reference of 307"):
        evaluate(ModelChoice(MINI, threads=1), items, ModelChoice(tmp_path, threads=1))


def test_the_commands_calibrate_and_evaluate_with_a_users_files(tmp_path: Path) -> None:
    texts, items = tmp_path / "texts.jsonl", tmp_path / "items.jsonl"
    chat = [{"role": "user", "content": f"What is {n} + 11?"} for n in range(10, 22)]
    texts.write_text("\n".join(json.dumps({"messages": [turn], "answer": "21"}) for turn in chat))
    lines = [{"messages": [{"role": "user", "content": "What is 12 + 11?"}], "answer": "23"}, {"text": "A fox ran."}]
    items.write_text("\n".join(map(json.dumps, lines)))
    target = str(tmp_path / "made")
    words = ["quantize", "tiny-chat-mini", target, "--scheme", "int4", "--group-size", "64"]
    words += ["--calibrate", str(texts), "--seed", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "calibrated on 12 texts" in done.output
    words = ["eval", target, "--tasks", str(items), "--against", "tiny-chat-mini", "--json", "--threads", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["items"] == 2
    assert result["model"]["asked"] == 1
    assert result["model"]["weight_bytes"] < result["reference"]["weight_bytes"]
    assert result["divergence"]["mean_kl_nats"] > 0
    pairs = result["pairs"]
    four = ("both_right", "only_model_right", "only_reference_right", "neither_right")
    assert sum(pairs[name] for name in four) == 1
    shown = CliRunner().invoke(app, [*words[:-3], "--threads", "1"])
    assert shown.exit_code == 0, shown.output
    for said in ("exact match, %", "perplexity of", "Kullback-Leibler", "McNemar"):
        assert said in shown.stdout


def test_help_explains_what_the_commands_do() -> None:
    for command, said in (("eval", "perplexity"), ("quantize", "--calibrate")):
        done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        assert said in done.stdout
