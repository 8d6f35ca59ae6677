"""Goal: clients that break off, at whatever point and in whatever way, cost the server nothing that lasts.

Method: raw sockets against a real server with a real node, twenty at a time; an honest stream beside them gives what it
gave before, and afterwards the node is idle and has all its blocks.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.processes import Server, serving, token_ids, wait_until

RUDE = 20
ENDLESS_TOKENS = 1_900
HONEST = {"model": "tiny-chat", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
ENDLESS = json.dumps(HONEST | {"max_tokens": ENDLESS_TOKENS, "stream": True, "logprobs": 5}).encode()
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
REQUEST = HEAD % len(ENDLESS) + ENDLESS


def read_something(connection: socket.socket) -> None:
    """Until the stream has begun."""
    received = b""
    while b"data: " not in received:
        piece = connection.recv(4_096)
        assert piece, f"closed after {received!r}"
        received += piece
    assert received.startswith(b"HTTP/1.1 200 ")


def reset(connection: socket.socket) -> None:
    """Ends it without a goodbye: the peer gets RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def reset_in_the_middle(connection: socket.socket) -> None:
    connection.sendall(REQUEST)
    read_something(connection)
    reset(connection)


def close_in_the_middle(connection: socket.socket) -> None:
    connection.sendall(REQUEST)
    read_something(connection)
    connection.close()


def close_the_sending_side(connection: socket.socket) -> None:
    connection.sendall(REQUEST)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65_536):
        pass
    connection.close()


def reset_at_once(connection: socket.socket) -> None:
    connection.sendall(REQUEST)
    reset(connection)


def reset_in_the_body(connection: socket.socket) -> None:
    connection.sendall(REQUEST[:-10])
    reset(connection)


def close_in_the_head(connection: socket.socket) -> None:
    connection.sendall(REQUEST[:40])
    connection.close()


def send_a_second_request_and_reset(connection: socket.socket) -> None:
    connection.sendall(REQUEST + REQUEST)
    read_something(connection)
    reset(connection)


WAYS: list[Callable[[socket.socket], None]] = [
    reset_in_the_middle,
    close_in_the_middle,
    close_the_sending_side,
    reset_at_once,
    reset_in_the_body,
    close_in_the_head,
    send_a_second_request_and_reset,
]


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        yield connection


def is_idle(server: Server) -> bool:
    """Nothing runs or waits, and no block is lost."""
    fleet = server.get("/fleet").json()
    replica = fleet["replicas"][0]
    left = (fleet["live_requests"], fleet["queued_requests"], replica["running"], replica["waiting"])
    return left == (0, 0, 0, 0) and replica["free_blocks"] == replica["total_blocks"]


@pytest.fixture(scope="module")
def server(slow_processor: None) -> Iterator[Server]:
    """In float32, so that the honest stream has the same ids in any company."""
    with serving("tiny-chat", "--dtype", "float32", "--threads", "1") as server:
        yield server


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_clients_that_break_off_leave_nothing_running_and_disturb_nobody(
    server: Server, way: Callable[[socket.socket], None]
) -> None:
    expected = token_ids(server, HONEST)
    before = server.steps()

    def be_rude(_number: int) -> None:
        with connected(server) as connection:
            way(connection)

    with ThreadPoolExecutor(RUDE) as pool:
        rude = [pool.submit(be_rude, number) for number in range(RUDE)]
        found = token_ids(server, HONEST)
        for one in rude:
            one.result()
    assert found == expected
    # The node's word is up to 250 ms old: one from before the honest stream's end does not count.
    ended = before + len(expected)
    wait_until(lambda: is_idle(server) and server.steps() >= ended, 120, "the node is idle and has all its blocks")
    # Run to its end, one of their streams alone would have taken more.
    assert server.steps() - before < ENDLESS_TOKENS
