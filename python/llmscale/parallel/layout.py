"""Which rank of a replica runs on which host: consecutive ranks fill one host after the other, all hosts alike.

Ranks of one stage are consecutive too, so a stage stays within a host wherever it fits, and what crosses hosts is one
stream between stages rather than sums within layers. Pure arithmetic, O(1). It does not know addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.errors import ConfigError
from llmscale.models.shard import RankPlace


@dataclass(frozen=True, slots=True)
class HostLayout:
    """The ranks of a replica of `tensor_size` x `stages`, spread over `hosts`."""

    tensor_size: int = 1
    stages: int = 1
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.ranks % self.hosts != 0:
            raise ConfigError(
                f"{self.tensor_size} x {self.stages} = {self.ranks} ranks (--tensor-parallel-size x"
                f" --pipeline-parallel-size) cannot be spread evenly over {self.hosts} hosts; every host runs as many"
            )

    @property
    def ranks(self) -> int:
        """Of the whole replica."""
        return self.tensor_size * self.stages

    @property
    def ranks_per_host(self) -> int:
        """On each."""
        return self.ranks // self.hosts

    def place(self, rank: int) -> RankPlace:
        """Place of a rank."""
        return RankPlace.of_rank(rank, self.tensor_size, self.stages)

    def places(self, host: int) -> tuple[RankPlace, ...]:
        """Places of a host's ranks."""
        first = host * self.ranks_per_host
        return tuple(self.place(rank) for rank in range(first, first + self.ranks_per_host))

    def host_of(self, rank: int) -> int:
        """Where a rank runs."""
        return rank // self.ranks_per_host

    def are_together(self, ranks: range) -> bool:
        """Whether all of these run on one host."""
        return self.host_of(ranks[0]) == self.host_of(ranks[-1])

    def stage_ranks(self, stage: int) -> range:
        """The ranks that share a stage's layers."""
        return range(stage * self.tensor_size, (stage + 1) * self.tensor_size)


def row_bounds(rows: int, ranks: int) -> list[int]:
    """Rows dealt to ranks, consecutive and as evenly as can be: rank r has `bounds[r]` to `bounds[r + 1]`.

    The first rank gets the first row, so that of a single one nobody has to be told but those who need it later.
    """
    return [-(-rows * rank // ranks) for rank in range(ranks + 1)]
