"""Goal: a replica that one thread drives and others cancel in never stops all of them.

Method: a process of its own, since threads that wait for each other with the GIL in hand stop whoever watches them too.
"""

from __future__ import annotations

import subprocess
import sys

REFUSALS_BESIDE_CANCELS = """
import sys, threading
from array import array
from llmscale._core import CpuKernels, EngineLimits, LocalReplica, Sampling
from llmscale.errors import WorkerError

VOCABULARY, ROUNDS = 16, 300
# Threads take turns often, so that a lock is waited for at every moment at which it can be.
sys.setswitchinterval(1e-5)
replica = LocalReplica(
    EngineLimits(vocabulary=VOCABULARY, total_blocks=8, max_sequence_tokens=64, eos_tokens=[])
)
kernels = CpuKernels("float32", threads=1)
logits, words = array("f", [0.0] * VOCABULARY), array("i", [0] * 4096)
ended, refusals = threading.Event(), []

def cancel():
    while not ended.is_set():
        replica.cancel(1 << 40)

def draw(places):
    memory = words.buffer_info()[0], places
    return replica.draw(kernels, logits.buffer_info(), "float32", (0, 1), 0, memory)

replica.submit([1, 2, 3], Sampling(max_tokens=4))
assert replica.plan().samples == 1
beside = threading.Thread(target=cancel, daemon=True)
beside.start()
for _ in range(ROUNDS):
    for refused in (lambda: draw(0), replica.plan, lambda: replica.word_parts((0, 9)),
                    lambda: replica.complete((words.buffer_info()[0], 0)),
                    lambda: replica.submit([1], Sampling(max_tokens=1000))):
        try:
            refused()
        except Exception as problem:
            refusals.append(type(problem).__name__)
draw(len(words))
replica.complete(words.buffer_info())
ended.set()
beside.join(10)
assert not beside.is_alive()
print(len(refusals), sorted(set(refusals)), len(replica.take()))
"""


def test_what_is_refused_beside_cancels_stops_nobody() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REFUSALS_BESIDE_CANCELS], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "1500 ['RequestTooLong', 'WorkerError'] 1\n"
