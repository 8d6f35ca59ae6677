"""vLLM's CPU backend, prefix caching off. Reads VLLM_CPU_KVCACHE_SPACE (GiB) and vLLM's other variables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bench.peers.script import arguments, report


def main() -> None:
    """Runs in an environment with vLLM built for CPUs."""
    given = arguments()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{given.threads - 1}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=given.model,
        dtype="bfloat16",
        max_model_len=4_096,
        max_num_seqs=64,
        max_num_batched_tokens=4_096,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: Sequence[list[int]], output_tokens: int) -> None:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_tokens, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == output_tokens for output in outputs), "another number of tokens"

    report(given, generate)


if __name__ == "__main__":
    main()
