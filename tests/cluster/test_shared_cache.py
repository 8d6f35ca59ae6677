"""Goal: what one gateway had a node compute, another gateway of the fleet finds in the node's cache.

Method: a node with keys and two gateways; the usage of equal prompts says how many of their tokens were cached.
"""

from __future__ import annotations

from pathlib import Path

from tests.fleet import Fleet
from tests.processes import Server

PROMPT = "Once upon a time there was a fox who liked to count. " * 12


def cached_tokens(server: Server) -> int:
    answer = server.post("/v1/completions", {"model": "tiny-chat", "prompt": PROMPT, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_gateways_of_one_fleet_share_the_cache_of_its_nodes(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.node(tmp_path) as node, fleet.gateway(node) as first, fleet.gateway(node) as second:
        assert cached_tokens(first) == 0
        assert cached_tokens(second) >= 64
