"""Leader and followers agree on what runs, whatever frames are lost, and whoever goes is named. All in virtual time."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.config import MAX_DRAIN_SECONDS
from llmscale.errors import TransportError
from llmscale.node.group_messages import (
    FollowerMessage,
    HostFacts,
    LeaderMessage,
    Leave,
    RankLink,
    Refused,
    Report,
    Wanted,
    bounded,
    decode_follower,
    decode_leader,
    difference,
    encode,
)
from llmscale.node.membership import SIGNALS_SECONDS, Membership
from llmscale.node.roster import BEAT_SECONDS, MAX_SILENCE_SECONDS, Outgoing, Roster

FACTS = HostFacts("1.0", "fleet", 3, 1, 3, "weights", "none", "config", "tokens", "float32", 2_048, 64, 512)
STEP_SECONDS = BEAT_SECONDS / 2
BLOCKS = 100


def links(host: int) -> tuple[RankLink, ...]:
    return (RankLink(host, 4_000 + host),)


ALL_LINKS = {1: links(1), 2: links(2)}


def report(host: int, incarnation: str = "", epoch: int = 0, death: str | None = None) -> Report:
    return Report(host, incarnation or f"process {host}", FACTS, BLOCKS, epoch, death)


@dataclasses.dataclass
class Group:
    """A leader and followers on a network that loses what it is told to lose."""

    roster: Roster = dataclasses.field(default_factory=lambda: Roster("leader", FACTS, BLOCKS))
    now: float = 1.0
    members: dict[int, Membership] = dataclasses.field(default_factory=dict)
    cut: set[int] = dataclasses.field(default_factory=set)

    def join(self, host: int, incarnation: str = "") -> Membership:
        incarnation = incarnation or f"process {host}"
        self.members[host] = member = Membership(host, incarnation, FACTS, BLOCKS, self.now)
        return member

    def deliver(self, outgoing: Outgoing) -> None:
        for peer, message in outgoing:
            if peer not in self.cut and peer in self.members:
                self.members[peer].hear(self.now, decode_leader(encode(message)))

    def say(self, host: int, message: FollowerMessage | None) -> None:
        if message is not None and host not in self.cut:
            self.deliver(self.roster.hear(self.now, host, decode_follower(encode(message))))

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += STEP_SECONDS
            self.deliver(self.roster.tick(self.now))
            for host, member in self.members.items():
                self.say(host, member.tick(self.now))

    def run(self, epoch: int) -> None:
        self.deliver(self.roster.run(epoch, ALL_LINKS, 5_000))
        for host in self.members:
            self.members[host].started(epoch)
        self.pass_time(BEAT_SECONDS * 2)

    def wanted(self) -> dict[int, int | None]:
        return {host: None if one.wanted is None else one.wanted.epoch for host, one in self.members.items()}


@pytest.fixture
def group() -> Group:
    """Both followers are there."""
    made = Group()
    made.join(1)
    made.join(2)
    made.pass_time(BEAT_SECONDS)
    assert made.roster.missing == ()
    return made


def test_hosts_are_missing_until_they_have_come() -> None:
    group = Group()
    assert group.roster.missing == (1, 2)
    group.join(2)
    group.pass_time(BEAT_SECONDS)
    assert group.roster.missing == (1,)
    assert group.members[2].has_leader
    assert group.members[2].wanted is None


def test_every_host_is_told_its_own_ranks_and_when_the_group_serves(group: Group) -> None:
    group.run(1)
    wanted = [group.members[host].wanted for host in (1, 2)]
    assert wanted == [Wanted("leader", 1, links(host), 5_000) for host in (1, 2)]
    assert group.roster.trouble is None
    group.deliver(group.roster.serve())
    assert group.members[1].serving
    group.deliver(group.roster.rest())
    assert group.wanted() == {1: None, 2: None}


def test_a_death_under_the_last_leader_is_no_news_for_the_next_one(group: Group) -> None:
    group.run(1)
    group.members[1].ended(1, "the worker of rank 1 died: its peer closed")
    group.roster = Roster("next leader", FACTS, BLOCKS)
    group.pass_time(MAX_SILENCE_SECONDS + BEAT_SECONDS)
    assert group.roster.missing == ()
    # The next leader's first epoch has the same number, and ranks take seconds to start.
    group.deliver(group.roster.run(1, ALL_LINKS, 5_000))
    group.pass_time(BEAT_SECONDS * 2)
    assert group.roster.trouble is None
    for member in group.members.values():
        member.started(1)
    group.members[2].ended(1, "the worker of rank 2 died: SIGKILL")
    group.pass_time(BEAT_SECONDS * 2)
    assert group.roster.trouble == "host 2: the worker of rank 2 died: SIGKILL"


def test_a_frame_that_is_lost_is_said_again_with_the_next_beat(group: Group) -> None:
    group.cut = {1}
    group.run(1)
    assert group.wanted() == {1: None, 2: 1}
    group.cut = set()
    group.pass_time(BEAT_SECONDS)
    assert group.wanted() == {1: 1, 2: 1}


def test_a_death_is_the_groups_trouble_under_its_name_and_the_next_epoch_is_without(group: Group) -> None:
    group.run(1)
    group.members[2].ended(1, "the worker of rank 2 died: SIGKILL")
    group.pass_time(BEAT_SECONDS)
    assert group.roster.trouble == "host 2: the worker of rank 2 died: SIGKILL"
    group.members[1].ended(1, "the worker of rank 1 died: exit code 1")
    group.pass_time(BEAT_SECONDS)
    assert group.roster.trouble == "host 2: the worker of rank 2 died: SIGKILL", "what came first is the cause"
    group.run(2)
    assert group.roster.trouble is None
    assert group.wanted() == {1: 2, 2: 2}


def test_a_death_in_an_older_epoch_is_no_trouble_of_the_next(group: Group) -> None:
    group.run(1)
    group.deliver(group.roster.run(2, ALL_LINKS, 5_001))
    group.say(1, report(1, epoch=1, death="late news"))
    assert group.roster.trouble is None


def test_a_silent_host_is_gone_after_two_seconds_and_not_before(group: Group) -> None:
    group.run(1)
    group.cut = {1}
    group.pass_time(MAX_SILENCE_SECONDS - BEAT_SECONDS)
    assert (group.roster.trouble, group.roster.missing) == (None, ())
    group.pass_time(BEAT_SECONDS * 3)
    assert group.roster.trouble is not None
    assert group.roster.trouble.startswith("host 1 has said nothing for 2.")
    assert group.roster.missing == (1,)
    assert group.members[1].wanted is None, "it hears nothing either, and has ended its ranks"
    assert not group.members[1].has_leader


def test_a_host_that_was_cut_off_comes_back_by_itself(group: Group) -> None:
    group.run(1)
    group.cut = {1}
    group.pass_time(MAX_SILENCE_SECONDS * 2)
    group.deliver(group.roster.rest())
    group.cut = set()
    group.pass_time(BEAT_SECONDS * 2)
    assert group.roster.missing == ()
    group.run(2)
    assert group.wanted() == {1: 2, 2: 2}


def test_a_host_that_leaves_is_trouble_at_once(group: Group) -> None:
    group.run(1)
    group.say(2, group.members[2].leave())
    assert group.roster.trouble == "host 2 was told to end"
    assert group.roster.missing == (2,)


def test_the_leave_of_an_earlier_process_is_not_that_of_its_successor(group: Group) -> None:
    group.say(1, Leave(1, "an earlier one"))
    assert group.roster.missing == ()


def test_a_host_that_was_started_anew_is_taken_when_its_predecessor_is_silent(group: Group) -> None:
    group.run(1)
    group.join(1, "its successor")
    group.pass_time(MAX_SILENCE_SECONDS / 2)
    assert group.members[1].refusal is None
    group.pass_time(MAX_SILENCE_SECONDS)
    assert group.members[1].refusal is None
    assert group.members[1].has_leader
    assert group.roster.missing == ()
    assert group.roster.trouble is not None, "what ran at the predecessor is gone"


def test_a_host_whose_connection_has_ended_is_missing_until_it_is_heard_over_another(group: Group) -> None:
    group.run(1)
    group.roster.disconnected(1)
    assert (group.roster.missing, group.roster.trouble) == ((1,), None), "its ranks may be well"
    group.pass_time(BEAT_SECONDS)
    assert group.roster.missing == ()
    group.roster.disconnected(1)
    group.join(1, "its successor")
    group.pass_time(BEAT_SECONDS)
    assert group.members[1].has_leader, "nobody has to be missed for two seconds"
    assert group.roster.trouble == "host 1 was started anew"


def test_hosts_are_busy_until_they_have_ended_the_ranks_of_the_epoch_that_is_over(group: Group) -> None:
    group.run(1)
    assert group.roster.busy == ()
    group.deliver(group.roster.rest())
    assert group.roster.busy == (1, 2)
    group.members[1].ended(1, None)
    group.members[2].ended(1, "it died by itself")
    group.pass_time(BEAT_SECONDS)
    assert group.roster.busy == ()


def test_a_second_process_with_the_index_of_a_living_one_is_sent_away(group: Group) -> None:
    outgoing: Outgoing = []
    while group.now < 1 + MAX_SILENCE_SECONDS * 2:
        group.pass_time(BEAT_SECONDS)
        outgoing = group.roster.hear(group.now, 9, report(1, "an impostor"))
    assert [(peer, type(message)) for peer, message in outgoing] == [(9, Refused)]
    assert "host index 1 is taken by another process" in str(outgoing[0][1])
    assert group.roster.missing == ()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("version", "2.0", "its version is 2.0, the leader's is 1.0"),
        ("hosts", 2, "its hosts is 2, the leader's is 3"),
        ("pipeline_parallel_size", 6, "its pipeline parallel size is 6, the leader's is 3"),
        ("weights", "other", "its weights is other, the leader's is weights"),
        ("quantization", "int8", "its quantization is int8, the leader's is none"),
        ("dtype", "bfloat16", "its dtype is bfloat16, the leader's is float32"),
        ("max_model_len", 1_024, "its max model len is 1024, the leader's is 2048"),
    ],
)
def test_a_host_that_differs_is_refused_by_the_name_of_what_differs(name: str, value: object, said: str) -> None:
    roster = Roster("leader", FACTS, BLOCKS)
    other = msgspec.structs.replace(FACTS, **{name: value})
    member = Membership(1, "process", other, BLOCKS, 0.0)
    asked = member.tick(0.0)
    assert asked is not None
    [(peer, message)] = roster.hear(0.0, 4, asked)
    member.hear(0.0, message)
    assert peer == 4
    assert member.refusal is not None
    assert said in member.refusal
    assert roster.last_refusal == member.refusal
    assert roster.missing == (1, 2)


def test_facts_that_are_equal_have_no_difference_and_each_one_counts() -> None:
    assert difference(FACTS, 1, FACTS) is None
    for name in HostFacts.__struct_fields__:
        other = msgspec.structs.replace(FACTS, **{name: None})
        assert name.replace("_", " ") in str(difference(FACTS, 1, other))


@pytest.mark.parametrize("host", [0, 3, -1, 10**9])
def test_an_index_that_does_not_exist_is_refused(host: int) -> None:
    [(_, message)] = Roster("leader", FACTS, BLOCKS).hear(0.0, 1, report(host, "x"))
    assert f"host index {host} does not exist" in str(message)


def test_a_host_with_less_memory_than_is_planned_is_refused_and_one_with_as_much_is_not() -> None:
    roster = Roster("leader", FACTS, BLOCKS)
    [(_, message)] = roster.hear(0.0, 1, Report(1, "x", FACTS, BLOCKS - 1))
    assert "memory for 99 KV blocks, the leader plans 100" in str(message)
    assert not [one for one in roster.hear(0.0, 1, Report(1, "x", FACTS, BLOCKS)) if isinstance(one[1], Refused)]
    assert roster.missing == (2,)


def test_the_end_of_the_leader_is_the_end_of_what_it_wanted(group: Group) -> None:
    group.run(1)
    group.deliver(group.roster.end())
    assert group.wanted() == {1: None, 2: None}
    assert not group.members[1].has_leader
    group.members[1].hear(group.now, Wanted("another", 1, links(1), 6_000))
    assert group.members[1].wanted == Wanted("another", 1, links(1), 6_000)


def test_a_host_that_was_asked_to_end_is_needed_while_its_leader_drains(group: Group) -> None:
    member = group.members[1]
    assert not member.is_needed(0.0), "nothing runs"
    group.run(1)
    assert member.is_needed(SIGNALS_SECONDS)
    assert not member.is_needed(SIGNALS_SECONDS + 0.1), "it alone was asked"
    group.deliver(group.roster.drain())
    group.pass_time(BEAT_SECONDS * 2)
    assert member.wanted == Wanted("leader", 1, links(1), 5_000, draining=True)
    assert member.is_needed(MAX_DRAIN_SECONDS)
    assert not member.is_needed(MAX_DRAIN_SECONDS + SIGNALS_SECONDS + 0.1), "no drain takes so long"
    group.deliver(group.roster.rest())
    assert member.wanted is None
    assert member.is_needed(MAX_DRAIN_SECONDS), "a rank has died, and the next group is made of the same hosts"
    group.deliver(group.roster.end())
    assert not member.is_needed(0.0)


def test_another_leader_at_the_same_door_has_groups_of_its_own(group: Group) -> None:
    group.run(1)
    before = group.members[1].wanted
    group.members[1].hear(group.now, Wanted("another", 1, links(1), 5_000))
    after = group.members[1].wanted
    assert before is not None
    assert after is not None
    assert before.group != after.group, "the epoch's number alone would keep the old ranks"


EVENTS = st.sampled_from(("cut 1", "cut 2", "mend", "die 1", "die 2", "restart 1", "wait", "wait long", "leave 2"))


@settings(max_examples=60)
@given(st.lists(EVENTS, max_size=25))
def test_after_any_troubles_a_group_of_hosts_that_are_well_runs_again(events: list[str]) -> None:
    group = Group()
    group.join(1)
    group.join(2)
    group.pass_time(BEAT_SECONDS * 2)
    epoch = 1
    group.run(epoch)
    for number, event in enumerate(events):
        what, _, host = event.partition(" ")
        if what == "cut":
            group.cut.add(int(host))
        elif what == "mend":
            group.cut.clear()
        elif what == "die":
            group.members[int(host)].ended(epoch, f"death {number}")
        elif what == "restart":
            group.join(1, f"successor {number}")
        elif what == "leave":
            group.say(2, group.members[2].leave())
        else:
            group.pass_time(MAX_SILENCE_SECONDS if host else BEAT_SECONDS)
        if group.roster.trouble is not None and not group.roster.missing:
            epoch += 1
            group.run(epoch)
    group.cut.clear()
    group.pass_time(MAX_SILENCE_SECONDS * 3)
    assert group.roster.missing == ()
    group.run(epoch + 1)
    assert group.wanted() == {1: epoch + 1, 2: epoch + 1}
    assert group.roster.trouble is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_typed_error(frame: bytes) -> None:
    for decode in (decode_follower, decode_leader):
        try:
            assert decode(frame) is not None
        except TransportError:
            continue


@pytest.mark.parametrize(
    "message", [report(1, death="x"), Leave(1, "a"), Refused("no"), Wanted("a", 3, links(1), 9, True, True)]
)
def test_messages_come_back_and_are_not_those_of_the_other_side(message: FollowerMessage | LeaderMessage) -> None:
    ours, theirs = decode_follower, decode_leader
    if not isinstance(message, Report | Leave):
        ours, theirs = theirs, ours  # type: ignore[assignment]
    assert ours(encode(message)) == message
    with pytest.raises(TransportError):
        theirs(encode(message))


def test_a_long_text_is_cut_and_a_short_one_is_not() -> None:
    assert bounded("x" * 2_000) == "x" * 2_000
    assert bounded("x" * 2_001) == "x" * 1_997 + "..."
