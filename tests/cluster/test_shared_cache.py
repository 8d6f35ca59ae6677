"""Goal: what one gateway had a node compute, another gateway of the fleet finds in the node's cache.

Method: a node with keys and two gateways; the usage of equal prompts says how many of their tokens were cached.
"""

from __future__ import annotations

from pathlib import Path

from tests.fleet import Fleet
from tests.processes import Server, wait_until

# Placed blindly, all of them would be lucky once in 64 times.
CONVERSATIONS = 6
# Prefixes of 128 tokens in the beginning of each.
NAMED_PREFIXES = 2
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


def conversation(number: int, sentences: int) -> dict[str, object]:
    told = (f"Sentence {at} of tale {number} names {at * 7 + number} ships and {at} bells." for at in range(sentences))
    prompt = f"Tale {number}. " + " ".join(told)
    return {"model": "tiny-chat", "prompt": prompt, "max_tokens": 4, "temperature": 0}


def test_a_gateway_knows_from_the_nodes_what_another_gateway_had_computed(fleet: Fleet, tmp_path: Path) -> None:
    """Each conversation begins at one gateway and goes on at the other, which has sent none of it anywhere."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with (
        fleet.node(folders[0]) as one,
        fleet.node(folders[1]) as two,
        fleet.gateway(one, two) as first,
        fleet.gateway(one, two) as second,
    ):
        for server in (first, second):
            wait_until(lambda server=server: both_ready(server), 120, "both nodes are ready")
        for number in range(CONVERSATIONS):
            assert first.post("/v1/completions", conversation(number, 12)).status_code == 200
        named = CONVERSATIONS * NAMED_PREFIXES
        wait_until(lambda: second.metric("front_known_prefixes") >= named, 120, "the second gateway has heard of all")
        for number in range(CONVERSATIONS):
            answer = second.post("/v1/completions", conversation(number, 18))
            found = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert found >= NAMED_PREFIXES * 128, f"conversation {number} was sent where its beginning is not"


def both_ready(server: Server) -> bool:
    return server.states() == ["ready"] * 2
