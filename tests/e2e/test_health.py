"""Goal: a replica whose worker stands still costs its clients little: it is left alone and tried again, and with second
attempts a late first token comes from elsewhere.

Method: real servers with two replicas, SIGSTOP and SIGCONT for one worker; what the gateway says of it in /fleet and
/metrics, and ids compared with an undisturbed run in float32.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.test_worker_death import first_difference
from tests.processes import Server, serving_fleet, stopped, wait_until

# torch: what waits longest is told apart from a busy machine by steps that take a while.
MODEL = '[models.tiny-chat]\nmodel = "tiny-chat"\nreplicas = 2\ndtype = "float32"\nthreads = 1\nexecutor = "torch"\n'
# Five late first tokens eject where they are half of all. Requests are sent at once, so that each replica gets some.
# The busier the machine, the fewer wait for each other: more are sent until the victim holds enough.
REQUESTS_AT_ONCE = 24
LEAST_HELD = 8
# Late is half a second more than predicted, and four times what was: so long after the last of them has arrived there.
# On a busy machine more is predicted, and the other replica is late too: then it stands still once more, for longer.
STALL_SECONDS = 2.0
MOST_STALLS = 5
# What is predicted rests on the first steps; what is late is weighed beside the others' answers.
WARM_ANSWERS = 8
# A front knows what is late after a hundred first tokens, and may send a twentieth of their prompts' tokens twice.
ANSWERS = 120
RACES = 4


def replica(server: Server, node: str) -> dict[str, Any]:
    """What the gateway says of one."""
    return next(one for one in server.replicas() if one["node"] == node)


@contextmanager
def two_replicas(folder: Path, settings: str) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server with two replicas that are ready, and the one that will suffer."""
    with serving_fleet(folder, settings + MODEL) as server:
        wait_until(lambda: server.states() == ["ready"] * 2, 120, "both replicas are ready")
        yield server, server.replicas()[0]


def complete(server: Server, seed: int, max_tokens: int, prompt: str = "Once upon a time") -> dict[str, Any]:
    """A whole answer with the texts of its tokens."""
    body = {"model": "tiny-chat", "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "ignore_eos": True}
    answer = server.post("/v1/completions", {**body, "logprobs": 0})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_replica_that_stands_still_is_left_alone_and_used_again_after_its_probe(tmp_path: Path) -> None:
    with (
        two_replicas(tmp_path, "ejection_seconds = 0.5\n") as (server, victim),
        ThreadPoolExecutor(4 * REQUESTS_AT_ONCE) as pool,
    ):
        list(pool.map(lambda seed: complete(server, seed, 4), range(WARM_ANSWERS)))
        assert (victim["trust"], victim["ejections"]) == ("trusted", 0)

        for stall in range(1, MOST_STALLS + 1):
            stand_still(server, victim, pool, stall * STALL_SECONDS)
            judged = server.replicas()
            if replica(server, victim["node"])["ejections"]:
                break
        # With nobody asking, it stays what it is after its span.
        wait_until(
            lambda: replica(server, victim["node"])["trust"] == "probing",
            30,
            "its span is over",
            lambda: judged,
        )
        said = replica(server, victim["node"])
        assert said["state"] == "ready"
        assert 1 <= said["ejections"] <= server.get("/fleet").json()["attempts"]["ejections"]
        trusted = {one["node"]: one["trust"] == "trusted" for one in server.replicas()}
        assert sorted(trusted.values()) == [False, True]
        for node, is_trusted in trusted.items():
            assert f'replica_trusted{{model_name="tiny-chat",node="{node}"}} {float(is_trusted)}' in exposition(server)

        def is_trusted_again() -> bool:
            list(pool.map(lambda seed: complete(server, seed, 1), range(4)))
            return bool(replica(server, victim["node"])["trust"] == "trusted")

        wait_until(is_trusted_again, 120, "a request was its probe, and was answered")
        steps = replica(server, victim["node"])["steps"]

        def has_run() -> bool:
            list(pool.map(lambda seed: complete(server, seed, 1), range(4)))
            return bool(replica(server, victim["node"])["steps"] > steps)

        wait_until(has_run, 120, "it gets requests again")


def stand_still(server: Server, victim: dict[str, Any], pool: ThreadPoolExecutor, seconds: float) -> None:
    """A replica's worker is stopped until it owes enough first tokens for so long; then everybody is answered."""
    answers: list[Future[dict[str, Any]]] = []

    def held() -> int:
        said = replica(server, victim["node"])
        count: int = said["running"] + said["waiting"]
        return count

    def ask(times: int) -> None:
        """More, once all that are open are the victim's."""
        if sum(not answer.done() for answer in answers) <= held():
            answers.extend(pool.submit(complete, server, seed, 4) for seed in range(times))

    def holds_enough() -> bool:
        if held() >= LEAST_HELD:
            return True
        ask(REQUESTS_AT_ONCE)
        return False

    def is_over() -> bool:
        # Lateness is weighed beside what the other one has answered in the last seconds.
        ask(1)
        return time.monotonic() - began > seconds

    with stopped(victim["worker_pid"]):
        wait_until(holds_enough, 120, "it holds enough", server.replicas)
        began = time.monotonic()
        wait_until(is_over, 120, "it has stood still for long enough")
    assert all(answer.result()["usage"]["completion_tokens"] == 4 for answer in answers)


def exposition(server: Server) -> str:
    """Everything that Prometheus would read."""
    return server.get("/metrics").text


def test_a_first_token_that_a_stopped_worker_owes_comes_from_the_other_replica(tmp_path: Path) -> None:
    with two_replicas(tmp_path, "hedging = true\n") as (server, victim), ThreadPoolExecutor(RACES << 4) as pool:
        long = "The old sailor told of " + " and ".join(f"{number} ships" for number in range(12))
        list(pool.map(lambda seed: complete(server, seed, 1, long), range(ANSWERS)))
        undisturbed = list(pool.map(lambda seed: complete(server, seed, 64), range(RACES)))
        wait_until(lambda: not any(one["running"] for one in server.replicas()), 120, "nothing runs")
        before = server.get("/fleet").json()["attempts"]
        answers: list[tuple[int, dict[str, Any]]] = []
        rounds = itertools.count()

        def has_won() -> bool:
            """More each time: where one replica looks faster, a few requests all go there."""
            seeds = [seed % RACES for seed in range(RACES << min(next(rounds), 4))]
            answers.extend(zip(seeds, pool.map(lambda seed: complete(server, seed, 64), seeds), strict=True))
            return bool(server.get("/fleet").json()["attempts"]["hedge_wins"] > before["hedge_wins"])

        with stopped(victim["worker_pid"]):
            # Without second attempts, those that were sent to it would wait until somebody replaces it.
            wait_until(has_won, 240, "a second attempt has won", server.replicas)
            after = server.get("/fleet").json()["attempts"]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        for seed, answer in answers:
            tokens, expected = (one["choices"][0]["logprobs"]["tokens"] for one in (answer, undisturbed[seed]))
            assert first_difference(tokens, expected) is None
            assert [answer["usage"][name] for name in names] == [undisturbed[seed]["usage"][name] for name in names]
        won = after["hedge_wins"] - before["hedge_wins"]
        assert 1 <= won <= len(answers)
        assert after["hedges"] - before["hedges"] >= won
        assert server.metric("front_hedge_wins_total") == after["hedge_wins"]
        assert server.metric("front_hedged_tokens_total") * 20 <= server.metric("front_first_attempt_tokens_total")
        wait_until(lambda: not any(one["running"] for one in server.replicas()), 120, "the losers are given up")
        assert server.get("/fleet").json()["live_requests"] == 0
