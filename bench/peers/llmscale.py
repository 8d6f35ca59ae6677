"""llmscale itself, in a process of its own like every peer, so that all start from the same state of the machine."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.script import arguments, report


def main() -> None:
    """Runs in llmscale's environment; `--scheme` is bf16, int8 or int4."""
    from llmscale import LLM, SamplingParams

    given = arguments()
    quantization = None if given.scheme == "bf16" else given.scheme
    llm = LLM(given.model, dtype="bfloat16", quantization=quantization, threads=given.threads)

    def generate(prompts: Sequence[list[int]], output_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        outputs = llm.generate(list(prompts), params)
        assert all(len(output.outputs[0].token_ids) == output_tokens for output in outputs), "another number of tokens"

    report(given, generate)


if __name__ == "__main__":
    main()
