"""Goal: a fleet is started anew, node by node, while its clients notice nothing.

Method: two replicas under a load that never stops; SIGTERM to one node, which drains and ends, and is started again;
then the other. Every event of every client is compared with an undisturbed run in float32.
"""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.chaos.client import Load, undisturbed
from tests.chaos.history import History, faults
from tests.chaos.test_kills import BODIES, all_ready
from tests.processes import Server, serving_fleet, wait_until

STREAMS = 6
# On a busy machine a node that lives may say nothing for seconds.
FLEET = """
max_node_silence_seconds = 30
[models.tiny-chat]
model = "tiny-chat"
dtype = "float32"
replicas = 2
"""


def restart(server: Server, worker: int) -> None:
    """Drains the node of a worker, and waits until its successor would take a request."""
    node = psutil.Process(worker).parent()
    assert node is not None
    node.send_signal(signal.SIGTERM)
    wait_until(lambda: not node.is_running(), 120, "the node has drained and ended")
    # What the fleet says of the node that has ended may look ready for a moment, or never look otherwise.
    wait_until(lambda: is_ready_without(server, worker), 120, "its successor is ready")
    wait_until(lambda: both_take_streams(server), 120, "both replicas run streams")


def workers(server: Server) -> list[int]:
    """The process ids of both."""
    return [one["worker_pid"] for one in server.replicas()]


def is_ready_without(server: Server, worker: int) -> bool:
    """Whether both replicas would take a request, and this worker is in neither."""
    return all(one["state"] == "ready" and one["worker_pid"] != worker for one in server.replicas())


def both_take_streams(server: Server) -> bool:
    """Whether streams can be handed over from either to the other. One whose first tokens came late, on a machine that
    reads torch from its disk, is left alone for a while; then streams end where they are."""
    return all(one["running"] and one["trust"] == "trusted" for one in server.replicas())


@pytest.mark.usefixtures("slow_processor")
def test_a_rolling_restart_under_load_loses_no_stream(tmp_path: Path) -> None:
    with serving_fleet(tmp_path, FLEET) as server:
        wait_until(lambda: all_ready(server), 120, "both replicas are ready")
        references = undisturbed(server, BODIES)
        old = workers(server)
        history = History()
        with Load(server, BODIES, history).running(STREAMS) as look:
            wait_until(lambda: both_take_streams(server), 120, "both replicas run streams")
            for worker in old:
                restart(server, worker)
                look()
        assert faults(history, references) == []
        assert server.metric("front_moved_attempts_total") > 0, "streams were handed over"
        assert server.metric("front_lost_attempts_total") == 0, "no node ended with work"
