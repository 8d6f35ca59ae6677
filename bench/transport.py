"""What does a frame cost on the connection that processes have? Round trips and MB/s between two threads, with and
without CURVE, beside bare TCP.
"""

from __future__ import annotations

import argparse

from bench.result import Report, Row
from bench.statistics import spread

# A heartbeat, a step's outputs for a hundred streams, a long prompt.
ROUND_TRIP_BYTES = (64, 4_096, 65_536)
STREAM_BYTES = 1 << 20
STREAM_FRAMES = 256
STREAM_WINDOW = 8
KINDS = ("raw", "tcp", "curve")


def main(arguments: argparse.Namespace) -> Report:
    """One round trip at a time, then megabyte frames with eight under way; every kind in every repeat."""
    from llmscale import _core

    trips = 1_000 if arguments.quick else 5_000
    frames = STREAM_FRAMES // 4 if arguments.quick else STREAM_FRAMES
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repeats):
        for kind in KINDS:
            for size in ROUND_TRIP_BYTES:
                elapsed_ns = _core.measure_transport(kind, size, trips, 1)
                found.setdefault((f"round_trip/{kind}/{size}", "us"), []).append(elapsed_ns / trips / 1_000)
            elapsed_ns = _core.measure_transport(kind, STREAM_BYTES, frames, STREAM_WINDOW)
            megabytes = frames * STREAM_BYTES / 1e6
            found.setdefault((f"stream/{kind}", "MB/s"), []).append(megabytes / (elapsed_ns / 1e9))
    rows = []
    for (name, unit), values in found.items():
        limit = name.replace("tcp", "raw").replace("curve", "raw")
        peers = {} if limit == name else {"bare TCP": spread(found[limit, unit]).median}
        rows.append(Row.of(name, unit, spread(values), peers=peers))
    return Report("transport", arguments.seed, rows)
