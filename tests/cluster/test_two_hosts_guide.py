"""Goal: docs/guides/two-hosts.md can be typed as it stands.

Method: every command of the guide, block by block, on four hosts that are network namespaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guides import SERVER, Place, blocks_of, typing_place
from tests.processes import wait_until

pytestmark = pytest.mark.usefixtures("slow_processor")

NAMES = ("host-a", "host-b", "edge-host", "client")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Four hosts."""
    with typing_place(tmp_path, NAMES) as places:
        yield places


@pytest.mark.slow
def test_the_guide_can_be_typed_as_it_stands(place: Place) -> None:
    blocks = blocks_of("two-hosts.md")
    assert [name for name, _ in blocks] == [
        "edge-host",
        "host-a",
        "host-b",
        "edge-host",
        "client",
        "client",
        "client",
    ]
    (_, keys), *nodes, (_, gateway), (_, question), (_, story), (_, fleet) = blocks
    with ExitStack() as running:
        place.run("edge-host", keys)
        for name, script in nodes:
            assert SERVER.search(script)
            log = running.enter_context(place.running(name, script))
            wait_until(lambda log=log: "node is ready" in log.read_text(), 120, f"{name} is ready")
        log = running.enter_context(place.running("edge-host", gateway))
        wait_until(lambda: "gateway listens" in log.read_text(), 120, "the gateway listens")
        answer = json.loads(place.run("client", question))
        assert answer["usage"]["completion_tokens"] > 0

        def states() -> list[str]:
            return [one["state"] for one in json.loads(place.run("client", fleet))["replicas"]]

        wait_until(lambda: states() == ["ready"] * 2, 120, "both nodes are ready")
        check_that_a_host_can_be_taken_away(place, story, fleet)


def check_that_a_host_can_be_taken_away(place: Place, story: str, fleet: str) -> None:
    """A long answer goes on while the host that computes it has no cable, and its client sees a comment."""
    output = place.of("client") / "story"
    script = story.rstrip() + " > story"
    with place.running("client", script):

        def busy() -> list[int]:
            replicas = json.loads(place.run("client", fleet))["replicas"]
            return [number for number, one in enumerate(replicas) if one["running"]]

        wait_until(lambda: bool(busy()), 120, "a node runs the stream")
        # The gateway lists nodes in the order in which it was given them.
        with place.hosts[NAMES[busy()[0]]].unplugged():
            wait_until(lambda: "data: [DONE]" in output.read_text(), 120, "the stream has ended")
    text = output.read_text()
    assert ": restarts 1" in text
    assert '"finish_reason":"length"' in text
