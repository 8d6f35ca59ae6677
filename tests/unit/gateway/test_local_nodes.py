"""The nodes of this host: what their command lines say, how CPUs are shared, and that a dead one is started again."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from llmscale import machine
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError
from llmscale.fleet_file import FleetFile, KeysEntry, ModelEntry, parse_fleet_file
from llmscale.gateway.fleet import gateway_config, serve_fleet
from llmscale.gateway.local_nodes import LocalNode, NodeKeeper, cpus_of_replica, kept, local_nodes
from llmscale.node.__main__ import _parser, _settings
from llmscale.node.plan import plan_replica
from tests.captured_logs import captured_logs
from tests.processes import wait_until

TWO = FleetFile(
    fleet="lab",
    models={
        "a": ModelEntry(
            model="/models/a", replicas=2, dtype="float32", max_model_len=64, kv_cache_bytes=9, spare_worker=False
        ),
        "-b": ModelEntry(model="tiny-chat", nodes=("tcp://10.0.0.1:7000",)),
        "c": ModelEntry(model="tiny-chat", tensor_parallel_size=2, threads=3, max_saving_seconds=0),
    },
    keys=KeysEntry(folder="/keys", gateway="edge"),
)


def test_every_replica_of_this_host_has_a_node_of_its_own_and_others_have_none() -> None:
    nodes = local_nodes(TWO, "/run")
    assert [(node.model, node.address) for node in nodes] == [
        ("a", "ipc:///run/node-0"),
        ("a", "ipc:///run/node-1"),
        ("c", "ipc:///run/node-2"),
    ]


def test_a_command_line_says_what_the_file_says() -> None:
    command = local_nodes(TWO, "/run")[1].command
    assert command[:3] == (sys.executable, "-m", "llmscale.node")
    read = _parser().parse_args(list(command[3:]))
    assert (read.model, read.served_name, read.listen, read.fleet) == ("/models/a", "a", "ipc:///run/node-1", "lab")
    assert (read.dtype, read.max_model_len, read.kv_cache_bytes) == ("float32", 64, 9)
    assert (read.spare_worker, read.parent, read.replicas_here) == (False, os.getpid(), 3)
    assert (read.key_file, read.allow_list) == (Path("/keys/node.key"), Path("/keys/allowed"))
    other = _parser().parse_args(list(local_nodes(TWO, "/run")[2].command[3:]))
    assert (other.tensor_parallel_size, read.max_saving_seconds, other.max_saving_seconds) == (2, 5.0, 0.0)


def test_a_name_that_begins_with_a_dash_is_a_value() -> None:
    entry = ModelEntry(model="tiny-chat")
    command = local_nodes(FleetFile(models={"-tp": entry}), "/run")[0].command
    assert _parser().parse_args(list(command[3:])).served_name == "-tp"


def test_workers_share_the_cpus_unless_the_file_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpus", lambda: 13)
    # Two workers of a and two of c, 13 CPUs.
    assert cpus_of_replica(TWO, "a") == 3
    assert cpus_of_replica(TWO, "c") == 6
    told = [_parser().parse_args(list(node.command[3:])) for node in local_nodes(TWO, "/run")]
    assert [(read.threads, read.cpus) for read in told] == [(None, 3), (None, 3), (3, 6)]
    monkeypatch.setattr(machine, "cpus", lambda: 2)
    assert (cpus_of_replica(TWO, "a"), cpus_of_replica(TWO, "c")) == (1, 2), "a thread for each worker all the same"
    alone = FleetFile(models={"a": ModelEntry(model="tiny-chat"), "b": TWO.models["-b"]})
    assert cpus_of_replica(alone, "a") == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_small_model_has_few_threads_however_many_replicas_there_are(
    monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    monkeypatch.setattr(machine, "cpus", lambda: 64)
    fleet = FleetFile(models={"tiny-chat": ModelEntry(model="tiny-chat", replicas=replicas)})
    for node in local_nodes(fleet, "/run"):
        settings = _settings(_parser().parse_args(list(node.command[3:])))
        plan = plan_replica(settings)
        assert plan.threads_of_worker(settings) == 1, "nine megabytes are one thread's work"
        larger = dataclasses.replace(plan, weight_bytes=16 << 30)
        assert larger.threads_of_worker(settings) == 64 // replicas


def test_a_node_that_ends_is_started_again_until_it_is_asked_to_stop(tmp_path: Path) -> None:
    counted = tmp_path / "starts"
    script = f"open({str(counted)!r}, 'a').write('x')"
    keeper = NodeKeeper(LocalNode("a", "ipc:///nowhere", (sys.executable, "-c", f"{script}; raise SystemExit(3)")))
    with captured_logs() as said:
        keeper.start()
        wait_until(lambda: counted.exists() and len(counted.read_text()) >= 2, 120, "it was started again")
        keeper.stop()
    starts = len(counted.read_text())
    assert [(line["model"], line["code"]) for line in said[:1]] == [("a", 3)]
    assert len(said) in (starts - 1, starts)


def test_a_node_that_cannot_be_started_is_tried_again_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    program, counted = tmp_path / "node", tmp_path / "starts"
    keeper = NodeKeeper(LocalNode("a", "ipc:///nowhere", (str(program),)))
    with captured_logs() as said:
        keeper.start()
        wait_until(lambda: len(said) >= 1, 30, "somebody hears of it")
        written = tmp_path / "written"
        written.write_text(f"#!/bin/sh\necho x > {counted}\nexec sleep 1000\n")
        written.chmod(0o755)
        written.rename(program)
        wait_until(counted.exists, 60, "the node runs")
        keeper.stop()
    assert {(line["model"], "No such file" in line["why"]) for line in said} == {("a", True)}


def test_a_node_is_ended_whose_start_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by SIGTERM: it raises SystemExit wherever the command is."""
    listens, heard = tmp_path / "listens", tmp_path / "heard"
    script = (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1});"
        f"open({str(listens)!r}, 'w').close(); signal.sigwait({{signal.SIGUSR1}}); open({str(heard)!r}, 'w').close()"
    )
    start = NodeKeeper.start

    def interrupted(keeper: NodeKeeper) -> None:
        start(keeper)
        wait_until(listens.exists, 60, "the node listens")
        raise SystemExit

    monkeypatch.setattr(NodeKeeper, "start", interrupted)
    never = LocalNode("b", "ipc:///nowhere", ("/never/started",))
    with pytest.raises(SystemExit), kept([LocalNode("a", "ipc:///nowhere", (sys.executable, "-c", script)), never]):
        pass
    assert heard.exists()
    NodeKeeper(never).stop()


def test_a_node_is_asked_to_end_by_a_signal_that_insists_on_nothing_if_its_group_had_one_before(tmp_path: Path) -> None:
    heard, listens = tmp_path / "heard", tmp_path / "listens"
    script = (
        "import signal; numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1};"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, numbers); open({str(listens)!r}, 'w').close();"
        f"open({str(heard)!r}, 'w').write(signal.Signals(signal.sigwait(numbers)).name)"
    )
    keeper = NodeKeeper(LocalNode("a", "ipc:///nowhere", (sys.executable, "-c", script)))
    keeper.start()
    wait_until(listens.exists, 60, "the node listens")
    keeper.stop()
    assert heard.read_text() == "SIGUSR1"


def test_limits_of_the_file_are_those_of_the_gateway_and_others_stay() -> None:
    text = "[gateway.limits]\nmax_body_bytes = 77\n[models.a]\nmodel = 'tiny-chat'\n"
    limits = gateway_config(parse_fleet_file(text, Path("/f"))).limits
    assert (limits.max_body_bytes, limits.max_messages) == (77, 2_048)


@pytest.mark.parametrize("missing", ["gateway-edge.key", "node.public", "node.key", "allowed"])
def test_a_key_file_that_is_not_there_is_named_before_anything_starts(tmp_path: Path, missing: str) -> None:
    for name in ("gateway-edge.key", "node.public", "node.key", "allowed"):
        if name != missing:
            (tmp_path / name).write_text("x")
    keys = KeysEntry(folder=str(tmp_path), gateway="edge")
    with pytest.raises(ConfigError, match=f"no key file {tmp_path}/{missing}; make it with `llmscale keys"):
        serve_fleet(FleetFile(models={"a": ModelEntry(model="tiny-chat")}, keys=keys))


def test_a_node_on_another_host_needs_keys() -> None:
    entry = ModelEntry(model="tiny-chat", nodes=("tcp://10.0.0.1:7000",))
    with pytest.raises(ConfigError, match="reachable from other hosts and no CURVE keys"):
        serve_fleet(FleetFile(models={"tiny-chat": entry}))


def test_a_fleet_whose_name_no_frame_carries_is_refused() -> None:
    with pytest.raises(ConfigError, match="fleet has 258 bytes of UTF-8, it must have from 1 to 256"):
        serve_fleet(FleetFile(models={"a": ModelEntry(model="tiny-chat")}, fleet="名" * 86))
    with pytest.raises(ConfigError, match="fleet has 257 bytes of UTF-8, it must have from 1 to 256"):
        NodeSettings(model="tiny-chat", listen="", fleet="x" * 257)


def test_a_gateway_that_others_reach_needs_api_keys() -> None:
    text = "[gateway]\nhost = '0.0.0.0'\n[models.a]\nmodel = 'tiny-chat'\n"
    with pytest.raises(ConfigError, match=r"host is 0\.0\.0\.0 and no API key is set"):
        gateway_config(parse_fleet_file(text, Path("/f")))
