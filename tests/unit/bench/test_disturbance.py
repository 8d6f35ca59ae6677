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
    monkeypatch.setattr(disturbance, "group_seconds", lambda group: {77: 3.0}[group])
    alone, serving, only_ours = Watch(), Watch(), Watch()
    busy[0], own[0], now[0] = 116.0, 22.0, 10.0
    # Four seconds of twenty; three of them the server's.
    assert alone.stop() == 0.2
    assert serving.stop(77) == 0.05
    own[0] = 40.0
    assert only_ours.stop() == 0.0
    # What comes after the first stop does not count.
    busy[0] = 1_000.0
    assert (alone.stop(), serving.stop()) == (0.2, 0.05)


def test_a_group_has_the_times_of_its_processes_and_their_ended_children(tmp_path):
    for number, group in ((1, 5), (2, 5), (3, 6)):
        (tmp_path / str(number)).mkdir()
        fields = ["S", "0", str(group), *["0"] * 8, "100", "200", "30", "4", "0"]
        (tmp_path / str(number) / "stat").write_text(f"{number} (a ) b) {' '.join(fields)}")
    ticks = disturbance.os.sysconf("SC_CLK_TCK")
    assert disturbance.group_seconds(5, tmp_path) == 2 * 334 / ticks
    assert disturbance.group_seconds(7, tmp_path) == 0.0


def test_a_system_without_counters_says_nothing(monkeypatch):
    monkeypatch.setattr(disturbance, "_busy_seconds", lambda: None)
    assert Watch().stop() is None
