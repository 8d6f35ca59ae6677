"""A gateway as a process: what it says of itself, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmscale.gateway.__main__ import main
from tests.fakes.tiny_tokenizer import write_byte_level

pytestmark = pytest.mark.usefixtures("own_logging")

SCRIPT = """
import sys
from pathlib import Path
from llmscale import logs
from llmscale.gateway.auth import load_keys
from llmscale.gateway.config import GatewayConfig, GatewayLimits, ServedModel
from llmscale.gateway.serve import run
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront, FakeSampling

logs.configure()
model = ServedModel("tiny", Tokenizer(Path(sys.argv[1])), 512, 1 << 20, 1)
front = FakeFront(automatic=False)
config = GatewayConfig(port=0, limits=GatewayLimits(max_drain_seconds=1))
run(config, front, FakeSampling, [model], load_keys((), None), on_started=lambda port: print(port, flush=True))
print("ended, front closed:", front.closed, flush=True)
"""


def test_the_help_names_every_setting_and_gives_an_example() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "llmscale.gateway", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for word in (
        "--fleet-file",
        "--nodes",
        "--model",
        "--api-key-file",
        "--max-drain-seconds",
        "--allowed-origins",
        "--hedging",
        "Example:",
    ):
        assert word in made.stdout


def test_a_wrong_setting_ends_the_process_with_its_reason() -> None:
    assert main(["--nodes", "ipc:///nowhere", "--model", "tiny-chat", "--host", "0.0.0.0"]) == 1


def test_a_fleet_file_that_is_wrong_ends_the_process_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llmscale.toml"
    file.write_text("[models.a]\nmodel = 'tiny-chat'\nreplica = 2\n")
    assert main(["--fleet-file", str(file)]) == 1
    said = capsys.readouterr()
    assert f"{file}:3: models.a.replica: there is no such name; did you mean replicas?" in said.out + said.err


@pytest.mark.parametrize("words", [["--port", "8000"], ["--model", "tiny-chat"]])
def test_nothing_stands_beside_a_fleet_file(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--fleet-file", "llmscale.toml", *words])
    assert f"write into the file what {' '.join(words)} says" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0.99", "601", "nan"])
def test_a_silence_that_is_no_sign_of_loss_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--nodes", "ipc:///nowhere", "--model", "tiny-chat", "--max-node-silence-seconds", seconds])
    assert "it must be from 1, four reports of a node, to 600" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0.09", "601", "nan"])
def test_a_replica_is_not_left_alone_for_no_time_or_for_ever(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--nodes", "ipc:///nowhere", "--model", "tiny-chat", "--ejection-seconds", seconds])
    assert "it must be from 0.1 to 600" in capsys.readouterr().err


def test_sigterm_ends_streams_with_an_error_and_the_process_with_zero(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(write_byte_level(tmp_path))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    with process, socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=30) as client:
        body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 99}).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        with socket.create_connection(client.getpeername(), timeout=30) as probe:
            # Answered after the request above has been read, since one loop serves both.
            probe.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in probe.recv(4_096)
        process.send_signal(signal.SIGTERM)
        received = b""
        while part := client.recv(65_536):
            received += part
        assert process.wait(30) == 0
        said = process.stdout.read()
    assert b" 503 " in received.partition(b"\r\n")[0]
    assert b'"code":"unavailable"' in received
    assert said == "ended, front closed: True\n"
