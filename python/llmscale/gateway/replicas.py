"""What the replicas of each served model amount to: its state, its longest sequence, and where they differ.

`ReplicaWatch` looks at the front once a second in O(replicas). It says a difference once, in the log: replicas of one
name are meant to give the same answers, and a front sends requests to some of them only when they are not the same
model. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from llmscale.gateway.config import ServedModel
from llmscale.gateway.front import Front, ReplicaStatus
from llmscale.logs import get_logger

_log = get_logger("llmscale.gateway")
SERVING: Final = ("ready", "recovering")
# The best first.
_STATES: Final = (*SERVING, "starting", "down")
_LOOK_SECONDS: Final = 1.0
# A node that comes and goes with ever new names must not fill the memory.
_MAX_SAID: Final = 1_024


def model_states(names: Iterable[str], replicas: Iterable[ReplicaStatus]) -> dict[str, str]:
    """The best state of any replica of each model: "ready", "recovering", "starting" or "down"."""
    best = dict.fromkeys(names, len(_STATES) - 1)
    for replica in replicas:
        if replica.model in best and replica.state in _STATES:
            best[replica.model] = min(best[replica.model], _STATES.index(replica.state))
    return {name: _STATES[place] for name, place in best.items()}


def fleet_state(states: Mapping[str, str]) -> str:
    """The state of all models together: that of the worst."""
    return max(states.values(), key=_STATES.index, default=_STATES[-1])


class ReplicaWatch:
    """Keeps `models` as their replicas are. Use from the event loop only."""

    def __init__(self, front: Front, models: dict[str, ServedModel]) -> None:
        self._front = front
        self._models = models
        self._limits = {name: model.max_sequence_tokens for name, model in models.items()}
        self._said: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Looks now, and every second from now on."""
        self.look()
        self._timer = loop.call_later(_LOOK_SECONDS, self.start, loop)

    def stop(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        """Lowers each model's longest sequence to what its replicas take, and says what differs between them."""
        known: dict[str, list[ReplicaStatus]] = {}
        for replica in self._front.status().replicas:
            # Before its first word a replica has no sizes.
            if replica.max_sequence_tokens > 0:
                known.setdefault(replica.model, []).append(replica)
        for name, replicas in known.items():
            model = self._models.get(name)
            if model is None:
                self._say(f"nodes serve {name[:128]!r}, which this gateway does not: name it to serve it")
                continue
            # The front takes what the widest replica can take.
            widest = max(replica.max_sequence_tokens for replica in replicas)
            limit = min(self._limits[name], widest)
            if limit != model.max_sequence_tokens:
                self._models[name] = replace(model, max_sequence_tokens=limit)
            for text in differences(model, replicas):
                self._say(text)

    def _say(self, text: str) -> None:
        if text not in self._said and len(self._said) < _MAX_SAID:
            self._said.add(text)
            _log.warning("replicas differ", what=text)


def differences(model: ServedModel, replicas: Sequence[ReplicaStatus]) -> list[str]:
    """What is not the same in all replicas of a model, or not as in the gateway's own folder, as sentences."""
    name = model.name
    found = []
    tokenizers = {_short(replica.tokenizer_digest) for replica in replicas}
    if model.tokenizer_digest is not None and tokenizers != {_short(model.tokenizer_digest)}:
        found.append(
            f"replicas of {name} have the tokenizer {_listed(tokenizers)}, this gateway has"
            f" {_short(model.tokenizer_digest)}: texts would come out wrong; give all of them the same folder"
        )
    vocabularies = {replica.vocabulary for replica in replicas}
    if vocabularies != {model.vocabulary}:
        found.append(
            f"replicas of {name} have {_listed(vocabularies)} token ids, this gateway's folder has"
            f" {model.vocabulary}: give all of them the same folder"
        )
    weights = {_short(replica.weights_digest) for replica in replicas}
    if len(weights) > 1:
        found.append(
            f"replicas of {name} have the weights {_listed(weights)}: these are two models, of which new requests get"
            " one, and streams do not move between them"
        )
    numerics = {replica.numerics for replica in replicas}
    if len(numerics) > 1:
        found.append(
            f"replicas of {name} compute as {_listed(numerics)}: a stream that moves from one to the other goes on"
            " with other last bits"
        )
    lengths = {replica.max_sequence_tokens for replica in replicas}
    if len(lengths) > 1:
        found.append(
            f"replicas of {name} take sequences of {_listed(lengths)} tokens: the longest only run on some; start all"
            " with the same --max-model-len"
        )
    return found


def _listed(values: AbstractSet[int] | AbstractSet[str]) -> str:
    return " and ".join(str(value) for value in sorted(values))


def _short(digest: str) -> str:
    """As much of a digest as people compare."""
    return digest[:12]
