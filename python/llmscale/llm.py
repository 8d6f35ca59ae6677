"""Offline inference: scheduler, blocks and model in the caller's process, the shortest path through the system.

`LLM("tiny-chat").generate(["Once upon a time"])` batches whatever it is given. The loop is four verbs: plan, run,
sample, collect. It uses the same state machines as a served model; it knows no sockets and keeps no threads of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmscale import env
from llmscale._core import LocalReplica, Sampling
from llmscale.choice import ENDED_WELL, Choice, failure, ranked
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError, InvalidField
from llmscale.node.plan import plan_replica
from llmscale.tokenizer import Tokenizer
from llmscale.types import CompletionOutput, RequestOutput, SamplingParams, Usage

Prompt = str | Sequence[int]
_SEED_MASK = (1 << 64) - 1


class LLM:
    """A model in this process.

    `model` is a folder, a hub id in the local Hugging Face cache, or an embedded model. `dtype` is "auto", "bfloat16"
    or "float32". `seed` is the base of the seeds of requests that name none, so that a script gives the same text
    twice.
    Raises ModelError for a model that cannot be served and ConfigError for settings that do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        deterministic: str | bool = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2_048,
        kv_cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        env.prepare_for_torch()
        from llmscale.worker.model_runner import ModelRunner, StepBuffers

        if quantization is not None:
            raise ConfigError(f"quantization is {quantization!r}; only unquantized models are served yet, leave it out")
        if deterministic not in ("auto", False):
            raise ConfigError(
                "deterministic mode needs batch-invariant linear layers, which are not there yet; use auto"
            )
        settings = NodeSettings(
            model=str(model),
            listen="",
            dtype=dtype,
            max_sequence_tokens=max_model_len,
            max_sequences=max_num_seqs,
            max_step_tokens=max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            threads=threads,
        )
        plan = plan_replica(settings)
        self.max_model_len: int = plan.limits.max_sequence_tokens
        self.tokenizer = Tokenizer(plan.folder, vocabulary=plan.limits.vocabulary)
        self._seed = seed
        self._requests = 0
        self._ids: dict[int, list[int]] = {}
        self._replica = LocalReplica(plan.limits)
        self._runner = ModelRunner(plan.folder, plan.dtype, plan.limits, threads=threads)
        self._buffers = StepBuffers(self._replica)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts (texts or lists of token ids) and returns their outputs in order.

        One `SamplingParams` holds for all prompts, a sequence of them for one each. Raises RequestError for a prompt
        that cannot be run, before anything is computed.
        """
        batch = _as_batch(prompts)
        params = _one_each(sampling_params or SamplingParams(), len(batch))
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in batch]
        texts = [prompt if isinstance(prompt, str) else None for prompt in batch]
        return self._run(texts, ids, params)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages with role and content) or several, with the model's template."""
        conversations: Sequence[Any] = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        params = _one_each(sampling_params or SamplingParams(max_tokens=None), len(conversations))
        ids = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self._run([None] * len(ids), ids, params)

    def _run(
        self, texts: Sequence[str | None], prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        choices: dict[int, Choice] = {}
        self._ids = {}
        try:
            for index, (ids, wanted) in enumerate(zip(prompts, params, strict=True)):
                for number in range(wanted.n):
                    choice = Choice(number, index, self.tokenizer, wanted)
                    choice.request = self._replica.submit(ids, self._sampling(len(ids), wanted, number))
                    choices[choice.request] = choice
                    self._ids[choice.request] = []
            self._drive(choices)
        except BaseException:
            for request in choices:
                self._replica.cancel(request)
            self._replica.take()
            raise
        by_prompt: list[list[Choice]] = [[] for _ in prompts]
        for choice in choices.values():
            by_prompt[choice.prompt].append(choice)
        self._requests += len(prompts)
        first = self._requests - len(prompts)
        return [
            self._output(f"request-{first + index}", texts[index], ids, by_prompt[index])
            for index, ids in enumerate(prompts)
        ]

    def _drive(self, choices: Mapping[int, Choice]) -> None:
        """Plan, run, sample, collect, until nothing is left."""
        while (counts := self._replica.plan()) is not None:
            logits = self._runner.forward(self._buffers.inputs(counts))
            self._replica.sample(self._runner.kernels, logits, self._runner.dtype)
            self._collect(choices)
        self._collect(choices)

    def _collect(self, choices: Mapping[int, Choice]) -> None:
        for delivery in self._replica.take():
            choice = choices.get(delivery.request)
            if choice is not None:
                self._ids[delivery.request] += delivery.tokens
            # A choice that a stop string has ended gets one more delivery: the end that this caused.
            if choice is not None and choice.finish_reason is None and choice.accept(delivery) is not None:
                self._replica.cancel(delivery.request)

    def _sampling(self, prompt_tokens: int, params: SamplingParams, choice: int) -> Sampling:
        room = max(1, self.max_model_len - prompt_tokens)
        seed = self._seed + self._requests if params.seed is None else params.seed
        return Sampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=seed & _SEED_MASK,
            choice=choice,
            logprobs=params.logprobs,
            logit_bias=list(params.logit_bias),
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            min_tokens=params.min_tokens,
            stop_tokens=list(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
        )

    def _output(self, name: str, text: str | None, ids: Sequence[int], choices: Sequence[Choice]) -> RequestOutput:
        for choice in choices:
            reason = choice.finish_reason
            if reason not in ENDED_WELL:
                raise failure(reason or "unavailable")
        usage = Usage(
            prompt_tokens=len(ids),
            completion_tokens=sum(choice.output_tokens for choice in choices),
            cached_tokens=max(choice.cached_tokens for choice in choices),
        )
        outputs = tuple(self._completion(choice) for choice in choices)
        return RequestOutput(name, text, tuple(ids), outputs, finished=True, usage=usage)

    def _completion(self, choice: Choice) -> CompletionOutput:
        rows = choice.take_logprobs()
        return CompletionOutput(
            index=choice.index,
            text=choice.take_text(),
            token_ids=tuple(self._ids[choice.request or 0][: choice.output_tokens]),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=tuple(ranked(*row, self._text_of) for row in rows) if rows else None,
        )

    def _text_of(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt: a text, or the ids of one
    return prompts  # type: ignore[return-value]  # the other members of the union


def _one_each(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * prompts
    if len(params) != prompts:
        raise InvalidField(
            f"there are {len(params)} sampling_params for {prompts} prompts; give one for all, or one for each",
            field="sampling_params",
        )
    return params
