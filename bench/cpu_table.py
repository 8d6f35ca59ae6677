"""What `bench cpu` asks for and what came out: ratios to the best peer beside the least that is wanted and the aim.

A question names a case and a class of formats, or none where every runtime may use its best one. Throughputs are judged
by their ratio to the best peer of the same run, because machines differ; times that a person waits are judged as they
are. The best of a runtime is the variant with the best median. O(variants) per question. Knows nothing of how anything
was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.cpu_cases import OURS, PEERS, VARIANTS, Measured, Variant
from bench.statistics import Spread

Best = tuple[Variant, Spread]
Shares = dict[tuple[str, str, str], float | None]
"""Of a limit of the machine, by scheme, model and case of ours."""
ODD_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Question:
    """One line of the table. `must` and `aim` are ratios to the best peer, or values in `unit` where `is_absolute`."""

    model: str
    case: str
    scheme: str | None
    must: float
    aim: float
    unit: str = "tokens/s"
    is_absolute: bool = False
    is_less_better: bool = False

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.model}/{self.case}" + (f" {self.scheme}" if self.scheme else "")

    @property
    def is_served(self) -> bool:
        """Whether a server is asked for, which OpenVINO is not."""
        return self.case.startswith(("served", "mixed", "start"))

    def better(self, left: float, right: float) -> bool:
        """Whether `left` is strictly better."""
        return left < right if self.is_less_better else left > right

    def meets(self, reached: float, wanted: float) -> bool:
        """Whether a ratio or value is enough."""
        return not self.better(wanted, reached)


def _less(model: str, case: str, unit: str, must: float, aim: float) -> Question:
    return Question(model, case, None, must, aim, unit, is_absolute=True, is_less_better=True)


QUESTIONS = (
    Question("S", "prefill512", None, 1.0, 1.34),
    Question("S", "prefill2048", None, 1.2, 1.67),
    Question("S", "decode1", "bf16", 1.2, 1.6),
    Question("S", "decode1", "int8", 1.8, 2.5),
    Question("S", "decode1", "int4", 1.4, 2.1),
    Question("S", "batch8", None, 1.4, 1.8),
    Question("S", "batch32", None, 1.5, 2.1),
    Question("M", "prefill512", None, 1.0, 1.1),
    Question("M", "prefill2048", None, 1.1, 1.2),
    Question("M", "decode1", "bf16", 1.0, 1.2),
    Question("M", "decode1", "int8", 1.2, 1.4),
    Question("M", "decode1", "int4", 1.3, 1.5),
    Question("M", "batch8", None, 1.4, 1.8),
    Question("M", "batch32", None, 1.4, 1.8),
    Question("L", "prefill512", None, 1.0, 1.1),
    Question("L", "prefill2048", None, 1.1, 1.2),
    Question("L", "decode1", "bf16", 1.0, 1.1),
    Question("L", "decode1", "int8", 1.2, 1.4),
    Question("L", "decode1", "int4", 1.3, 1.5),
    Question("L", "batch8", None, 1.5, 1.9),
    Question("L", "batch32", None, 1.4, 1.7),
    Question("S", "served64", None, 1.4, 2.0),
    _less("S", "served64/gap-p99", "ms", 60, 30),
    Question("S", "mixed/share", None, 0.65, 0.75, "of unloaded", is_absolute=True),
    _less("S", "mixed/gap-p99", "ms", 80, 40),
    _less("S", "mixed/long-first-token", "ms", 700, 500),
    Question("tiny", "served/requests", None, 2.0, 4.0, "requests/s"),
    Question("tiny", "served/streamed", None, 3.0, 5.0),
    _less("tiny", "served/round-trip", "ms", 1.2, 0.6),
    _less("S", "start/first-token", "s", 1.5, 0.7),
    _less("S", "start/resident", "MiB", 700, 500),
)
"""M's ratios lie between those of S and L, because no complete row of it was known when they were set."""


def best(question: Question, measured: Measured, runtimes: Iterable[str]) -> Best | None:
    """The best variant of these runtimes; None where none was measured."""
    found: Best | None = None
    for (variant, model, case), value in measured.items():
        is_asked = (model, case) == (question.model, question.case) and question.scheme in (None, variant.scheme)
        if not is_asked or variant.runtime not in runtimes or isinstance(value, str):
            continue
        if found is None or question.better(value.median, found[1].median):
            found = variant, value
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with what was measured."""

    question: Question
    ours: Best | None
    peer: Best | None

    @property
    def reached(self) -> float | None:
        """What `must` and `aim` are compared with; None where something is missing for it."""
        if self.ours is None or (self.peer is None and not self.question.is_absolute):
            return None
        if self.question.is_absolute or self.peer is None:
            return self.ours[1].median
        return self.ours[1].median / self.peer[1].median

    @property
    def verdict(self) -> str:
        """aim, must, BELOW, or why there is none."""
        if self.reached is None:
            return "not measured" if self.ours is None else "no peer"
        if self.question.meets(self.reached, self.question.aim):
            return "aim"
        return "must" if self.question.meets(self.reached, self.question.must) else "**BELOW**"


def answers(measured: Measured, questions: Sequence[Question] = QUESTIONS) -> list[Answer]:
    """Of the questions about which anything was measured."""
    asked = {(model, case) for _, model, case in measured}
    return [
        Answer(question, best(question, measured, (OURS,)), best(question, measured, PEERS))
        for question in questions
        if (question.model, question.case) in asked
    ]


def markdown(measured: Measured, shares: Shares) -> str:
    """The questions with their verdicts, every variant of every case, and the odd shape beside S."""
    return "\n".join([*_questions(measured, shares), "", *_grid(measured), *_odd(shares)])


def _questions(measured: Measured, shares: Shares) -> list[str]:
    head = ["case", "unit", "llmscale", "of limit", *PEERS, "reached", "must", "aim", "verdict"]
    lines = [_row(head), _row(["---"] * len(head))]
    for answer in answers(measured):
        question = answer.question
        share = None
        if answer.ours is not None:
            share = shares.get((answer.ours[0].scheme, question.model, question.case))
        suffix = "" if question.is_absolute else "x"
        cells = [question.name, question.unit, _best_cell(answer.ours), "-" if share is None else f"{share:.0%}"]
        cells += [_peer_cell(question, measured, peer) for peer in PEERS]
        cells.append("-" if answer.reached is None else number(answer.reached) + suffix)
        lacking = [] if question.is_absolute or answer.reached is None else _lacking(question, measured)
        verdict = f"{answer.verdict}, without {' and '.join(lacking)}" if lacking else answer.verdict
        lines.append(_row([*cells, f"{question.must:g}{suffix}", f"{question.aim:g}{suffix}", verdict]))
    return lines


def _lacking(question: Question, measured: Measured) -> list[str]:
    """Peers that could have been the best one and were not measured: a ratio without them is no answer yet."""
    able = {variant.runtime for variant in VARIANTS if question.scheme in (None, variant.scheme)}
    able -= {"openvino"} if question.is_served else set()
    return [peer for peer in PEERS if peer in able and best(question, measured, (peer,)) is None]


def _odd(shares: Shares) -> list[str]:
    """What the shape that nothing is tuned for reaches of its limits, beside what S reaches of its own."""
    head = ["share of the limit", "odd", "S", "odd / S", "must"]
    lines = []
    for (scheme, model, case), share in shares.items():
        other = shares.get((scheme, "S", case))
        if model == "odd" and share is not None and other is not None:
            cells = [f"{case} {scheme}", f"{share:.0%}", f"{other:.0%}", f"{number(share / other)}x", f"{ODD_SHARE:g}x"]
            lines.append(_row(cells))
    return ["", _row(head), _row(["---"] * len(head)), *lines] if lines else []


def _grid(measured: Measured) -> list[str]:
    cases = list(dict.fromkeys((model, case) for _, model, case in measured))
    variants = list(dict.fromkeys(variant for variant, _, _ in measured))
    lines = [_row(["case", *(variant.name for variant in variants)]), _row(["---"] * (len(variants) + 1))]
    for model, case in cases:
        values = [measured.get((variant, model, case), "-") for variant in variants]
        lines.append(_row([f"{model}/{case}", *map(_cell, values)]))
    return lines


def _peer_cell(question: Question, measured: Measured, peer: str) -> str:
    found = best(question, measured, (peer,))
    if found is not None:
        return _best_cell(found)
    # Every variant of it says why; the first speaks for all.
    for (variant, model, case), value in measured.items():
        if variant.runtime == peer and (model, case) == (question.model, question.case) and isinstance(value, str):
            return value
    return "-"


def _best_cell(found: Best | None) -> str:
    return "-" if found is None else f"{_cell(found[1])} {found[0].label}"


def _cell(value: Spread | str) -> str:
    if isinstance(value, str):
        return value
    return f"{number(value.median)} ({number(value.low)}-{number(value.high)})"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
