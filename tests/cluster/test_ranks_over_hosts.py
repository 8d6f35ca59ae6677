"""Goal: a replica whose ranks are on two hosts answers as one process does, and survives what happens between hosts.

Method: network namespaces with addresses of their own, a node on each, with keys; ids of concurrent streams over
ZeroMQ, in float32, are compared with those of a single worker. A rank, a follower and the leader are killed, and a
cable is pulled.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmscale import Client, SamplingParams
from tests.family import alive_after
from tests.fleet import Fleet
from tests.host_group import Followers
from tests.network import CannotMakeHosts, Host, hosts
from tests.processes import wait_until
from tests.support_processes import NodeProcess

PROMPTS = ([1, 2, 3], [9, 8, 7, 6], [40, 41], [300, 2, 300])
TOKENS = 900
LAYOUTS = [("-pp", "2"), ("-tp", "2"), ("-pp", "4"), ("-tp", "2", "-pp", "2"), ("-tp", "4")]
MODEL = ("--model", "tiny-chat-mini", "--no-spare-worker")


def answers(
    fleet: Fleet, running: NodeProcess, on_tokens: Callable[[int], None] | None = None, tokens: int = TOKENS
) -> list[list[int]]:
    """Ids of concurrent streams; calls back with the tokens of the first one so far."""
    with Client(running.address, keys=fleet.client(), connect_timeout=120) as client:

        def ask(number: int) -> list[int]:
            params = SamplingParams(max_tokens=tokens, temperature=1.2, seed=number, ignore_eos=True)
            ids: list[int] = []
            with client.stream(PROMPTS[number], params, timeout=300) as stream:
                for chunk in stream:
                    ids += chunk.token_ids
                    if on_tokens is not None and number == 0:
                        on_tokens(len(ids))
            return ids

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(ask, range(len(PROMPTS))))


@dataclass
class Group:
    """A replica on two hosts."""

    fleet: Fleet
    hosts: tuple[Host, Host]
    layout: tuple[str, ...]
    folder: Path
    leader: NodeProcess
    followers: Followers

    def check_while(self, happens: Callable[[], None], expected: list[list[int]]) -> None:
        """Streams; something happens in the middle, once; the ids are those of an undisturbed run."""
        happened: list[int] = []

        def on_tokens(tokens: int) -> None:
            if not happened:
                happened.append(tokens)
                happens()

        assert answers(self.fleet, self.leader, on_tokens) == expected
        assert happened
        assert happened[0] < TOKENS


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one switch."""
    with ExitStack() as running:
        try:
            a, b = running.enter_context(hosts("a", "b"))
        except CannotMakeHosts as error:
            pytest.skip(f"this machine cannot make hosts: {error}")
        yield a, b


@pytest.fixture(scope="module")
def expected(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The ids of one worker."""
    with fleet.node(tmp_path_factory.mktemp("alone"), *MODEL) as alone:
        return answers(fleet, alone)


@contextmanager
def leading(fleet: Fleet, options: tuple[str, ...], folder: Path, on: Host) -> Iterator[NodeProcess]:
    """The first host, when it serves."""
    folder.mkdir(exist_ok=True)
    # The port after the one of the hosts, which `group_options` has put last.
    port = int(options[-1].rpartition(":")[2]) + 1
    with fleet.node(folder, *MODEL, *options, "--host-index", "0", address=f"tcp://{on.address}:{port}", on=on) as node:
        yield node


def group_options(a: Host, layout: tuple[str, ...]) -> tuple[str, ...]:
    """What every host is told. Groups that run beside each other have other layouts, hence other ports."""
    port = 7_100 + 10 * LAYOUTS.index(layout)
    return (*layout, "--hosts", "2", "--max-join-seconds", "120", "--leader", f"{a.address}:{port}")


@contextmanager
def grouped(fleet: Fleet, network: tuple[Host, Host], layout: tuple[str, ...], folder: Path) -> Iterator[Group]:
    """A replica on both hosts that has run its first step."""
    a, b = network
    options = group_options(a, layout)
    keys = ("--key-file", str(fleet.keys / "node.key"), "--allow-list", str(fleet.keys / "allowed"))
    words = (*MODEL, "--dtype", "float32", "--threads", "1", *keys, *options)
    followers = Followers(folder, {1: b.words}, words)
    try:
        followers.start(1)
        with leading(fleet, options, folder, a) as leader:
            yield Group(fleet, network, layout, folder, leader, followers)
    finally:
        followers.close()


@pytest.fixture(scope="module")
def pipeline(fleet: Fleet, network: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """A stage on each host."""
    with grouped(fleet, network, ("-pp", "2"), tmp_path_factory.mktemp("pipeline")) as group:
        yield group


def test_stages_on_two_hosts_answer_as_one_process_does(pipeline: Group, expected: list[list[int]]) -> None:
    assert answers(pipeline.fleet, pipeline.leader) == expected


def test_a_rank_that_is_killed_on_the_other_host_costs_its_streams_time_only(
    pipeline: Group, expected: list[list[int]]
) -> None:
    [victim] = pipeline.followers.by_index[1].workers()
    before = pipeline.leader.worker().pid
    pipeline.check_while(victim.kill, expected)
    # The last token may be computed before the kill, and the next group is then told of after it.
    wait_until(lambda: pipeline.leader.worker().pid != before, 120, "the whole group is new")


def test_streams_go_on_when_the_other_hosts_node_is_killed_and_started_again(
    pipeline: Group, expected: list[list[int]]
) -> None:
    victim = pipeline.followers.by_index[1]
    ranks = victim.workers()

    def kill_and_replace() -> None:
        victim.process.kill()
        assert victim.process.wait(60) == -signal.SIGKILL
        assert not alive_after(ranks, 60), "the kernel ends a node's ranks with it"
        pipeline.followers.start(1)

    pipeline.check_while(kill_and_replace, expected)


def test_a_host_that_is_cut_off_is_named_and_taken_back_when_it_can_be_reached_again(
    pipeline: Group, expected: list[list[int]]
) -> None:
    _, b = pipeline.hosts
    follower = pipeline.followers.by_index[1]

    def cut_off_for_a_while() -> None:
        with b.unplugged():
            wait_until(lambda: "host 1 has said nothing for" in pipeline.leader.log(), 120, "the leader misses host 1")
            wait_until(lambda: "the leader is gone" in follower.log(), 120, "host 1 misses the leader")
            wait_until(lambda: not follower.workers(), 120, "its ranks have ended")

    pipeline.check_while(cut_off_for_a_while, expected)


def test_the_leaders_end_ends_the_ranks_everywhere_and_the_next_leader_finds_the_host_waiting(
    fleet: Fleet, network: tuple[Host, Host], expected: list[list[int]], tmp_path: Path
) -> None:
    a, _ = network
    with grouped(fleet, network, ("-tp", "2"), tmp_path) as group:
        assert answers(fleet, group.leader) == expected, "sums over two hosts"
        follower = group.followers.by_index[1]
        ranks = follower.workers()
        group.leader.process.kill()
        assert group.leader.process.wait(60) == -signal.SIGKILL
        assert not alive_after(ranks, 60), "ranks without a leader end"
        wait_until(lambda: "the leader is gone" in follower.log(), 120, "the follower notices")
        assert follower.process.poll() is None
        with leading(fleet, group_options(a, group.layout), tmp_path / "again", a) as again:
            assert answers(fleet, again) == expected


def test_a_group_whose_hosts_are_all_asked_to_end_ends_its_streams_first(
    fleet: Fleet, network: tuple[Host, Host], expected: list[list[int]], tmp_path: Path
) -> None:
    with grouped(fleet, network, ("-tp", "2"), tmp_path) as group:
        follower, asked_at = group.followers.by_index[1], list[int]()

        def ask(tokens: int) -> None:
            if not asked_at:
                asked_at.append(tokens)
                # As a launcher does; the other host is asked first, and has the longest to wait.
                follower.process.terminate()
                group.leader.process.terminate()

        # Fewer than a busy machine computes within a drain.
        ids = answers(fleet, group.leader, ask, tokens=TOKENS // 3)
        assert asked_at
        assert ids == [one[: TOKENS // 3] for one in expected]
        code, log = follower.end(60)
        assert code == 0, log
        assert group.leader.process.wait(60) == 0
        assert "a host left" not in group.leader.log()
        assert "worker died" not in group.leader.log()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[2:], ids="".join)
def test_larger_groups_on_two_hosts_answer_as_one_process_does(
    fleet: Fleet,
    network: tuple[Host, Host],
    expected: list[list[int]],
    layout: tuple[str, ...],
    tmp_path: Path,
) -> None:
    with grouped(fleet, network, layout, tmp_path) as group:
        assert answers(fleet, group.leader, tokens=100) == [ids[:100] for ids in expected]
