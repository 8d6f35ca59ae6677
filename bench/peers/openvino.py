"""OpenVINO GenAI's continuous batching. `--model` must have been exported beside the folder, as FOLDER-openvino, with
`optimum-cli export openvino -m FOLDER --task text-generation-with-past --weight-format fp16 FOLDER-openvino`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.script import arguments, report


def main() -> None:
    """Runs in an environment with openvino-genai."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    given = arguments()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 4_096
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": given.threads}
    pipeline = genai.ContinuousBatchingPipeline(f"{given.model}-openvino", scheduler, "CPU", properties)

    def generate(prompts: Sequence[list[int]], output_tokens: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(tensors, [config] * len(prompts))
        assert all(len(result.m_generation_ids[0]) == output_tokens for result in results), "another number of tokens"

    report(given, generate)


if __name__ == "__main__":
    main()
