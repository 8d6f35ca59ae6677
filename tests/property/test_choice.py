"""A choice gives the same text, end and log probabilities however its tokens are cut into deliveries.

Method: hypothesis; random ids (bytes that are not UTF-8 and control ids included), stop strings made of the text
itself, random cuts. The reference is one token per delivery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.choice import Choice, TokenLogprobs, failure, ranked
from llmscale.errors import LlmscaleError
from llmscale.tokenizer import Tokenizer
from llmscale.types import Logprob, SamplingParams
from tests.fakes.tiny_tokenizer import write_byte_level, write_metaspace


@dataclass(frozen=True, slots=True)
class Delivered:
    """One delivery."""

    index: int
    tokens: Sequence[int]
    logprobs: Sequence[tuple[float, list[tuple[int, float]]]] | None
    finish_reason: str | None
    request: int = 1
    cached_tokens: int = 0
    restarts: int = 0

    @property
    def output_tokens(self) -> int:
        return self.index + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reader has got when the choice has ended."""

    text: str
    logprobs: list[TokenLogprobs]
    output_tokens: int
    finish_reason: str | None
    stop_reason: str | int | None


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    return [Tokenizer(write_byte_level(folder / "bytes")), Tokenizer(write_metaspace(folder / "metaspace"))]


def row(token: int) -> tuple[float, list[tuple[int, float]]]:
    return (-float(token), [(token, -float(token))])


def read(
    choice: Choice, ids: Sequence[int], cuts: Sequence[int], reason: str, *, reads_between: bool
) -> tuple[Answer, int | None]:
    """Delivers `ids` in pieces that end at `cuts`; also the number of tokens that the node was told to keep."""
    text, logprobs, kept = "", list[TokenLogprobs](), None
    ends = sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)})
    begin = 0
    for end in ends:
        piece = ids[begin:end]
        last = reason if end == len(ids) else None
        kept = choice.accept(Delivered(begin, piece, [row(token) for token in piece], last))
        if reads_between or kept is not None or last is not None:
            text += choice.take_text()
            logprobs += choice.take_logprobs()
        begin = end
        if kept is not None:
            break
    return Answer(text, logprobs, choice.output_tokens, choice.finish_reason, choice.stop_reason), kept


@settings(max_examples=400)
@given(data=st.data(), which=st.integers(0, 1))
def test_any_cut_of_the_tokens_gives_the_same_answer(
    tokenizers: list[Tokenizer], data: st.DataObject, which: int
) -> None:
    tokenizer = tokenizers[which]
    # Its length is drawn first, because lists that hypothesis draws freely are short.
    length = data.draw(st.integers(0, 40), label="length")
    ids = data.draw(st.lists(st.integers(0, 500), min_size=length, max_size=length), label="ids")
    whole = tokenizer.decode(ids)
    begins = st.integers(0, max(len(whole) - 1, 0))
    spans = data.draw(st.lists(st.tuples(begins, st.integers(1, 6)), max_size=3), label="stops")
    params = SamplingParams(
        stop=[text for begin, size in spans if (text := whole[begin : begin + size])],
        min_tokens=data.draw(st.integers(0, 16), label="min_tokens"),
        logprobs=data.draw(st.sampled_from([None, 0, 1]), label="logprobs"),
        include_stop_str_in_output=data.draw(st.booleans(), label="include"),
        skip_special_tokens=data.draw(st.booleans(), label="skip"),
    )
    reason = data.draw(st.sampled_from(["stop", "length", "aborted"]), label="reason")
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=8), label="cuts")
    reads_between = data.draw(st.booleans(), label="reads between")
    one_by_one = read(Choice(0, 0, tokenizer, params), ids, range(len(ids) + 1), reason, reads_between=True)
    cut = read(Choice(0, 0, tokenizer, params), ids, cuts, reason, reads_between=reads_between)
    assert cut == one_by_one
    answer, kept = cut
    assert answer.output_tokens == (len(ids) if kept is None else kept)
    assert answer.finish_reason == ("stop" if answer.stop_reason in params.stop else reason)
    if params.logprobs is not None:
        assert [token for token, _, _ in answer.logprobs] == list(ids[: answer.output_tokens])
    if kept is not None:
        assert kept > params.min_tokens
    everything = text_of(
        tokenizer, ids[:-1] if reason == "stop" and not params.include_stop_str_in_output else ids, params
    )
    if answer.stop_reason in params.stop:
        matched = "" if params.include_stop_str_in_output else str(answer.stop_reason)
        assert everything.startswith(answer.text + matched)
    else:
        assert answer.text == everything


def text_of(tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams) -> str:
    """The text of ids without any stop string."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])


def test_what_was_cached_is_kept_when_later_deliveries_do_not_tell(tokenizers: list[Tokenizer]) -> None:
    choice = Choice(0, 0, tokenizers[0], SamplingParams())
    choice.accept(Delivered(0, [5], None, None, cached_tokens=64))
    choice.accept(Delivered(1, [6], None, "length"))
    assert choice.cached_tokens == 64


def test_a_gap_between_deliveries_is_never_passed_over(tokenizers: list[Tokenizer]) -> None:
    choice = Choice(0, 0, tokenizers[0], SamplingParams())
    choice.accept(Delivered(0, [10, 11], None, None))
    for index in (1, 3):
        with pytest.raises(AssertionError, match="follows token 2"):
            choice.accept(Delivered(index, [12], None, None))


def test_a_reason_that_is_not_known_is_still_an_error_that_names_it() -> None:
    assert isinstance(failure("something new"), LlmscaleError)
    assert "something new" in str(failure("something new"))


def test_the_drawn_token_stands_before_the_best_ones_with_its_rank_if_it_is_among_them() -> None:
    best = Logprob(7, -0.1, "<7>", 1), Logprob(9, -2.0, "<9>", 2)
    top = [(7, -0.1), (9, -2.0)]
    assert ranked(9, -2.0, top, "<{}>".format) == (Logprob(9, -2.0, "<9>", 2), *best)
    assert ranked(5, -9.0, top, "<{}>".format) == (Logprob(5, -9.0, "<5>", None), *best)
    assert ranked(5, -9.0, [], "<{}>".format) == (Logprob(5, -9.0, "<5>", None),)
