"""Goal: keys that `llmscale keys` makes work with every kind of process, and nothing else gets in.

Method: a real node that listens on every address of this machine; a gateway, the SDK, and plain pyzmq sockets that
speak the protocol as docs/wire.md has it, without a line of the SDK.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from llmscale import Client, SamplingParams, errors
from llmscale.client import CurveKeys
from tests.fleet import Fleet
from tests.processes import free_port
from tests.support_processes import NodeProcess

PROMPT = [300, 284, 223, 20, 483, 21]
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
# Hello: the versions that this front speaks, its name, its fleet, any model.
HELLO = msgpack.packb([1, 0, [[1, 1], "plain socket", "llmscale", None]])
WELCOME_TAG = 0
ENDS_OF_A_HANDSHAKE = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)
DEADLINE_MS = 60_000


@pytest.fixture(scope="module")
def open_node(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that other hosts reach."""
    port = free_port()
    folder: Path = tmp_path_factory.mktemp("node")
    with fleet.node(folder, address=f"tcp://127.0.0.1:{port}", listen=f"tcp://0.0.0.0:{port}") as started:
        yield started


@contextmanager
def plain_socket(address: str, keys: CurveKeys | None) -> Iterator[tuple[Any, str]]:
    """A DEALER that has tried one handshake, and how that ended, by the name of libzmq's event."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.reconnect_ivl = -1
        if keys is not None:
            dealer.curve_publickey, dealer.curve_secretkey = keys.public.encode(), keys.secret.encode()
            dealer.curve_serverkey = keys.server.encode()
        monitor = dealer.get_monitor_socket(ENDS_OF_A_HANDSHAKE)
        dealer.connect(address)
        assert monitor.poll(DEADLINE_MS), "the handshake neither succeeded nor failed"
        event = recv_monitor_message(monitor)["event"]
        try:
            yield dealer, zmq.Event(event).name
        finally:
            dealer.disable_monitor()
            monitor.close()


def test_a_node_with_made_keys_answers_its_client_and_its_gateway_alike(fleet: Fleet, open_node: NodeProcess) -> None:
    with Client(open_node.address, tokenizer="tiny-chat", keys=fleet.client()) as direct:
        expected = direct.generate(PROMPT, PARAMS).outputs[0].text
    assert expected
    with fleet.gateway(open_node) as server, Client(server.base) as over_http:
        assert over_http.generate(PROMPT, PARAMS).outputs[0].text == expected


def test_a_client_whose_key_is_not_listed_is_refused(fleet: Fleet, open_node: NodeProcess) -> None:
    keys = fleet.stranger()
    with Client(open_node.address, keys=keys, connect_timeout=60) as client, pytest.raises(errors.Unauthorized):
        client.generate(PROMPT, PARAMS)


def test_a_client_that_expects_another_node_does_not_talk_to_this_one(fleet: Fleet, open_node: NodeProcess) -> None:
    with (
        Client(open_node.address, keys=fleet.misled(), connect_timeout=2) as client,
        pytest.raises(errors.TransportError, match="no node answered"),
    ):
        client.generate(PROMPT, PARAMS)


def test_a_plain_pyzmq_socket_with_listed_keys_is_welcomed(fleet: Fleet, open_node: NodeProcess) -> None:
    with plain_socket(open_node.address, fleet.client()) as (dealer, event):
        assert event == "HANDSHAKE_SUCCEEDED"
        dealer.send(HELLO)
        assert dealer.poll(DEADLINE_MS), "the node answers"
        version, tag, body = msgpack.unpackb(dealer.recv())
        assert (version, tag) == (1, WELCOME_TAG)
        spoken, _node, _epoch, model, limits = body
        assert spoken == 1
        assert "tiny-chat" in model
        assert 2_048 in limits


@pytest.mark.parametrize("who", ["a key that is not listed", "another node's key", "no keys"])
def test_a_plain_pyzmq_socket_without_the_right_keys_is_not_answered(
    fleet: Fleet, open_node: NodeProcess, who: str
) -> None:
    keys = {"a key that is not listed": fleet.stranger(), "another node's key": fleet.misled(), "no keys": None}[who]
    with plain_socket(open_node.address, keys) as (dealer, event):
        # What libzmq says differs with who gives up first; what counts is that it is no success and that nothing comes.
        assert event in {
            "HANDSHAKE_FAILED_NO_DETAIL",
            "HANDSHAKE_FAILED_PROTOCOL",
            "HANDSHAKE_FAILED_AUTH",
            "DISCONNECTED",
        }
        with pytest.raises(zmq.Again):
            dealer.recv(zmq.NOBLOCK)


def test_a_node_does_not_listen_beyond_this_machine_without_keys() -> None:
    command = [
        sys.executable,
        "-m",
        "llmscale.node",
        "--model",
        "tiny-chat",
        "--listen",
        f"tcp://0.0.0.0:{free_port()}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "key" in done.stderr + done.stdout


def test_a_gateway_with_other_keys_than_its_nodes_says_that_none_serves(fleet: Fleet, open_node: NodeProcess) -> None:
    strangers = Fleet(fleet.strangers, fleet.keys)
    with (
        pytest.raises(AssertionError, match="no node serves tiny-chat"),
        strangers.gateway(open_node, max_wait_seconds=2),
    ):
        pass
