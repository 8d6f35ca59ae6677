"""Goal: what stands in deploy/ starts a replica over hosts. Method: the scripts themselves, under torchrun and under a
stand-in for srun that sets the variables of a step; the manifest of Kubernetes is read and its command understood.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmscale import Client, SamplingParams
from llmscale.client import CurveKeys
from llmscale.node.__main__ import _host_flags, _parser, _settings
from llmscale.parallel.hosts import resolve_hosts
from tests.fleet import Fleet
from tests.host_group import HostProcess, host_process, script
from tests.processes import free_port, wait_until

ROOT = Path(__file__).parents[2]
# Both tasks of a step, one for each host; the first host is this one.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=localhost,elsewhere SLURM_LOCALID=0
trap 'kill $(jobs -p); wait' TERM
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
done
wait
"""


def answer(address: str, keys: CurveKeys | None = None) -> int:
    """How many tokens a first answer has."""
    with Client(address, keys=keys, connect_timeout=180) as client:
        output = client.generate([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True), timeout=180)
    return len(output.outputs[0].token_ids)


@pytest.mark.slow
def test_torchrun_starts_a_replica_over_two_hosts(tmp_path: Path) -> None:
    port, address = free_port(), f"tcp://127.0.0.1:{free_port()}"
    variables = {
        "HOSTS": "2",
        "LEADER": "127.0.0.1",
        "TORCHRUN_PORT": str(free_port()),
        "TORCHRUN": str(Path(sys.executable).parent / "torchrun"),
        "MODEL": "tiny-chat-mini",
        "LISTEN": address,
    }
    words = [str(ROOT / "deploy" / "torchrun" / "node.sh"), "-pp", "2", "--no-spare-worker"]
    words += ["--leader", f"127.0.0.1:{port}"]
    with ExitStack() as running:
        for node in ("0", "1"):
            environment = {**os.environ, **variables, "NODE_INDEX": node}
            running.enter_context(script(tmp_path, f"torchrun{node}", words, environment))
        assert answer(address) == 5


@pytest.mark.slow
def test_a_step_of_slurm_is_a_replica_over_its_hosts(fleet: Fleet, tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "MODEL": "tiny-chat-mini",
        "KEYS": str(fleet.keys),
        "LISTEN": address,
    }
    words = [str(ROOT / "deploy" / "slurm" / "replica.sbatch")]
    with script(tmp_path, "sbatch", words, {**os.environ, **variables}) as job:
        wait_until(lambda: "joined the leader" in job.log(), 120, "the second task has joined the first")
        assert answer(address, fleet.client()) == 5


def test_the_manifest_of_a_leader_worker_set_is_a_command_that_every_pod_understands() -> None:
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "deploy" / "leader-worker-set" / "replica.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = manifest["spec"]["leaderWorkerTemplate"]
    [container] = template["workerTemplate"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "llmscale.node"]
    arguments = _parser().parse_args(container["command"][3:])
    settings = _settings(arguments)
    size = template["size"]
    ports = {port["containerPort"] for port in container["ports"]}
    for index in range(size):
        pod = {"LWS_LEADER_ADDRESS": "llmscale-0.llmscale.default", "LWS_GROUP_SIZE": str(size)}
        hosts = resolve_hosts({**pod, "LWS_WORKER_INDEX": str(index)}, _host_flags(arguments))
        assert (hosts.count, hosts.index, hosts.leader) == (size, index, pod["LWS_LEADER_ADDRESS"])
        assert ports == {hosts.port, int(settings.listen.rpartition(":")[2])}
    assert settings.tensor_parallel_size * settings.pipeline_parallel_size % size == 0
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for file in (settings.key_file, settings.allow_list):
        assert file is not None
        assert str(file.parent) in mounts


def test_a_launcher_outside_is_not_asked_where_one_host_is_said(tmp_path: Path) -> None:
    launched = ("env", "LWS_GROUP_SIZE=2", "LWS_WORKER_INDEX=1", "LWS_LEADER_ADDRESS=nowhere.invalid")
    listen = f"tcp://127.0.0.1:{free_port()}"
    options = ("--model", "tiny-chat-mini", "--listen", listen, "--hosts", "1", "--no-spare-worker")

    def listens(node: HostProcess) -> bool:
        return "node listens" in node.log()

    with host_process(tmp_path, "alone", launched, *options) as node:
        wait_until(lambda: listens(node), 120, "it is a node of its own")
