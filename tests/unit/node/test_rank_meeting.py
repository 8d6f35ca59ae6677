"""Ranks of one host meet in memory, ranks of several at the rendezvous, whatever the layout."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import ConfigError, WorkerError
from llmscale.node.rank_meeting import RankMeeting
from llmscale.parallel.assignment import Meeting
from llmscale.parallel.groups import join_stages
from llmscale.parallel.layout import HostLayout

AT = "tcp://10.0.0.1:5"


def meetings(layout: HostLayout) -> list[Meeting]:
    """What each rank is told, by rank, with files by their inode."""
    found: list[Meeting] = []
    for host in range(layout.hosts):
        with RankMeeting(layout, host, AT if layout.hosts > 1 else None) as meeting:
            found += [_by_inode(meeting.of(place), host) for place in layout.places(host)]
    return found


def _by_inode(meeting: Meeting, host: int) -> Meeting:
    def name(path: str | None) -> str | None:
        return None if path is None else f"{host}/{os.stat(path).st_ino}"

    return Meeting(
        name(meeting.memory), name(meeting.before), name(meeting.behind), name(meeting.samples), meeting.rendezvous
    )


def test_four_stages_on_two_hosts_use_channels_within_and_the_rendezvous_between() -> None:
    first, second, third, fourth = meetings(HostLayout(1, 4, 2))
    assert {one.rendezvous for one in (first, second, third, fourth)} == {AT}
    assert (first.behind is not None, first.behind) == (True, second.before)
    assert (second.behind, third.before) == (None, None)
    assert (third.behind is not None, third.behind) == (True, fourth.before)
    assert (first.samples, fourth.samples) == (None, None)


def test_a_stage_within_a_host_keeps_its_shared_memory() -> None:
    assert [one.memory is not None for one in meetings(HostLayout(2, 2, 2))] == [True] * 4
    assert [one.memory for one in meetings(HostLayout(2, 1, 2))] == [None, None]


def test_a_stage_waits_for_the_one_before_it_longer_than_a_step_may_take() -> None:
    layout = HostLayout(1, 2)
    place = layout.place(1)
    for longest in (5.0, 600.0):
        with RankMeeting(layout, max_step_seconds=longest) as meeting:
            told = meeting.of(place)
            assert told.max_exchange_seconds > longest
            link = join_stages(place, replace(told, max_exchange_seconds=0.2))
            assert link is not None
            with pytest.raises(WorkerError, match=r"within 0\.2 s"):
                link.receive_stream(torch.zeros(8, dtype=torch.bfloat16))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_both_ends_of_every_way_are_told_the_same(tensor_size: int, stages: int, hosts: int) -> None:
    if tensor_size * stages % hosts != 0:
        with pytest.raises(ConfigError, match=f"cannot be spread evenly over {hosts} hosts"):
            HostLayout(tensor_size, stages, hosts)
        return
    layout = HostLayout(tensor_size, stages, hosts)
    told = meetings(layout)
    assert sorted(place.rank for host in range(hosts) for place in layout.places(host)) == list(range(layout.ranks))
    for rank in range(layout.ranks):
        place = layout.place(rank)
        assert told[rank].rendezvous == (AT if hosts > 1 else None)
        stage = [told[other].memory for other in layout.stage_ranks(place.stage)]
        together = len({layout.host_of(other) for other in layout.stage_ranks(place.stage)}) == 1
        assert set(stage) == {told[rank].memory}
        assert (told[rank].memory is not None) == (tensor_size > 1 and together)
        if not place.is_last_stage:
            behind = rank + tensor_size
            assert told[rank].behind == told[behind].before
            assert (told[rank].behind is not None) == (layout.host_of(rank) == layout.host_of(behind))
        if place.is_last_stage and stages > 1:
            assert told[rank].samples == told[place.tensor_rank].samples
            assert (told[rank].samples is not None) == (layout.host_of(rank) == layout.host_of(place.tensor_rank))
        if not (place.is_first_stage or place.is_last_stage):
            assert told[rank].samples is None
