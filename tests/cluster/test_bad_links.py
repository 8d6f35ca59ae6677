"""Goal: connections that delay, stand still in one direction or both, and break with bytes on their way cost time only.

Method: two nodes with keys, two gateways, and a proxy on each of the four ways between them, whose troubles come from a
seed that a failure names. Both gateways are under a load that never stops; every event of every client is compared with
an undisturbed run in float32.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.bad_link import BadLink, bad_link
from tests.chaos.client import Load, undisturbed
from tests.chaos.history import History, faults
from tests.chaos.test_kills import BODIES, all_ready
from tests.fleet import Fleet
from tests.processes import Server, wait_until

pytestmark = pytest.mark.usefixtures("slow_processor")

STREAMS = 3
STALLS = ("there", "back", "both")


@pytest.fixture
def links() -> Iterator[list[BadLink]]:
    """Filled by the test, so that a failure can say what they did."""
    made: list[BadLink] = []
    yield made
    print("troubles:", total(made))


def total(links: list[BadLink]) -> Counter[str]:
    """What all of them have done."""
    return sum((link.counts for link in links), Counter[str]())


@pytest.mark.parametrize("cuts", [8, pytest.param(80, marks=pytest.mark.slow)])
def test_streams_through_bad_networks_come_as_through_good_ones(
    fleet: Fleet, tmp_path: Path, links: list[BadLink], cuts: int
) -> None:
    seed = int(os.environ.get("LLMSCALE_CHAOS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"LLMSCALE_CHAOS_SEED={seed} makes these networks again")
    with ExitStack() as stack:
        nodes = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            nodes.append(stack.enter_context(fleet.node(tmp_path / name)))
        gateways: list[Server] = []
        for edge in range(2):
            ways = [bad_link(node.address, seed + 10 * edge + at) for at, node in enumerate(nodes)]
            opened = [stack.enter_context(way) for way in ways]
            links.extend(opened)
            gateways.append(stack.enter_context(fleet.gateway(*(link.address for link in opened))))
        for server in gateways:
            wait_until(lambda server=server: all_ready(server), 120, "both nodes are ready")
        references = undisturbed(gateways[0], BODIES)
        histories = [History() for _ in gateways]
        with ExitStack() as running:
            pairs = zip(gateways, histories, strict=True)
            loads = [Load(server, BODIES, history) for server, history in pairs]
            looks = [running.enter_context(load.running(STREAMS)) for load in loads]
            for link in links:
                link.misbehave()
            wait_until(lambda: total(links)["cut"] >= cuts, 360, f"{cuts} connections were cut")
            wait_until(lambda: all(total(links)[what] for what in STALLS), 120, "every way has stood still")
            for link in links:
                link.behave()
            for look in looks:
                look()
        for server, history in zip(gateways, histories, strict=True):
            found = faults(history, references)
            assert not found, "\n".join([*found, server.log()])
            wait_until(
                lambda server=server: all_ready(server),
                30,
                "both nodes can be reached again",
                seen=lambda server=server: f"{server.replicas()}\n{server.log()}\n{[node.log() for node in nodes]}",
            )
            wait_until(lambda server=server: server.get("/fleet").json()["live_requests"] == 0, 120, "all is forgotten")
        assert sum(server.metric("front_lost_attempts_total") for server in gateways) > 0, "streams were hit"
