"""Goal: docs/guides/model-over-hosts.md can be typed as it stands.

Method: every command of the guide, block by block, on two hosts that are network namespaces.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guides import SERVER, blocks_of, typing_place
from tests.processes import wait_until


@pytest.mark.slow
def test_the_guide_to_a_model_over_hosts_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    blocks = blocks_of("model-over-hosts.md")
    assert [name for name, _ in blocks] == ["host-a", "host-a", "host-b", "host-a"]
    (_, keys), (_, leader), (_, follower), (_, question) = blocks
    with typing_place(tmp_path, ("host-a", "host-b")) as place, ExitStack() as running:
        place.run("host-a", keys)
        assert SERVER.search(leader)
        log = running.enter_context(place.running("host-a", leader))
        running.enter_context(place.running("host-b", follower))
        wait_until(lambda: "node is ready" in log.read_text(), 120, "the group is ready")
        assert place.run("host-a", question).strip()
