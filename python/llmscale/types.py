"""The words that an application and the HTTP interface share: what to sample, and what came out.

Plain frozen data with vLLM's names where the meaning is the same; every bound is checked when a value is made, in
O(fields). Used by the offline `LLM`, by the clients and by the gateway. Knows nothing of HTTP, of tokenizers or of
devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from llmscale.errors import InvalidField

MAX_CHOICES: Final = 128
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 1_024
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_BYTES: Final = 512
MAX_STOP_TOKENS: Final = 64
MAX_OUTPUT_TOKENS: Final = 1 << 24

_RANGES: Final[tuple[tuple[str, float, float], ...]] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -10.0, 10.0),
    ("frequency_penalty", -10.0, 10.0),
)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    # bool is an int in Python; `max_tokens=True` is a mistake, not a one.
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidField(f"{name} is {value!r}, it must be a whole number", field=name)
    if not low <= value <= high:
        raise InvalidField(f"{name} is {value}, it must be from {low} to {high}", field=name)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidField(f"{name} is {value!r}, it must be a number", field=name)
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidField(f"{name} is {value}, it must be from {low:g} to {high:g}", field=name)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends. Raises `InvalidField` when a value is out of bounds.

    `top_k` 0 (or -1, which becomes 0) and `top_p` 1 keep everything, `temperature` 0 is greedy, penalties of 0
    (repetition: 1) are off. `max_tokens` None means up to the longest sequence that the model serves. `stop` strings
    end the text before the match (or after it with `include_stop_str_in_output`) and are looked for only after
    `min_tokens` tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __init__(
        self,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None,
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
    ) -> None:
        put = object.__setattr__
        put(self, "n", n)
        put(self, "temperature", temperature)
        put(self, "top_p", top_p)
        put(self, "top_k", top_k)
        put(self, "min_p", min_p)
        put(self, "presence_penalty", presence_penalty)
        put(self, "frequency_penalty", frequency_penalty)
        put(self, "repetition_penalty", repetition_penalty)
        put(self, "seed", seed)
        put(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        put(self, "stop_token_ids", tuple(stop_token_ids or ()))
        put(self, "max_tokens", max_tokens)
        put(self, "min_tokens", min_tokens)
        put(self, "logprobs", logprobs)
        pairs = logit_bias.items() if isinstance(logit_bias, Mapping) else logit_bias or ()
        put(self, "logit_bias", tuple(pairs))
        put(self, "ignore_eos", ignore_eos)
        put(self, "skip_special_tokens", skip_special_tokens)
        put(self, "include_stop_str_in_output", include_stop_str_in_output)
        self._check()

    def _check(self) -> None:
        for name, low, high in _RANGES:
            _check_number(name, getattr(self, name), low, high)
        _check_integer("n", self.n, 1, MAX_CHOICES)
        _check_integer("top_k", self.top_k, -1, (1 << 32) - 1)
        if self.top_k == -1:
            # As scripts for vLLM write it.
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, MAX_OUTPUT_TOKENS)
        most = MAX_OUTPUT_TOKENS if self.max_tokens is None else self.max_tokens
        _check_integer("min_tokens", self.min_tokens, 0, most)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidField(f"{name} is {getattr(self, name)!r}, it must be true or false", field=name)
        if self.stop or self.stop_token_ids or self.logit_bias:
            self._check_lists()

    def _check_lists(self) -> None:
        _check_integer("number of stop strings", len(self.stop), 0, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidField(f"stop holds {text!r}, every stop string must be a non-empty text", field="stop")
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                raise InvalidField(f"stop holds {text!r}, which is no Unicode text: {error}", field="stop") from error
            if size > MAX_STOP_STRING_BYTES:
                raise InvalidField(
                    f"a stop string has {size} bytes, the limit is {MAX_STOP_STRING_BYTES}; shorten it", field="stop"
                )
        _check_integer("number of stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0, (1 << 32) - 1)
        _check_integer("number of logit_bias entries", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias:
            _check_integer("logit_bias", token, 0, (1 << 32) - 1)
            _check_number("logit_bias", bias, -1_000.0, 1_000.0)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of one token under the raw model distribution. `rank` 1 is the most likely token.

    `token_id` is None over HTTP, whose format names tokens by their text.
    """

    token_id: int | None
    logprob: float
    text: str
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice: its text, its ids and why it ended ("stop" or "length"; None while it goes on).

    `logprobs` has one entry per output token: the drawn token first, then the most likely ones, best first.
    `stop_reason` is the stop string or the stop token id that matched, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[tuple[Logprob, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The result of one prompt: its choices in order and what they cost."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
