"""The worker on a device: ids of the CPU worker in float32, graphs, blocks that come back, memory, NCCL of one rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed

from llmscale import LLM, SamplingParams
from llmscale.devices.registry import choose, open_device
from llmscale.parallel.tensor import TorchGroup
from llmscale.worker import step_memory
from tests.devices.test_worker_on_a_device import ASKED, PROMPTS, ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SIZES: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 12, "max_num_batched_tokens": 96, "executor": "torch"}


@pytest.fixture(scope="module")
def cuda() -> LLM:
    return LLM("tiny-chat", **SIZES, device="cuda", kv_cache_bytes=256 << 20)


@pytest.fixture(scope="module")
def cpu() -> LLM:
    return LLM("tiny-chat", **SIZES, device="cpu")


def test_a_device_that_is_there_is_chosen() -> None:
    assert choose("auto") == "cuda"


def test_ids_are_those_of_the_cpu(cuda: LLM, cpu: LLM) -> None:
    assert "/cuda-sm" in cuda.numerics
    assert ids(cuda) == ids(cpu)


@pytest.mark.parametrize("batch", range(1, 13))
def test_batches_of_any_size_are_decoded_alike(cuda: LLM, cpu: LLM, batch: int) -> None:
    prompts = [f"{number} and {number}" for number in range(batch)]
    asked = [SamplingParams(max_tokens=16, seed=number, ignore_eos=True) for number in range(batch)]
    assert ids(cuda, prompts, asked) == ids(cpu, prompts, asked)


def test_long_prompts_in_chunks_go_on_alike(cuda: LLM, cpu: LLM) -> None:
    prompts, asked = [list(range(20, 900))], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    ours, theirs = (llm.generate(prompts, asked)[0].outputs[0].token_ids for llm in (cuda, cpu))
    assert ours == theirs


def test_rows_that_the_device_cannot_sample_are_sampled_on_the_processor(
    cpu: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_memory, "MAX_CHANGES", 16)
    assert ids(LLM("tiny-chat", **SIZES, device="cuda", kv_cache_bytes=64 << 20)) == ids(cpu)


def test_conversations_come_back_from_the_host_and_say_the_same(cpu: LLM) -> None:
    block_bytes = 32 * 2 * 6 * 4 * 32 * 4
    options = {"max_model_len": 256, "kv_cache_bytes": 12 * block_bytes, "kv_host_bytes": 64 * block_bytes}
    squeezed = LLM("tiny-chat", **SIZES, device="cuda", **options)
    asked = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for _ in range(2):
        for number in range(5):
            prompt = [[20 + (number * 37 + position * 11) % 400 for position in range(150)]]
            ours, theirs = (llm.generate(prompt, asked)[0].outputs[0].token_ids for llm in (squeezed, cpu))
            assert ours == theirs
    _, offloaded, restored, bad = squeezed._replica.copied_blocks()
    assert offloaded > 0
    assert restored > 0
    assert bad == 0


def test_copies_are_calibrated_within_their_time_and_move_the_right_blocks_by_either_way() -> None:
    accelerator = open_device("cuda").accelerator
    assert accelerator is not None
    size, blocks = 64 << 10, 256
    started = time.monotonic()
    found = accelerator.calibrate_copies(size, 200_000_000)
    assert time.monotonic() - started < 10, "the kernel may have to be compiled"
    assert found.startswith("out: ")
    here = accelerator.pinned(blocks * size, torch.uint8).view(blocks, size)
    there = torch.randint(0, 256, (blocks, size), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for count in (1, 100):
        pairs = [(2 * index, 255 - 2 * index) for index in range(count)]
        accelerator.offload.copy_blocks(there, here, pairs)
        accelerator.offload.record().wait()
        for source, target in pairs:
            assert torch.equal(there[source].cpu(), here[target])


def test_bfloat16_and_quantized_models_run_with_all_of_the_memory() -> None:
    for options in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int4"}):
        llm = LLM("tiny-chat", device="cuda", max_num_seqs=8, **options)
        outputs = llm.generate(PROMPTS, ASKED)
        assert all(output.outputs[0].token_ids for output in outputs)
        del llm
        torch.cuda.empty_cache()


def test_a_capture_that_reads_something_back_is_refused() -> None:
    from llmscale.errors import WorkerError

    accelerator = open_device("cuda").accelerator
    assert accelerator is not None
    value = torch.ones(1, device="cuda")
    with pytest.raises(WorkerError, match="could not be captured"):
        accelerator.capture(value.item)


@pytest.fixture
def group() -> Iterator[TorchGroup]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1)
    world = torch.distributed.group.WORLD
    assert world is not None
    yield TorchGroup(world)
    torch.distributed.destroy_process_group()


def test_one_rank_meets_itself_over_nccl(group: TorchGroup) -> None:
    values = torch.randn(7, 64, device="cuda")
    expected = values.clone()
    assert torch.equal(group.sum(values), expected)
    out = torch.zeros(7, 64, device="cuda")
    assert torch.equal(group.deal_rows(expected, [64], [0, 7], out), expected)
    words = torch.arange(9, dtype=torch.int32)
    group.gather_words(words, [0, 9])
    assert words.tolist() == list(range(9))
