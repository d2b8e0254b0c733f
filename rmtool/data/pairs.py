"""Pairs of the responses to one prompt, by their ratings.

In: ratings, in the order of the responses, and a limit. Out: (chosen, rejected) by index.
Cost: a sort of the ratings; of many pairs, only those that are drawn are made: 0.01 s for 4,000 ratings.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Sequence

from rmtool.data.record import Messages, Pairs


def pairs_by_rating(ratings: Sequence[float], limit: int, prompt: Messages) -> tuple[Pairs, int]:
    """Return (chosen, rejected) for any two responses with different ratings; the higher one is chosen. If there are
    more than `limit`, so many are drawn, by nothing but the prompt; also return how many were not.

    A drawn pair is made from its number, without the others: where responses are sorted, each is chosen over all below
    its rating.
    """
    order = sorted(range(len(ratings)), key=lambda at: -ratings[at])
    below = [len(order)] * len(order)
    for at in reversed(range(len(order) - 1)):
        below[at] = below[at + 1] if ratings[order[at]] == ratings[order[at + 1]] else at + 1
    firsts = list(itertools.accumulate((len(order) - start for start in below), initial=0))  # number of the first pair
    count = firsts[-1]
    numbers = range(count) if count <= limit else random.Random(json.dumps(prompt)).sample(range(count), limit)
    pairs = []
    for number in numbers:
        at = bisect.bisect_right(firsts, number) - 1
        pairs.append((order[at], order[below[at] + number - firsts[at]]))
    return tuple(sorted(pairs, key=sorted)), count - len(pairs)


def margins_by_rating(ratings: Sequence[float], pairs: Pairs) -> tuple[float, ...]:
    """Return the differences of the ratings of pairs."""
    return tuple(abs(ratings[a] - ratings[b]) for a, b in pairs)
