"""Sampling on Triton against the CPU sampler behind a replica: equal logits must give equal tokens.

The CPU's side is the one that serves: a replica is given a prompt and, step by step, rows of logits; what it draws is
the oracle. The same rows then go through the device sampler as one batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmscale._core import CpuKernels, EngineLimits, LocalReplica, Sampling, WorkerSession
from llmscale.layers.triton.sampler.rows import RowSampling, pack_rows
from llmscale.layers.triton.sampler.sampler import SampledRows, TritonSampler
from tests.triton.outcome import Case

EOS = 3
LOGPROB_TOLERANCE = 4e-6
type_names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for, and the rows of logits [steps, vocabulary] that its steps come to."""

    prompt: tuple[int, ...]
    logits: Tensor
    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """One step of a request: what the device is asked, and what the CPU drew."""

    row: RowSampling
    logits: Tensor
    token: int
    logprobs: tuple[float, list[tuple[int, float]]] | None


def drawn_on_cpu(request: Request) -> Iterator[Drawn]:
    """Runs the request through a replica of its own."""
    steps, vocabulary = request.logits.shape
    limits = EngineLimits(vocabulary=vocabulary, total_blocks=64, max_sequence_tokens=256, eos_tokens=[EOS])
    replica = LocalReplica(limits)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    shared = {name: getattr(request, name) for name in (*names, "seed", "choice")}
    sampling = Sampling(
        **shared,
        logprobs=request.logprobs,
        logit_bias=list(request.logit_bias.items()),
        max_tokens=steps,
        min_tokens=request.min_tokens,
        ignore_eos=request.min_tokens == 0,
    )
    replica.submit(request.prompt, sampling)
    dtype = type_names[request.logits.dtype]
    kernels = CpuKernels(dtype, threads=1)
    output: list[int] = []
    words = torch.zeros(WorkerSession.MAX_ROW_WORDS, dtype=torch.int32)
    for logits in request.logits:
        counts = replica.plan()
        assert counts is not None
        assert counts.samples == 1
        row = logits.contiguous()
        replica.draw(kernels, (row.data_ptr(), row.numel()), dtype, (0, 1), 0, (words.data_ptr(), words.numel()))
        replica.complete((words.data_ptr(), words.numel()))
        [delivery] = replica.take()
        asked = RowSampling(
            **shared,
            position=len(request.prompt) + len(output),
            top_logprobs=request.logprobs or 0,
            prompt_tokens=frozenset(request.prompt),
            generated_counts=dict(Counter(output)),
            logit_bias=request.logit_bias,
            suppressed=frozenset([EOS]) if len(output) < request.min_tokens else frozenset(),
        )
        [token] = delivery.tokens
        found = None if request.logprobs is None or delivery.logprobs is None else delivery.logprobs[0]
        yield Drawn(asked, row, token, found)
        output.append(token)
        if delivery.finish_reason is not None:
            return


def sampled_on_device(
    rows: Sequence[RowSampling], logits: Tensor, device: torch.device
) -> tuple[SampledRows, TritonSampler]:
    """One batch, in a sampler whose memory shows what was not written."""
    vocabulary = logits.shape[1]
    sampler = TritonSampler(vocabulary, len(rows) + 1, device)
    for name in ("scores", "candidate_scores", "part_mass", "threshold", "log_sum"):
        getattr(sampler._room, name).fill_(float("nan"))
    return sampler.sample(logits.to(device), pack_rows(rows, vocabulary, device)), sampler


def require_the_same(drawn: Sequence[Drawn], device: torch.device) -> None:
    """Tokens and log probabilities of the CPU, and what leads to them: a draw alone would show few wrong cuts."""
    logits = torch.stack([each.logits for each in drawn])
    sampled, sampler = sampled_on_device([each.row for each in drawn], logits, device)
    assert sampled.status.tolist() == [0] * len(drawn)
    tokens = sampled.tokens.tolist()
    wrong = [(each.row, each.token, token) for each, token in zip(drawn, tokens, strict=True) if each.token != token]
    assert not wrong, f"{len(wrong)} of {len(drawn)} rows: {wrong[:2]}"
    for index, each in enumerate(drawn):
        require_kept(each, index, sampler)
        if each.logprobs is None:
            continue
        chosen, top = each.logprobs
        assert abs(float(sampled.logprobs[index]) - chosen) <= LOGPROB_TOLERANCE, (each.row, chosen)
        count = int(sampled.top_counts[index])
        assert sampled.top_tokens[index, :count].tolist() == [token for token, _ in top], each.row
        for given, (_, expected) in zip(sampled.top_logprobs[index, :count].tolist(), top, strict=True):
            assert abs(given - expected) <= LOGPROB_TOLERANCE, (each.row, given, expected)


def require_kept(drawn: Drawn, index: int, sampler: TritonSampler) -> None:
    """The scores that were sampled from, and which tokens could be, against their definitions in plain torch."""
    row, room = drawn.row, sampler._room
    expected_scores = changed_scores(row, drawn.logits)
    scores = room.scores[index].cpu()
    assert torch.equal(scores, expected_scores), (row, (scores - expected_scores).nan_to_num().abs().max())
    if row.temperature < 1e-5:
        return
    scaled = (scores - scores.max()) * (1 / torch.tensor(row.temperature))
    threshold, last = float(room.threshold[index]), int(room.last_tied[index])
    kept = (scaled > threshold) | ((scaled == threshold) & (torch.arange(len(scaled)) <= last))
    expected = kept_tokens(row, scaled)
    assert expected is None or torch.equal(kept, expected), (row, int(kept.sum()), int(expected.sum()))


def changed_scores(row: RowSampling, logits: Tensor) -> Tensor:
    """Penalties, bias and suppression one token after the other."""
    scores = logits.float().clone()
    for token in row.prompt_tokens | row.generated_counts.keys():
        scores[token] = (
            scores[token] / row.repetition_penalty if scores[token] > 0 else scores[token] * row.repetition_penalty
        )
    for token, count in row.generated_counts.items():
        scores[token] = scores[token] - torch.tensor(row.frequency_penalty) * count - row.presence_penalty
    for token, bias in row.logit_bias.items():
        scores[token] += bias
    for token in row.suppressed:
        scores[token] = float("-inf")
    return scores


def kept_tokens(row: RowSampling, scaled: Tensor) -> Tensor | None:
    """Min-p, top-k and top-p by sorting; None where a cut is too close to tell in float64 of other exponentials."""
    kept = scaled > float("-inf")
    if row.min_p > 0:
        kept &= scaled.double() >= torch.tensor(row.min_p).double().log() - 1e-7
    if 0 < row.top_k < len(scaled) and int(kept.sum()) >= row.top_k:
        kept &= scaled >= scaled[kept].sort(descending=True).values[row.top_k - 1]
    if row.top_p >= 1:
        return kept
    order = scaled.masked_fill(~kept, float("-inf")).sort(descending=True, stable=True).indices[: int(kept.sum())]
    mass = scaled[order].double().exp().cumsum(0)
    beyond = mass - torch.tensor(row.top_p).double() * mass[-1]
    if bool(((beyond != 0) & (beyond.abs() < 1e-5)).any()):
        return None
    kept.fill_(value=False)
    kept[order[: max(1, int((beyond < 0).sum()) + 1)]] = True
    return kept


def logits_of(kind: str, steps: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Peaked, flat, full of ties, mostly minus infinity: the shapes that thresholds stumble over."""
    values = torch.randn(steps, vocabulary, generator=generator)
    if kind == "peaked":
        return values * 4
    if kind == "flat":
        return values * 0.05
    if kind == "ties":
        return (values * 2).round() / 2
    if kind == "equal":
        return torch.zeros(steps, vocabulary)
    if kind == "bfloat16":
        return (values * 3).bfloat16()
    assert kind == "sparse"
    return values.masked_fill(torch.rand(steps, vocabulary, generator=generator) < 0.97, float("-inf"))


def batch_case(vocabulary: int, kinds: Sequence[str], variations: Sequence[dict[str, object]], steps: int = 2) -> Case:
    """Every kind of logits with every variation; a sampler takes one dtype and one vocabulary at a time."""

    def run(device: torch.device) -> None:
        generator = torch.Generator().manual_seed(vocabulary)
        dice = random.Random(vocabulary)
        drawn: list[Drawn] = []
        for kind in kinds:
            for changes in variations:
                prompt = tuple(dice.choices(range(vocabulary), k=5))
                logits = logits_of(kind, steps, vocabulary, generator)
                request = Request(prompt, logits, seed=dice.getrandbits(64), choice=dice.randrange(3))
                drawn += drawn_on_cpu(replace(request, **changes))  # type: ignore[arg-type]
        require_the_same(drawn, device)

    return run


def mask_case(device: torch.device) -> None:
    """A mask is the same as logits of minus infinity, which the CPU is given instead."""
    generator, vocabulary = torch.Generator().manual_seed(5), 203
    rows, tokens, logits = [], [], []
    for seed in range(2):
        allowed = frozenset(torch.randperm(vocabulary, generator=generator)[: 3 + 80 * seed].tolist())
        plain = torch.randn(vocabulary, generator=generator)
        masked = torch.full_like(plain, float("-inf"))
        masked[list(allowed)] = plain[list(allowed)]
        request = Request((7,), masked[None], seed=seed, top_p=0.9)
        [drawn] = drawn_on_cpu(request)
        rows += [replace(drawn.row, allowed=allowed), drawn.row]
        tokens += [drawn.token, drawn.token]
        logits += [plain, masked]
    sampled, _ = sampled_on_device(rows, torch.stack(logits), device)
    assert sampled.tokens.tolist() == tokens


def broken_rows_case(device: torch.device) -> None:
    """A row without a token says why, and its neighbours are not affected."""
    vocabulary = 4200
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1))
    logits[1, 4199] = float("nan")
    logits[2, 0] = float("inf")
    logits[3] = float("-inf")
    rows = [RowSampling(seed=row) for row in range(6)]
    rows[4] = RowSampling(allowed=frozenset())
    rows[5] = RowSampling(temperature=0.0, suppressed=frozenset([int(logits[5].argmax())]), top_logprobs=3)
    sampled, _ = sampled_on_device(rows, logits, device)
    assert sampled.status.tolist() == [0, 1, 1, 2, 2, 0]
    assert sampled.tokens.tolist()[1:5] == [0, 0, 0, 0]
    order = logits[5].argsort(descending=True).tolist()
    assert int(sampled.tokens[5]) == order[1]
    assert sampled.top_tokens[5, :3].tolist() == order[:3], "log probabilities are of the logits as given"
    expected = logits[5].double().log_softmax(0)[order[1]]
    assert abs(float(sampled.logprobs[5]) - float(expected)) < LOGPROB_TOLERANCE


def handed_on_case(device: torch.device) -> None:
    """Decode rows get the ids of the rows that they name, all others keep theirs; a row without an id hands on 0."""
    vocabulary = 97
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(2))
    logits[3, 4] = float("nan")
    rows = pack_rows([RowSampling(temperature=0.0)] * 5, vocabulary, device)
    sampler = TritonSampler(vocabulary, 6, device)
    sampler.sample(logits.to(device), rows)
    token_ids = torch.arange(200, 208, dtype=torch.int32, device=device)
    drawn_from = torch.tensor([5, 0, 1, 1, 4, 0], dtype=torch.int32, device=device)
    sampler.hand_on(drawn_from, token_ids)
    best = logits.argmax(1).tolist()
    assert token_ids.tolist() == [best[4], 201, best[0], best[0], 0, 205, 206, 207]


PLAIN = ({}, {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 5.0}, {"logprobs": 5})
FILTERS = (
    {"top_k": 1},
    {"top_p": 0.5},
    {"top_k": 60, "temperature": 2.0},
    {"top_k": 7},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"top_p": 0.9, "temperature": 0.7},
    {"min_p": 1.0},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
)
PENALTIES = (
    {"repetition_penalty": 1.7, "temperature": 0.5},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.4},
    {"frequency_penalty": -2.0, "repetition_penalty": 1.2, "temperature": 0.0},
    {"logit_bias": {2: 5.0, 11: -100.0, 30: 4.5}, "presence_penalty": 0.5, "logprobs": 20},
    {"frequency_penalty": 1.3, "logit_bias": {9: 30.0}, "temperature": 0.5},
    {"min_tokens": 2, "logit_bias": {EOS: 50.0, 5: 40.0}},
)

CASES: dict[str, Case] = {
    "sampling_plain": batch_case(307, ("peaked", "flat"), PLAIN, steps=1),
    "sampling_plain_bfloat16": batch_case(307, ("bfloat16",), (*PLAIN[1:3], {"top_p": 0.8}, {"top_k": 9}), steps=1),
    "sampling_over_two_parts": batch_case(5003, ("flat",), (*PLAIN[::2], {"top_k": 5, "top_p": 0.7}), steps=1),
    "sampling_filters_peaked": batch_case(307, ("peaked",), FILTERS[::2], steps=1),
    "sampling_more_filters": batch_case(203, ("peaked", "flat", "ties"), FILTERS, steps=1),
    "sampling_filters_with_ties": batch_case(130, ("ties",), FILTERS[1::2], steps=1),
    "sampling_filters_equal_logits": batch_case(100, ("equal",), FILTERS[1::3], steps=1),
    "sampling_filters_sparse": batch_case(640, ("sparse",), FILTERS[2::2], steps=1),
    "sampling_penalties": batch_case(64, ("ties",), PENALTIES, steps=3),
    "sampling_masks": mask_case,
    "sampling_broken_rows": broken_rows_case,
    "sampling_hands_on": handed_on_case,
}
"""The interpreter takes 0.1 to 0.4 s for a row with filters, so each variation meets the kinds where it may stumble."""
