"""What others used of the machine: read from the kernel's counters."""

from bench import disturbance
from bench.disturbance import Watch, busy_ticks


def test_idle_time_and_waiting_for_disks_are_not_busy():
    # user nice system idle iowait irq softirq steal guest guest_nice; guests are in user already.
    assert busy_ticks("cpu  10 20 30 1000 500 1 2 3 7 8\ncpu0 9 9 9 9 9 9 9 9 9 9\n") == 66


def test_what_this_process_did_is_not_the_others(monkeypatch):
    busy, own, now = [100.0], [10.0], [0.0]
    monkeypatch.setattr(disturbance, "_busy_seconds", lambda: busy[0])
    monkeypatch.setattr(disturbance, "_own_seconds", lambda: own[0])
    monkeypatch.setattr(disturbance.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(disturbance.os, "cpu_count", lambda: 2)
    watch = Watch()
    busy[0], own[0], now[0] = 116.0, 22.0, 10.0
    # Four seconds of twenty.
    assert watch.others_share() == 0.2
    own[0] = 40.0
    assert watch.others_share() == 0.0


def test_a_system_without_counters_says_nothing(monkeypatch):
    monkeypatch.setattr(disturbance, "_busy_seconds", lambda: None)
    assert Watch().others_share() is None
