"""Goal: what the host tier has no room for goes to a file and comes back, after a node's death too, and no id shows it.

Method: tiny-chat in float32 with a pool of two conversations and a host tier of four, offline and served; ids are
compared with those of a pool that holds everything. Real nodes are killed, real bytes of the file overwritten, and the
real limit on the size of files lowered under a worker that writes.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from llmscale import LLM
from llmscale.errors import ConfigError
from llmscale.node.disk_folder import DiskFolder
from tests.e2e.test_host_tier import (
    ANSWER_TOKENS,
    CONVERSATIONS,
    MAX_TOKENS,
    POOL_BLOCKS,
    answers,
    ask,
    block_bytes,
    conversation,
    llm,
    serve_options,
    two_turns,
)
from tests.processes import Server, serving, wait_until

HOST_BLOCKS = 32
DISK_BLOCKS = 256
# Of a place in the file, what is not its bytes, and of the index; see docs/guides/serving.md.
DISK_BYTES = DISK_BLOCKS * (block_bytes() + 4_096 + 32 + 216) + 2 * (4_096 + 32)
MORE_CONVERSATIONS = 24

pytestmark = pytest.mark.usefixtures("slow_processor")


def disk_llm(folder: Path, pool_blocks: int = POOL_BLOCKS) -> LLM:
    return LLM(
        "tiny-chat",
        dtype="float32",
        max_model_len=MAX_TOKENS,
        max_num_seqs=8,
        kv_cache_bytes=pool_blocks * block_bytes(),
        kv_host_bytes=HOST_BLOCKS * block_bytes(),
        kv_disk=folder,
        kv_disk_bytes=DISK_BYTES,
        threads=1,
    )


def first_turns(model: LLM, conversations: range) -> list[tuple[int, ...]]:
    return [answers(model, [conversation(number, 200)], ANSWER_TOKENS)[0] for number in conversations]


def places(folder: Path) -> list[int]:
    """Where in the file of rank 0 the bytes of each place begin that holds something."""
    path = folder / "rank-0.kv"
    size = path.stat().st_size
    stride = (size - 4_096) // DISK_BLOCKS
    with path.open("rb") as file:
        starts = range(4_096, size, stride)
        return [start + 32 for start in starts if os.pread(file.fileno(), 8, start) != bytes(8)]


def overwrite(folder: Path) -> None:
    """Every place's first bytes, as no checksum would have them."""
    with (folder / "rank-0.kv").open("r+b") as file:
        for start in places(folder):
            file.seek(start)
            file.write(b"\xa5" * 64)


def test_conversations_come_back_from_the_disk_in_this_process_and_in_the_next_and_say_the_same(
    tmp_path: Path,
) -> None:
    roomy, tight = llm(512, 0), disk_llm(tmp_path)
    assert two_turns(tight) == two_turns(roomy)
    tight._replica.check()
    written, read, bad, failed, waits = tight._replica.disk_blocks()
    # A read that takes longer than computing is not waited for, as happens on a busy machine.
    assert written >= CONVERSATIONS
    assert read >= CONVERSATIONS
    assert (bad, failed, waits) == (0, 0, 0)
    tight.close()

    again = disk_llm(tmp_path)
    assert two_turns(again) == two_turns(roomy)
    _, read, bad, _, waits = again._replica.disk_blocks()
    cached = again._replica.load()[5]
    assert read >= CONVERSATIONS
    assert cached >= CONVERSATIONS * 32
    assert (bad, waits) == (0, 0)


def test_what_lies_there_is_of_this_user_alone_and_no_larger_than_was_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    model = disk_llm(folder)
    first_turns(model, range(MORE_CONVERSATIONS))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {path.name: path.stat() for path in folder.iterdir()}
    assert set(files) == {"index", "key", "lock", "rank-0.kv"}
    assert {stat.S_IMODE(facts.st_mode) for facts in files.values()} == {0o600}
    assert sum(facts.st_size for facts in files.values()) <= DISK_BYTES + 4_096
    with pytest.raises(ConfigError, match="belongs to another node that runs; give every node a folder of its own"):
        DiskFolder(folder)
    model.close()
    DiskFolder(folder).close()


def test_overwritten_bytes_of_the_file_are_misses(tmp_path: Path) -> None:
    roomy, tight = llm(512, 0), disk_llm(tmp_path)
    first_turns(tight, range(CONVERSATIONS))
    tight.close()
    overwrite(tmp_path)
    again = disk_llm(tmp_path)
    assert first_turns(again, range(CONVERSATIONS)) == first_turns(roomy, range(CONVERSATIONS))
    _, read, bad, _, _ = again._replica.disk_blocks()
    assert read == 0
    assert bad > 0


def test_another_model_on_the_same_folder_finds_nothing_and_does_no_harm(tmp_path: Path) -> None:
    tight = disk_llm(tmp_path)
    first_turns(tight, range(CONVERSATIONS))
    tight.close()
    other = LLM(
        "tiny-chat",
        dtype="float32",
        quantization="int8",
        max_model_len=MAX_TOKENS,
        kv_cache_bytes=POOL_BLOCKS * block_bytes(),
        kv_host_bytes=HOST_BLOCKS * block_bytes(),
        kv_disk=tmp_path,
        kv_disk_bytes=DISK_BYTES,
        threads=1,
    )
    first_turns(other, range(2))
    assert other._replica.disk_blocks()[1] == 0
    assert other._replica.load()[5] == 0


def disk_options(folder: Path, *more: str, pool_blocks: int = POOL_BLOCKS) -> tuple[str, ...]:
    disk = ("--kv-disk", str(folder), "--kv-disk-bytes", str(DISK_BYTES))
    return serve_options(*disk, *more, host_blocks=HOST_BLOCKS, pool_blocks=pool_blocks)


def counted(server: Server, which: str) -> float:
    """A counter of the only replica, as /metrics says."""
    lines = [line.split() for line in server.get("/metrics").text.splitlines()]
    name = f"llmscale:kv_disk_{which}_total{{"
    (count,) = [float(words[1]) for words in lines if words and words[0].startswith(name)]
    return count


def node_of(server: Server) -> psutil.Process:
    (node,) = [one for one in server.family() if "llmscale.node" in " ".join(one.cmdline())]
    return node


def texts(asked: Sequence[tuple[list[str], int]]) -> list[list[str]]:
    return [text for text, _ in asked]


def test_a_killed_node_finds_its_disk_again_and_conversations_go_on_from_there(tmp_path: Path) -> None:
    with serving("tiny-chat", *disk_options(tmp_path)) as server:
        first = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        wait_until(lambda: counted(server, "written_blocks") > 0, 120, "the node has told of its writes")
        node = node_of(server)
        node.send_signal(signal.SIGKILL)
        wait_until(lambda: not node.is_running() and server.is_ready(), 120, "another node is ready")
        again = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        assert texts(again) == texts(first)
        # Its memory began empty, so what was cached came from the disk.
        found = sum(cached for _, cached in again) / 32
        assert found >= MORE_CONVERSATIONS / 2
        wait_until(
            lambda: counted(server, "read_blocks") >= MORE_CONVERSATIONS / 2, 120, "the node has told of its reads"
        )
        assert counted(server, "bad_blocks") == 0
        assert counted(server, "waits") == 0


def test_a_full_disk_ends_no_request(tmp_path: Path) -> None:
    with serving("tiny-chat", *disk_options(tmp_path)) as server:
        worker = server.worker_pid()
        # From here on the file takes nothing beyond its first places.
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        first = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        again = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        assert texts(again) == texts(first)
        wait_until(lambda: counted(server, "failed_writes") > 0, 120, "the node has told of its failures")
        assert server.worker_pid() == worker, "a full disk is no reason to end a worker"


def test_every_rank_of_a_group_has_a_file_and_a_block_that_one_lacks_is_a_miss(tmp_path: Path) -> None:
    with serving("tiny-chat", *disk_options(tmp_path, "-tp", "2")) as server:
        first = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        again = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        assert texts(again) == texts(first)
        (folder,) = tmp_path.iterdir()
        assert {"rank-0.kv", "rank-1.kv"} <= {path.name for path in folder.iterdir()}
        wait_until(lambda: counted(server, "read_blocks") > 0, 120, "the node has told of its reads")
        worker = server.worker_pid()
        path = folder / "rank-1.kv"
        with path.open("r+b") as file:
            for start in range(4_096, path.stat().st_size, 4_096):
                file.seek(start)
                file.write(bytes(32))
        third = [ask(server, number) for number in range(MORE_CONVERSATIONS)]
        assert texts(third) == texts(first)
        wait_until(lambda: counted(server, "bad_blocks") > 0, 120, "bad blocks were found and counted")
        assert server.worker_pid() == worker, "what one rank lacks is no reason to end the group"
