"""One resolver reads flags, torchrun, LeaderWorkerSet and Slurm; what does not fit together is named."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import ConfigError
from llmscale.parallel.hosts import DEFAULT_GROUP_PORT, MAX_HOSTS, HostFlags, Hosts, resolve_hosts
from llmscale.parallel.node_list import expand_node_list

NOTHING = HostFlags()
TORCHRUN = {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "a.example",
    "MASTER_PORT": "29500",
}
LWS = {"LWS_LEADER_ADDRESS": "llm-0.llm.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}
SLURM = {
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08],gpu11",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}


def test_nothing_said_is_one_host() -> None:
    assert resolve_hosts({}, NOTHING) == Hosts()
    assert resolve_hosts({"MASTER_ADDR": "a", "NNODES": "4", "SLURM_JOB_NODELIST": "a[1-4]"}, NOTHING) == Hosts()


@pytest.mark.parametrize(
    ("leader", "host", "port"),
    [
        ("a", "a", DEFAULT_GROUP_PORT),
        ("a:1", "a", 1),
        ("tcp://10.0.0.1:65535", "10.0.0.1", 65_535),
        ("[fe80::1]:9", "fe80::1", 9),
        ("fe80::1", "fe80::1", DEFAULT_GROUP_PORT),
        ("[fe80::1]", "fe80::1", DEFAULT_GROUP_PORT),
    ],
)
def test_flags_that_say_everything_are_taken_as_they_are(leader: str, host: str, port: int) -> None:
    hosts = resolve_hosts(TORCHRUN | LWS | SLURM, HostFlags(3, 1, leader))
    assert hosts == Hosts(3, 1, host, port, ("--hosts", "--host-index", "--leader"))
    assert hosts.address == (f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")


def test_one_host_is_one_host_whatever_launched_it() -> None:
    assert resolve_hosts(TORCHRUN, HostFlags(1)).count == 1
    with pytest.raises(ConfigError, match="--host-index is 1, but --hosts is 1"):
        resolve_hosts({}, HostFlags(1, 1))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            TORCHRUN,
            Hosts(2, 1, "a.example", DEFAULT_GROUP_PORT, ("GROUP_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")),
        ),
        (
            LWS,
            Hosts(
                4,
                2,
                "llm-0.llm.default",
                DEFAULT_GROUP_PORT,
                ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"),
            ),
        ),
        (
            SLURM,
            Hosts(3, 2, "gpu07", DEFAULT_GROUP_PORT, ("SLURM_STEP_NUM_NODES", "SLURM_NODEID", "SLURM_STEP_NODELIST")),
        ),
    ],
)
def test_a_launcher_says_everything_and_every_fact_names_its_source(
    environment: dict[str, str], expected: Hosts
) -> None:
    assert resolve_hosts(environment, NOTHING) == expected
    moved = resolve_hosts(environment, HostFlags(leader="b:9"))
    assert (moved.leader, moved.port, moved.sources[2]) == ("b", 9, "--leader")


def test_without_a_count_of_hosts_torchruns_follows_from_its_ranks() -> None:
    environment = {**TORCHRUN, "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
    del environment["GROUP_WORLD_SIZE"]
    hosts = resolve_hosts(environment, NOTHING)
    assert (hosts.count, hosts.sources[0]) == (3, "WORLD_SIZE over LOCAL_WORLD_SIZE")


def test_one_process_per_host_acts_and_the_others_have_nothing_to_do() -> None:
    per_rank = {**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    acting = [resolve_hosts({**per_rank, "LOCAL_RANK": str(local)}, NOTHING).acts for local in range(4)]
    assert acting == [True, False, False, False]
    assert not resolve_hosts({**SLURM, "SLURM_LOCALID": "1"}, NOTHING).acts


def test_the_launcher_that_is_nearest_to_the_process_is_asked() -> None:
    hosts = resolve_hosts({**TORCHRUN, **LWS, "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}, NOTHING)
    assert (hosts.index, hosts.leader) == (1, "a.example")


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({}, HostFlags(hosts=2), "--host-index is not set"),
        ({}, HostFlags(host_index=0), "--hosts is not set"),
        ({}, HostFlags(2, 0), "--hosts is 2, and no leader is named; set --leader"),
        ({}, HostFlags(2, 2, "a"), "--host-index is 2, but --hosts is 2: indices go from 0 to 1"),
        ({}, HostFlags(2, -1, "a"), "--host-index is -1"),
        ({}, HostFlags(0, 0, "a"), "--hosts is 0; a replica spans 1 to 1,024 hosts"),
        ({}, HostFlags(2, 0, "a:0"), "--leader is a:0, its port must be"),
        ({}, HostFlags(2, 0, "a b"), "--leader is a b, it must be HOST or HOST:PORT"),
        (TORCHRUN, HostFlags(hosts=3), "--hosts is 3, but GROUP_WORLD_SIZE is 2"),
        (TORCHRUN, HostFlags(host_index=0), "--host-index is 0, but GROUP_RANK is 1"),
        ({**TORCHRUN, "WORLD_SIZE": "5"}, NOTHING, "WORLD_SIZE is 5, but GROUP_WORLD_SIZE is 2"),
        ({**TORCHRUN, "NODE_RANK": "0"}, NOTHING, "GROUP_RANK is 1, but NODE_RANK is 0; they mean the same"),
        ({**TORCHRUN, "NNODES": "7"}, NOTHING, "GROUP_WORLD_SIZE is 2, but NNODES is 7"),
        ({**TORCHRUN, "LOCAL_RANK": "1"}, NOTHING, "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
        ({**TORCHRUN, "GROUP_RANK": "one"}, NOTHING, "GROUP_RANK is 'one', it must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": str(DEFAULT_GROUP_PORT)}, NOTHING, "MASTER_PORT is 7070, where torchrun itself"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, NOTHING, r"set --leader \(or MASTER_ADDR\)"),
        ({"GROUP_RANK": "0"}, NOTHING, "GROUP_RANK is 0, but neither GROUP_WORLD_SIZE nor NNODES"),
        ({"WORLD_SIZE": "4", "RANK": "2"}, NOTHING, "WORLD_SIZE is 4 and RANK 2, but neither GROUP_RANK"),
        ({**LWS, "LWS_GROUP_SIZE": ""}, NOTHING, "LWS_LEADER_ADDRESS is llm.*, but LWS_GROUP_SIZE is not set"),
        ({**LWS, "LWS_WORKER_INDEX": "4"}, NOTHING, "LWS_WORKER_INDEX is 4, but LWS_GROUP_SIZE is 4"),
        ({**TORCHRUN, **LWS}, NOTHING, "GROUP_WORLD_SIZE is 2, but LWS_GROUP_SIZE is 4"),
        ({**SLURM, "SLURM_NODEID": ""}, NOTHING, "SLURM_NODEID is not set"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, NOTHING, "SLURM_STEP_NODELIST is 'gpu.*', which names 3"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[1-"}, NOTHING, "SLURM_STEP_NODELIST is 'gpu.*', which is no list"),
        (
            {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0"},
            NOTHING,
            r"SLURM_STEP_NUM_NODES is 2, and no leader is named; set --leader \(or SLURM_STEP_NODELIST\)",
        ),
    ],
)
def test_holes_and_contradictions_are_named_with_their_values(
    environment: dict[str, str], flags: HostFlags, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_hosts(environment, flags)


NAMES = ("GROUP_RANK", "GROUP_WORLD_SIZE", "NNODES", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
NAMES += ("RANK", "MASTER_ADDR", "MASTER_PORT", *LWS, *SLURM, "SLURM_JOB_NODELIST")
VALUES = st.sampled_from(("", "0", "1", "2", "3", "-1", "x", "a[0-1]", "a,b,c", "99999999999", "[", "a["))


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES),
    st.builds(
        HostFlags,
        st.none() | st.integers(-1, 4),
        st.none() | st.integers(-1, 4),
        st.none() | st.sampled_from(("a", "a:1", ":", "a:x", "[::1]:2")),
    ),
)
def test_any_environment_gives_hosts_that_make_sense_or_a_typed_error(
    environment: dict[str, str], flags: HostFlags
) -> None:
    try:
        hosts = resolve_hosts(environment, flags)
    except ConfigError:
        return
    assert 0 <= hosts.index < hosts.count <= MAX_HOSTS
    assert hosts.leader
    assert 0 < hosts.port < 65_536


@given(st.integers(2, 24), st.data())
def test_all_hosts_of_a_launcher_agree_on_all_but_their_index(count: int, data: st.DataObject) -> None:
    launched = data.draw(st.sampled_from((torchrun, leader_worker_set, slurm)))
    views = [resolve_hosts(launched(count, index), NOTHING) for index in range(count)]
    assert [view.index for view in views] == list(range(count))
    assert len({(view.count, view.leader, view.port, view.sources) for view in views}) == 1
    assert views[0].is_leader
    assert not any(view.is_leader for view in views[1:])


def torchrun(count: int, index: int) -> dict[str, str]:
    world = {"WORLD_SIZE": str(count), "GROUP_WORLD_SIZE": str(count)}
    return {**TORCHRUN, **world, "GROUP_RANK": str(index), "RANK": str(index)}


def leader_worker_set(count: int, index: int) -> dict[str, str]:
    return {**LWS, "LWS_GROUP_SIZE": str(count), "LWS_WORKER_INDEX": str(index)}


def slurm(count: int, index: int) -> dict[str, str]:
    nodes = f"n[0000-{count - 1:04d}]"
    return {**SLURM, "SLURM_STEP_NUM_NODES": str(count), "SLURM_STEP_NODELIST": nodes, "SLURM_NODEID": str(index)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b-1.c", ["a", "b-1.c"]),
        ("n[08-11,7]", ["n08", "n09", "n10", "n11", "n7"]),
        ("r[0-1]n[1,3]-ib", ["r0n1-ib", "r0n3-ib", "r1n1-ib", "r1n3-ib"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_a_list_of_nodes_is_written_out_in_order(text: str, names: list[str]) -> None:
    assert expand_node_list(text, "LIST", 9) == names


@pytest.mark.parametrize(
    "text", ["", ",", "a,", "a,,b", "a b", "a[]", "a[1", "a]1", "a[2-1]", "a[1-2-3]", "a[-]", "a\n"]
)
def test_what_is_no_list_of_nodes_is_refused_by_the_name_of_its_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="LIST is "):
        expand_node_list(text, "LIST", 9)


def test_a_short_text_that_stands_for_very_many_nodes_is_refused_without_writing_them_out() -> None:
    assert len(expand_node_list("n[0-8]", "LIST", 9)) == 9
    for text in ("n[0-9]", "n[0-999999999]", "n[0-999999999][0-999999999]", "n[0-4],m[0-4]"):
        with pytest.raises(ConfigError, match="more than 9 nodes"):
            expand_node_list(text, "LIST", 9)
    with pytest.raises(ConfigError, match="70,000 characters"):
        expand_node_list("n" * 70_000, "LIST", 9)


@given(
    st.lists(st.tuples(st.sampled_from("ab-."), st.integers(0, 30), st.integers(0, 4), st.integers(1, 4)), min_size=1)
)
def test_ranges_with_leading_zeros_come_out_as_they_were_packed(words: list[tuple[str, int, int, int]]) -> None:
    text = ",".join(f"x{name}[{first:0{width}d}-{first + more}]" for name, first, more, width in words)
    expected = itertools.chain.from_iterable(
        (f"x{name}{number:0{width}d}" for number in range(first, first + more + 1))
        for name, first, more, width in words
    )
    assert expand_node_list(text, "LIST", 1_000) == list(expected)
