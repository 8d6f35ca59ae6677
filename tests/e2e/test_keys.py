"""Keys that `llmscale keys` makes, used by every kind of process: a node that other hosts reach, a gateway, clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmscale import Client, SamplingParams, errors
from llmscale.cli.keys import run
from llmscale.client import CurveKeys
from tests.processes import free_port, gateway
from tests.support_processes import NodeProcess, node

PROMPT = [300, 284, 223, 20, 483, 21]
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of a fleet, and beside them a client's that no list has."""
    folder = tmp_path_factory.mktemp("fleet")
    run(folder / "keys", ("node", "gateway:edge", "client:app:acme"), force=False)
    run(folder / "strangers", ("node", "gateway:edge", "client:app:acme"), force=False)
    return folder / "keys"


def client_keys(folder: Path, *, server: Path | None = None) -> CurveKeys:
    """The pair of the client of a folder, and the node's public key from the same or another."""
    public = ((server or folder) / "node.public").read_text().strip()
    return CurveKeys.load(folder / "client-app.key", server=public)


@pytest.fixture(scope="module")
def open_node(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that listens on every address of this machine."""
    port = free_port()
    options = ("--key-file", str(keys / "node.key"), "--allow-list", str(keys / "allowed"), "--threads", "1")
    with node(
        tmp_path_factory.mktemp("node"),
        *options,
        address=f"tcp://127.0.0.1:{port}",
        listen=f"tcp://0.0.0.0:{port}",
        keys=client_keys(keys),
    ) as started:
        yield started


def test_a_node_with_made_keys_answers_its_client_and_its_gateway_alike(open_node: NodeProcess, keys: Path) -> None:
    with Client(open_node.address, tokenizer="tiny-chat", keys=client_keys(keys)) as direct:
        expected = direct.generate(PROMPT, PARAMS).outputs[0].text
    public = (keys / "node.public").read_text().strip()
    options = ("--key-file", str(keys / "gateway-edge.key"), f"--node-key={public}")
    with gateway([open_node.address], *options) as server, Client(server.base) as over_http:
        assert over_http.generate(PROMPT, PARAMS).outputs[0].text == expected


def test_a_client_whose_key_is_not_listed_is_refused(open_node: NodeProcess, keys: Path) -> None:
    strangers = client_keys(keys.parent / "strangers", server=keys)
    with Client(open_node.address, keys=strangers, connect_timeout=5) as client, pytest.raises(errors.Unauthorized):
        client.generate(PROMPT, PARAMS)


def test_a_client_that_expects_another_node_does_not_talk_to_this_one(open_node: NodeProcess, keys: Path) -> None:
    misled = client_keys(keys, server=keys.parent / "strangers")
    with (
        Client(open_node.address, keys=misled, connect_timeout=2) as client,
        pytest.raises(errors.TransportError, match="no node answered"),
    ):
        client.generate(PROMPT, PARAMS)


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "key" in done.stderr + done.stdout
