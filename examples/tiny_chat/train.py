"""Trains tiny-chat on generated text; resumable at any time, finished by a decay of the learning rate.

`python train.py --work DIR` trains (or goes on) until stopped; `--until HH:MM` decays to zero so that it ends by then;
`--finish N` decays over N steps from the checkpoint. Schedule: warm up, stable, decay (Hu et al. 2024, MiniCPM).
About 5,500 tokens/s on two Zen 4 cores. Owns the loop only; data, optimizer and scoring have own files.
"""

import argparse
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from tinychat.chat_format import ChatEncoder
from tinychat.checkpoint import Progress, load_checkpoint, save_checkpoint
from tinychat.dataset import BatchStream
from tinychat.export import export_folder
from tinychat.gradients import GradientWorkers
from tinychat.model import SHAPES, LlamaWeights
from tinychat.muon import MuonAdam
from tinychat.scoring import answer_items, exact_match
from tinychat.vocabulary_training import train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

from llmscale.embedded.tasks import TASKS
from llmscale.embedded.tasks.splits import unseen_items

MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 0.004, 0.02
WARMUP_STEPS = 100
CHECKPOINT_SECONDS, SCORE_SECONDS, PRINT_STEPS = 120.0, 900.0, 50
SCORED_ITEMS_PER_TASK = 100


@dataclass(slots=True)
class Run:
    """Everything that a step touches."""

    weights: LlamaWeights
    optimizer: MuonAdam
    workers: GradientWorkers
    tokenizer: Tokenizer
    threads: int
    progress: Progress
    losses: Tensor
    counts: Tensor


def train_step(run: Run, step: int, scale: float) -> int:
    """One optimizer step; adds the loss of every task to the run's sums and gives the tokens read."""
    result = run.workers.step(step)
    run.optimizer.step(result.gradients, step + 1, scale, run.workers.pool)
    run.losses.index_add_(0, result.tasks, result.losses)
    run.counts.index_add_(0, result.tasks, torch.ones_like(result.losses))
    return result.tokens


def report(run: Run, speed: float, scale: float) -> None:
    """One line: progress, tokens/s, loss per task since the last line."""
    means = (run.losses / run.counts.clamp(min=1)).tolist()
    names = [*(task.name for task in TASKS), "documents"]
    text = " ".join(f"{name}={mean:.3f}" for name, mean in zip(names, means, strict=True))
    stamp = datetime.now(UTC).strftime("%H:%M:%S")
    print(
        f"{stamp} step {run.progress.step} tokens {run.progress.tokens:,} {speed:.0f} tok/s rate {scale:.3f} | {text}",
        flush=True,
    )
    run.losses.zero_()
    run.counts.zero_()


def score(run: Run) -> None:
    """Greedy exact match on a few unseen items per task, with the bfloat16 weights in float32 arithmetic."""
    started = time.monotonic()
    copy = LlamaWeights(run.weights.shape)
    copy.load_state_dict({name: tensor.float() for name, tensor in run.weights.state_dict().items()})
    items = unseen_items(SCORED_ITEMS_PER_TASK * sum(task.graded for task in TASKS), seed=7)
    table = exact_match(answer_items(copy, run.tokenizer, items, workers=run.threads))
    text = " ".join(f"{name}={right / asked:.1%}" for name, (right, asked) in table.items())
    print(f"exact match at step {run.progress.step} ({time.monotonic() - started:.0f} s): {text}", flush=True)


def prepare(arguments: argparse.Namespace) -> Run:
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    vocabulary = work / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer().save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    weights = LlamaWeights(SHAPES[arguments.model], seed=arguments.seed).bfloat16()
    optimizer = MuonAdam(weights, muon_rate=MUON_RATE, adam_rate=ADAM_RATE, weight_decay=WEIGHT_DECAY)
    progress = Progress(arguments.model, 0, 0, 0.0, arguments.seed)
    checkpoint = arguments.checkpoint or work / f"{arguments.model}.safetensors"
    if checkpoint.exists():
        tensors, progress = load_checkpoint(checkpoint)
        if progress.model != arguments.model:
            raise SystemExit(f"{checkpoint} is of {progress.model}, not of {arguments.model}: give another --work")
        optimizer.load_state(tensors)
        print(f"resumed {checkpoint} at step {progress.step}", flush=True)
    stream = BatchStream(ChatEncoder(tokenizer), progress.seed)
    workers = GradientWorkers(weights, stream, workers=arguments.threads, compiled=arguments.compile)
    zeros = torch.zeros(len(TASKS) + 1)
    return Run(weights, optimizer, workers, tokenizer, arguments.threads, progress, zeros.clone(), zeros.clone())


def deadline_of(clock: str | None) -> float | None:
    """Seconds from now to the next HH:MM in UTC."""
    if clock is None:
        return None
    now = datetime.now(UTC)
    hour, minute = map(int, clock.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return ((end if end > now else end + timedelta(days=1)) - now).total_seconds()


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm up, stay at `peak`, decay to zero by a time or a number of steps.

    `deadline_seconds` counts from the start of this process, `decay_share` is the last part of it that decays.
    """

    first_step: int
    peak: float
    deadline_seconds: float | None
    decay_share: float
    finish_steps: int | None

    def factor(self, step: int, elapsed_seconds: float) -> float:
        """The factor of the rates at a step; 0 or less means that the run is over."""
        factor = min(1.0, (step + 1) / WARMUP_STEPS)
        if self.finish_steps is not None:
            factor = min(factor, (self.first_step + self.finish_steps - step) / max(self.finish_steps, 1))
        if self.deadline_seconds is not None:
            left = self.deadline_seconds - elapsed_seconds
            factor = min(factor, left / (self.deadline_seconds * self.decay_share))
        return factor * self.peak


def train(run: Run, arguments: argparse.Namespace) -> None:
    """Steps until the schedule ends, with a checkpoint every two minutes."""
    path = arguments.work / f"{arguments.model}.safetensors"
    started = saved = scored = reported = time.monotonic()
    reported_tokens = run.progress.tokens
    deadline = deadline_of(arguments.until)
    schedule = Schedule(run.progress.step, arguments.peak, deadline, arguments.decay_share, arguments.finish)
    while True:
        before, step = time.monotonic(), run.progress.step
        scale = schedule.factor(step, before - started)
        if scale <= 0.0:
            break
        tokens = train_step(run, step, scale)
        now, old = time.monotonic(), run.progress
        run.progress = Progress(old.model, step + 1, old.tokens + tokens, old.seconds + now - before, old.seed)
        if run.progress.step % PRINT_STEPS == 0:
            report(run, (run.progress.tokens - reported_tokens) / (now - reported), scale)
            reported, reported_tokens = now, run.progress.tokens
        if now - saved > CHECKPOINT_SECONDS and arguments.finish is None:
            save_checkpoint(path, run.optimizer.state(), run.progress)
            saved = now
        if now - scored > SCORE_SECONDS:
            score(run)
            scored = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default="tiny-chat")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and vocabulary")
    parser.add_argument("--checkpoint", type=Path, help="start from this checkpoint instead of the one in --work")
    parser.add_argument("--export", type=Path, help="write the Hugging Face folder here at the end")
    parser.add_argument(
        "--until", metavar="HH:MM", help="decay the learning rate so that the run ends at this time (UTC)"
    )
    parser.add_argument(
        "--decay-share", type=float, default=0.5, help="last part of the time until --until that decays"
    )
    parser.add_argument("--peak", type=float, default=1.0, help="share of the peak rates, to polish a finished model")
    parser.add_argument("--finish", type=int, metavar="STEPS", help="decay over this many steps, then end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile: a fifth faster"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = prepare(arguments)
    train(run, arguments)
    score(run)
    if arguments.finish is None:
        save_checkpoint(arguments.work / f"{arguments.model}-final.safetensors", run.optimizer.state(), run.progress)
    if arguments.export is not None:
        export_folder(arguments.export, run.weights, run.tokenizer, run.progress)


if __name__ == "__main__":
    main()
