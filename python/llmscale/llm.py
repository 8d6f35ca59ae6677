"""Offline inference: scheduler, blocks and model in the caller's process, the shortest path through the system.

`LLM("tiny-chat").generate(["Once upon a time"])` batches whatever it is given. The loop is four verbs: plan, run,
sample, collect. It uses the same state machines as a served model; it knows no sockets and keeps no threads of its own.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmscale import env
from llmscale._core import LocalReplica, Sampling, StepCounts, WorkerSession
from llmscale.choice import ENDED_WELL, Choice, failure, ranked
from llmscale.collector import paused_collector
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError, InvalidField
from llmscale.node.disk_folder import DiskFolder
from llmscale.node.plan import plan_replica
from llmscale.tokenizer import Tokenizer
from llmscale.types import CompletionOutput, RequestOutput, SamplingParams, Usage
from llmscale.worker.runner import RunnerOptions, make_runner
from llmscale.worker.sampling import zeroed_words
from llmscale.worker.step_queue import StepQueue

Prompt = str | Sequence[int]
_SEED_MASK = (1 << 64) - 1
MAX_AHEAD = 1_024
"""Sequences that are with the replica at once, as many as its queue takes; longer batches follow as these end."""


@dataclass(slots=True)
class _Sequence:
    """One choice of one prompt: what is asked for, and what has come."""

    choice: Choice
    prompt: list[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)


class LLM:
    """A model in this process.

    `model` is a folder, a hub id in the local Hugging Face cache, or an embedded model. `dtype` is "bfloat16",
    "float32", or "auto" for the checkpoint's: of float16, float32 on CPUs, and bfloat16 on CUDA devices and beside
    quantized weights. `quantization` makes dense weights "int8", or "int4" with a scale per 32 inputs
    ("int4-64" and "int4-128": per so many), while they are loaded; checkpoints that are quantized are served as
    they are. `kv_dtype` is "int8" to keep keys and values as bytes with scales, or "auto" to keep them as `dtype`.
    `device` is "cpu", "cuda", or "auto" for CUDA where torch sees a device. `executor` is "native",
    "torch", or "auto" for native where one rank of a CPU can. `deterministic=True` refuses what could give a prompt
    other tokens beside others. `seed` is the base of the seeds of requests that name none: every prompt gets
    another one, and a script gives the same text twice. `kv_disk` is a folder that keeps computed prefixes from one
    process to the next, for one process at a time; it holds what prompts and answers were made of.
    Raises ModelError for a model that cannot be served and ConfigError for settings that do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_dtype: str = "auto",
        seed: int = 0,
        deterministic: str | bool = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2_048,
        kv_cache_bytes: int | None = None,
        kv_host_bytes: int | None = None,
        kv_disk: str | Path | None = None,
        kv_disk_bytes: int | None = None,
        threads: int | None = None,
        device: str = "auto",
        executor: str = "auto",
    ) -> None:
        settings = NodeSettings(
            model=str(model),
            listen="",
            dtype=dtype,
            quantization=quantization,
            kv_dtype=kv_dtype,
            max_sequence_tokens=max_model_len,
            max_sequences=max_num_seqs,
            max_step_tokens=max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            kv_host_bytes=kv_host_bytes,
            kv_disk=None if kv_disk is None else Path(kv_disk),
            kv_disk_bytes=kv_disk_bytes,
            threads=threads,
            device=device,
            executor=executor,
        )
        plan = plan_replica(settings)
        if deterministic not in ("auto", False) and plan.executor != "native":
            raise ConfigError(
                "deterministic is set, and products of the torch executor depend on what else is in a step; leave it"
                " at auto, or serve a model that the native executor runs"
            )
        self.max_model_len: int = plan.limits.max_sequence_tokens
        with paused_collector():
            self.tokenizer = Tokenizer(plan.folder, vocabulary=plan.limits.vocabulary)
        self._seed = seed
        self._requests = 0
        self._weights_digest = plan.weights_digest
        self._folder = None if settings.kv_disk is None else DiskFolder(settings.kv_disk)
        disk = None if self._folder is None else self._folder.place_of(0, plan.content)
        if plan.executor == "torch":
            env.prepare_for_torch()
        options = RunnerOptions(
            dtype=plan.dtype,
            quantization=quantization,
            kv_dtype=kv_dtype,
            threads=plan.threads_of_worker(settings),
            device=plan.device,
            disk=disk,
        )
        self._runner = make_runner(plan.executor, plan.folder, plan.limits, options)
        self._limits = self._runner.limits
        self._words = zeroed_words(max_num_seqs * WorkerSession.MAX_ROW_WORDS)
        self.numerics = self._runner.numerics
        """What tokens depend on besides request and weights: kernels, dtype, quantization."""
        self.weight_bytes = self._runner.weight_bytes
        """Of the weights as what computes them keeps them."""
        self._start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        parse_special_tokens: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts (texts or lists of token ids) and returns their outputs in order.

        One `SamplingParams` holds for all prompts, a sequence of them for one each. Special tokens that a text spells
        stay text unless `parse_special_tokens` makes them their ids. Raises RequestError for a prompt that cannot be
        run, before anything is computed.
        """
        batch = _as_batch(prompts)
        params = _one_each(sampling_params or SamplingParams(), len(batch))
        vocabulary = self._limits.vocabulary
        ids = [
            self.tokenizer.encode(prompt, parse_special_tokens=parse_special_tokens)
            if isinstance(prompt, str)
            else _checked_ids(prompt, vocabulary)
            for prompt in batch
        ]
        texts = [prompt if isinstance(prompt, str) else None for prompt in batch]
        return self._run(texts, ids, params, contexts=ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages with role and content) or several, with the model's template. No
        conversations give no answers, and one without messages is an `InvalidField`.

        With `continue_final_message=True, add_generation_prompt=False` the model goes on with the last message.
        """
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        if not all(conversations):
            raise InvalidField("a conversation has no messages, at least 1 message is needed", field="messages")
        params = _one_each(sampling_params or SamplingParams(max_tokens=None), len(conversations))
        ids = [
            self.tokenizer.encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for conversation in conversations
        ]
        return self._run([None] * len(ids), ids, params, contexts=ids if continue_final_message else [()] * len(ids))

    def close(self, *, max_saving_seconds: float = 5.0) -> None:
        """Writes what is cached to `kv_disk`, the latest first, for so long at most, and lets go of it, so that another
        process can have it; nothing can be generated any more.
        """
        if self._folder is not None:
            self._replica.drain(int(max_saving_seconds * 1e6))
            while (counts := self._replica.plan()) is not None or not self._queue.is_empty:
                if counts is not None:
                    self._queue.take(counts)
                else:
                    self._queue.answer()
        self._replica.close()
        if self._runner.host is not None and self._runner.host.disk is not None:
            self._runner.host.disk.close()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _run(
        self,
        texts: Sequence[str | None],
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        contexts: Sequence[Sequence[int]],
    ) -> list[RequestOutput]:
        """`contexts` are what the texts go on from: the prompts, or nothing for answers in a chat."""
        sequences = [
            _Sequence(
                Choice(number, index, self.tokenizer, wanted, contexts[index]),
                ids,
                self._sampling(len(ids), wanted, index, number),
            )
            for index, (ids, wanted) in enumerate(zip(prompts, params, strict=True))
            for number in range(wanted.n)
        ]
        try:
            self._check(sequences[MAX_AHEAD:])
            self._drive(sequences)
        except BaseException:
            # It may have come between a plan and its samples, or when some requests were there and some were not.
            self._replica.close()
            self._start()
            raise
        by_prompt: list[list[_Sequence]] = [[] for _ in prompts]
        for sequence in sequences:
            by_prompt[sequence.choice.prompt].append(sequence)
        self._requests += len(prompts)
        first = self._requests - len(prompts)
        return [
            self._output(f"request-{first + index}", texts[index], ids, by_prompt[index])
            for index, ids in enumerate(prompts)
        ]

    def _check(self, sequences: Sequence[_Sequence]) -> None:
        """Lets the replica refuse what it would refuse later, before anything is computed."""
        for sequence in sequences:
            self._replica.cancel(self._replica.submit(sequence.prompt, sequence.sampling))
        self._replica.take()

    def _start(self) -> None:
        """Begins with nothing that runs and nothing cached; KV memory that no table names is free."""
        disk = None if self._runner.host is None else self._runner.host.disk
        most = 1 + self._runner.max_steps_ahead
        if disk is None or self._folder is None:
            self._replica = LocalReplica(self._limits, max_steps_in_flight=most)
        else:
            index, secret = self._folder.index, self._folder.secret()
            digest = self._weights_digest
            self._replica = LocalReplica(self._limits, disk, index, secret, digest, max_steps_in_flight=most)
        self._steps = self._runner.steps(self._replica)
        self._queue = StepQueue(self._runner, self._steps, self._replica, self._answer)

    def _drive(self, sequences: Sequence[_Sequence]) -> None:
        """Submit, plan, run, sample, collect, until nothing is left."""
        ahead = collections.deque(sequences)
        live: dict[int, _Sequence] = {}
        while ahead or live:
            while ahead and len(live) < MAX_AHEAD:
                sequence = ahead.popleft()
                live[self._replica.submit(sequence.prompt, sequence.sampling)] = sequence
            counts = self._replica.plan()
            is_open = not self._queue.is_empty
            if counts is not None:
                self._queue.take(counts)
            else:
                self._queue.answer()
            news = self._collect(live)
            assert counts is not None or is_open or news, f"{len(live)} requests are left and none of them goes on"
        self._queue.answer()

    def _answer(self, counts: StepCounts) -> None:
        """Samples and completes the oldest step that runs."""
        words = self._words.buffer_info()
        self._steps.draw((0, counts.samples), 0, words)
        self._replica.complete(words)

    def _collect(self, live: dict[int, _Sequence]) -> int:
        """Hands tokens to their sequences and drops those that have ended. Returns how many had news."""
        deliveries = self._replica.take()
        for delivery in deliveries:
            sequence = live.get(delivery.request)
            # One that a stop string has ended gets one more delivery: the end that this caused.
            if sequence is None:
                continue
            sequence.tokens += delivery.tokens
            if sequence.choice.accept(delivery) is not None:
                self._replica.cancel(delivery.request)
            if sequence.choice.finish_reason is not None:
                del live[delivery.request]
        return len(deliveries)

    def _sampling(self, prompt_tokens: int, params: SamplingParams, index: int, choice: int) -> Sampling:
        room = max(1, self.max_model_len - prompt_tokens)
        seed = self._seed + self._requests + index if params.seed is None else params.seed
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

    def _output(self, name: str, text: str | None, ids: Sequence[int], sequences: Sequence[_Sequence]) -> RequestOutput:
        choices = [sequence.choice for sequence in sequences]
        for choice in choices:
            reason = choice.finish_reason
            if reason not in ENDED_WELL:
                raise failure(reason or "unavailable")
        usage = Usage(
            prompt_tokens=len(ids),
            completion_tokens=sum(choice.output_tokens for choice in choices),
            cached_tokens=max(choice.cached_tokens for choice in choices),
        )
        outputs = tuple(self._completion(sequence) for sequence in sequences)
        return RequestOutput(name, text, tuple(ids), outputs, finished=True, usage=usage)

    def _completion(self, sequence: _Sequence) -> CompletionOutput:
        choice = sequence.choice
        rows = choice.take_logprobs()
        return CompletionOutput(
            index=choice.index,
            text=choice.take_text(),
            token_ids=tuple(sequence.tokens[: choice.output_tokens]),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=tuple(ranked(*row, self._text_of) for row in rows) if rows else None,
        )

    def _text_of(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, Mapping | bytes) or not hasattr(prompts, "__len__"):
        raise InvalidField(
            f"prompts is a {type(prompts).__name__}, it must be a text, a list of token ids, or a list of such prompts",
            field="prompts",
        )
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt: a text, or the ids of one
    return prompts  # type: ignore[return-value]  # the other members of the union


def _checked_ids(prompt: Sequence[int], vocabulary: int) -> list[int]:
    wanted = "a prompt must be a text or a list of token ids"
    if isinstance(prompt, Mapping | bytes):
        raise InvalidField(f"{wanted}, not {type(prompt).__name__}", field="prompts")
    try:
        # numpy's integers are whole numbers, too.
        ids = list(map(operator.index, prompt))
    except TypeError as error:
        raise InvalidField(f"{wanted}: {error}", field="prompts") from error
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token < vocabulary:
            raise InvalidField(f"a prompt has the token id {token}, the vocabulary is {vocabulary}", field="prompts")
    return ids


def _one_each(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * prompts
    if len(params) != prompts:
        raise InvalidField(
            f"there are {len(params)} sampling_params for {prompts} prompts; give one for all, or one for each",
            field="sampling_params",
        )
    return params
