"""`llmscale generate`: one completion in this process."""

from __future__ import annotations

import sys

from llmscale.llm import LLM
from llmscale.types import SamplingParams


def run(prompt: str, model: str, max_tokens: int, temperature: float) -> None:
    """Prints the prompt's completion."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    output = LLM(model).generate(prompt, params)[0]
    sys.stdout.write(prompt + output.outputs[0].text + "\n")
