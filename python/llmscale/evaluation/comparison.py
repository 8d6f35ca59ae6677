"""Statistics of two models on the same items, graded right or wrong.

McNemar's test (McNemar 1947) in its exact form: where the models differ, each is right with probability one half if
they are equally good. The interval of the difference is a percentile bootstrap over items (Efron 1979), which for
graded pairs is a multinomial draw of counts, so it costs O(resamples) whatever the number of items. It knows no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum, lgamma, log

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """Items that both models got right, only one of them, or neither."""

    both: int
    only_model: int
    only_reference: int
    neither: int

    @property
    def asked(self) -> int:
        return self.both + self.only_model + self.only_reference + self.neither

    @property
    def difference_points(self) -> float:
        """Exact match of the model less that of the reference, in percentage points."""
        return 100 * (self.only_model - self.only_reference) / self.asked

    def mcnemar_p(self) -> float:
        """Probability of so uneven a split of the items on which they differ, or a more uneven one, by chance."""
        differing = self.only_model + self.only_reference
        fewer = min(self.only_model, self.only_reference)
        if differing == 0:
            return 1.0
        # In logarithms: the counts of ways have thousands of digits.
        whole = lgamma(differing + 1) - differing * log(2)
        tail = fsum(exp(whole - lgamma(k + 1) - lgamma(differing - k + 1)) for k in range(fewer + 1))
        return min(1.0, 2 * tail)

    def interval_points(self, seed: int) -> tuple[float, float]:
        """Bootstrap interval of `difference_points` at CONFIDENCE."""
        shares = np.array([self.both + self.neither, self.only_model, self.only_reference]) / self.asked
        drawn = np.random.default_rng(seed).multinomial(self.asked, shares, size=RESAMPLES)
        differences = 100 * (drawn[:, 1] - drawn[:, 2]) / self.asked
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(differences, [tail, 100 - tail])
        return float(low), float(high)


def paired(model: Sequence[bool], reference: Sequence[bool]) -> PairedCounts:
    """Counts of two gradings of the same items, at least one."""
    assert len(model) == len(reference) > 0, (len(model), len(reference))
    pairs = list(zip(model, reference, strict=True))
    return PairedCounts(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))
