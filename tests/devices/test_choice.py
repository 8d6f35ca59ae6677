"""Which device a process uses: what was asked for if it is there, and for "auto" the one that all workers can have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from llmscale import extras
from llmscale.config import DEVICES as ALLOWED
from llmscale.config import NodeSettings
from llmscale.devices import registry
from llmscale.errors import ConfigError, NoCudaDevice
from llmscale.fleet_file import FleetFile, ModelEntry
from llmscale.gateway import local_nodes
from llmscale.node import plan

GIB = 1 << 30


def has_devices(monkeypatch: pytest.MonkeyPatch, *devices: registry.CudaFacts) -> None:
    for module in (registry, plan):
        monkeypatch.setattr(module, "cuda_devices", lambda: devices)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    has_devices(monkeypatch, registry.CudaFacts(80 * GIB, (9, 0)), registry.CudaFacts(40 * GIB, (8, 0)))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an NVIDIA driver, as far as this process can tell; torch is there but not imported."""
    monkeypatch.setattr(registry.ctypes, "CDLL", lambda _name: None)
    monkeypatch.setattr(registry, "find_spec", lambda _name: True)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    registry.cuda_devices.cache_clear()
    yield
    registry.cuda_devices.cache_clear()


def probed(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(registry.subprocess, "run", run)


def test_every_device_of_the_registry_can_be_asked_for() -> None:
    assert set(ALLOWED) == {"auto", *registry.DEVICES}


def test_auto_is_cuda_where_every_worker_has_a_device(two_devices: None) -> None:
    assert [registry.choose("auto", workers) for workers in (1, 2, 3)] == ["cuda", "cuda", "cpu"]
    assert registry.choose("cpu", 3) == "cpu"


def test_what_is_not_there_is_refused_with_what_is(two_devices: None) -> None:
    with pytest.raises(NoCudaDevice, match=r"cuda for 3 workers on this host, but torch sees 2.*--device cpu"):
        registry.choose("cuda", 3)
    with pytest.raises(ConfigError, match="device is 'tpu', it must be auto or one of cpu, cuda"):
        registry.choose("tpu")
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        registry.open_device("tpu")
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        NodeSettings(model="tiny-chat", listen="", device="tpu")


def test_a_replica_on_cuda_is_planned_with_all_memory_of_the_smallest_of_its_devices(two_devices: None) -> None:
    settings = NodeSettings(model="tiny-chat", listen="", dtype="float32")
    planned = plan.plan_replica(settings)
    assert planned.device == "cuda"
    assert planned.limits.total_blocks == min(plan.MAX_DEVICE_BLOCKS, 80 * GIB // planned.block_bytes)
    second = plan.plan_replica(NodeSettings(model="tiny-chat", listen="", dtype="float32", first_device=1))
    assert (second.device, second.first_device) == ("cuda", 1)
    assert second.limits.total_blocks == 40 * GIB // second.block_bytes
    third = plan.plan_replica(NodeSettings(model="tiny-chat", listen="", dtype="float32", first_device=2))
    assert third.device == "cpu"


def test_replicas_of_a_host_have_devices_of_their_own_or_none_has(
    two_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_nodes, "choose", registry.choose)

    def told(replicas: int, device: str = "auto") -> list[list[str]]:
        first = ModelEntry(model="tiny-chat", replicas=1, device="cpu")
        fleet = FleetFile(
            models={"a": first, "b": ModelEntry(model="tiny-chat-mini", replicas=replicas, device=device)}
        )
        nodes = local_nodes.local_nodes(fleet, "/folder")
        return [[word for word in node.command if "device=" in word] for node in nodes]

    assert told(1) == [["--device=cpu", "--first-device=0"], ["--device=cuda", "--first-device=0"]]
    assert told(2)[1:] == [["--device=cuda", "--first-device=0"], ["--device=cuda", "--first-device=1"]]
    assert [words[0] for words in told(3)] == ["--device=cpu"] * 4, "tokens of a mixture would differ"


def test_a_base_install_beside_a_driver_computes_on_the_cpu(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_words: Any, **_options: Any) -> None:
        raise AssertionError("there is no torch to be asked")

    monkeypatch.setattr(registry, "find_spec", lambda _name: None)
    monkeypatch.setattr(registry.subprocess, "run", run)
    assert registry.choose("auto") == "cpu"
    assert plan.plan_replica(NodeSettings(model="tiny-chat", listen="")).device == "cpu"
    monkeypatch.setattr(extras, "find_spec", lambda _name: None)
    with pytest.raises(NoCudaDevice, match=r"torch is not installed; from the checkout: pip install '\.\[node\]'"):
        registry.choose("cuda")


def test_what_the_child_says_of_its_devices_is_believed(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probed(monkeypatch, f"{80 * GIB} 9 0\n{16 * GIB} 7 5\n")
    assert registry.cuda_devices() == (
        registry.CudaFacts(80 * GIB, (9, 0)),
        registry.CudaFacts(16 * GIB, (7, 5)),
    )


def test_a_probe_that_does_not_end_is_an_error_that_says_what_to_do(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_PROBE", "import signal; signal.pause()")
    monkeypatch.setattr(registry, "PROBE_SECONDS", 0.2)
    with pytest.raises(NoCudaDevice, match=r"not named its devices within 0\.2 s.*--device cpu"):
        registry.choose("auto")


def test_auto_leaves_devices_alone_that_are_older_than_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = registry.CudaFacts(80 * GIB, (8, 0)), registry.CudaFacts(80 * GIB, (7, 5))
    has_devices(monkeypatch, new, old, new)
    assert [registry.choose("auto", workers) for workers in (1, 2, 3)] == ["cuda", "cpu", "cpu"]
    assert registry.choose("cuda", 3) == "cuda", "whoever asks gets it"
