"""Hosts that cannot be one replica say why within seconds, by the name of what is wrong. Real nodes, no ranks yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet import Fleet
from tests.host_group import host_process
from tests.processes import free_port, wait_until

MODEL = ("--model", "tiny-chat-mini", "-pp", "2", "--no-spare-worker")
END_SECONDS = 120.0
# Two that are started at once must meet within it, on a busy machine too; the test takes as long.
JOIN_SECONDS = 30.0


def options(port: int, index: int, *more: str, hosts: int = 2, wait: float = 100.0) -> tuple[str, ...]:
    words = (*MODEL, "--listen", f"tcp://127.0.0.1:{free_port()}", "--leader", f"127.0.0.1:{port}")
    return (*words, "--hosts", str(hosts), "--host-index", str(index), "--max-join-seconds", str(wait), *more)


@pytest.mark.parametrize(
    ("more", "hosts", "said"),
    [
        (("--dtype", "bfloat16"), 2, "its dtype is bfloat16, the leader's is float32"),
        (("--dtype", "float32", "--model", "tiny-chat"), 2, "its weights is "),
        (("--dtype", "float32", "--max-num-seqs", "8"), 2, "its max num seqs is 8, the leader's is 256"),
        (("--dtype", "float32", "-pp", "3"), 3, "its hosts is 3, the leader's is 2"),
    ],
    ids=["dtype", "model", "options", "count of hosts"],
)
def test_a_host_that_differs_ends_with_the_name_of_what_differs(
    more: tuple[str, ...], hosts: int, said: str, tmp_path: Path
) -> None:
    port = free_port()
    with (
        host_process(tmp_path, "leader", (), *options(port, 0, "--dtype", "float32")) as leader,
        host_process(tmp_path, "other", (), *options(port, 1, *more, hosts=hosts)) as other,
    ):
        code, log = other.end(END_SECONDS)
        assert code == 1
        assert said in log
        assert said in leader.log()


def test_a_leader_that_waits_in_vain_names_the_host_and_why_the_one_that_came_was_refused(tmp_path: Path) -> None:
    port = free_port()
    with host_process(tmp_path, "other", (), *options(port, 1, "--dtype", "bfloat16")) as other:
        # How long it takes to start is no part of the leader's time.
        wait_until(lambda: "waiting for the leader" in other.log(), END_SECONDS, "it waits")
        with host_process(tmp_path, "leader", (), *options(port, 0, "--dtype", "float32", wait=20.0)) as leader:
            code, log = leader.end(END_SECONDS)
            assert code == 1
            assert f"of 2 hosts, 1 did not come to tcp://127.0.0.1:{port} within 20 s" in log
            assert "its dtype is bfloat16, the leader's is float32" in log


def test_a_follower_without_a_leader_says_where_it_has_looked(tmp_path: Path) -> None:
    port = free_port()
    with host_process(tmp_path, "alone", (), *options(port, 1, wait=1.0)) as alone:
        code, log = alone.end(END_SECONDS)
        assert code == 1
        assert f"host 0, the leader, did not answer at tcp://127.0.0.1:{port} (--leader) within 1 s" in log
        assert "nothing listens there" in log


def test_a_leader_whose_port_is_taken_says_so_at_once(tmp_path: Path) -> None:
    port = free_port()
    with host_process(tmp_path, "first", (), *options(port, 0)) as first:
        wait_until(lambda: "waiting for hosts" in first.log(), END_SECONDS, "the first leader listens")
        with host_process(tmp_path, "second", (), *options(port, 0)) as second:
            code, log = second.end(END_SECONDS)
            assert code == 1
            assert f"host 0 cannot listen at tcp://127.0.0.1:{port} (--leader)" in log


def test_a_host_with_another_fleets_key_is_not_let_in_and_both_sides_say_that_it_is_the_key(
    fleet: Fleet, tmp_path: Path
) -> None:
    port = free_port()

    def keys(folder: Path) -> tuple[str, str, str, str]:
        return "--key-file", str(folder / "node.key"), "--allow-list", str(folder / "allowed")

    with (
        host_process(tmp_path, "leader", (), *options(port, 0, *keys(fleet.keys), wait=JOIN_SECONDS)) as leader,
        host_process(
            tmp_path, "stranger", (), *options(port, 1, *keys(fleet.strangers), wait=JOIN_SECONDS)
        ) as stranger,
    ):
        code, log = stranger.end(END_SECONDS)
        assert code == 1
        assert "did not accept this node's key" in log
        code, log = leader.end(END_SECONDS)
        assert code == 1
        assert "did not come" in log
        assert "joined" not in log


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    words = (*MODEL, "--hosts", "2", "--host-index", "1", "--leader", "198.18.0.9")
    with host_process(tmp_path, "bare", (), *words) as bare:
        code, log = bare.end(END_SECONDS)
        assert code == 1
        assert "no CURVE keys are configured" in log


def test_a_process_that_torchrun_starts_beside_the_one_that_acts_ends_politely(tmp_path: Path) -> None:
    launched = ("GROUP_RANK=1", "GROUP_WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2", "LOCAL_RANK=1", "WORLD_SIZE=4")
    words = ("env", *launched, "RANK=3", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29500")
    with host_process(tmp_path, "second", words, *MODEL) as second:
        code, log = second.end(END_SECONDS)
        assert code == 0
        assert "nothing to do" in log


def test_a_contradiction_of_the_launcher_is_named(tmp_path: Path) -> None:
    words = ("env", "LWS_GROUP_SIZE=2", "LWS_WORKER_INDEX=2", "LWS_LEADER_ADDRESS=127.0.0.1")
    with host_process(tmp_path, "lost", words, *MODEL) as lost:
        code, log = lost.end(END_SECONDS)
        assert code == 1
        assert "LWS_WORKER_INDEX is 2, but LWS_GROUP_SIZE is 2" in log


@pytest.mark.parametrize(("index", "waits"), [(0, "waiting for hosts"), (1, "waiting for the leader")])
def test_a_host_that_waits_ends_when_it_is_told_to(index: int, waits: str, tmp_path: Path) -> None:
    with host_process(tmp_path, "patient", (), *options(free_port(), index, wait=600.0)) as patient:
        wait_until(lambda: waits in patient.log(), END_SECONDS, "it waits")
        patient.process.terminate()
        code, log = patient.end(END_SECONDS)
        assert code == 0, log
