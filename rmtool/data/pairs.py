"""Pairs of the responses to one prompt, by their ratings, in one row or in several.

In: ratings, in the order of the responses, and a limit. Out: (chosen, rejected) by index; records of several rows.
Cost: a sort of the ratings; of many pairs, only those that are drawn are made: 0.01 s for 4,000 ratings.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Iterator, Sequence

from rmtool.data.record import Messages, Pairs, Record, RowOptions
from rmtool.data.rejects import Rejects
from rmtool.errors import RmtoolError


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


def grouped(singles: Sequence[Record], options: RowOptions, rejects: Rejects) -> Iterator[Record]:
    """Make one record of the rows with the same prompt; rows that differ in weight or subset go to `rejects`."""
    groups: dict[tuple[Messages, str, str], list[Record]] = {}
    for record in singles:
        groups.setdefault((record.prompt, record.tools, record.template_kwargs), []).append(record)
    for (prompt, tools, kwargs), members in groups.items():
        records = list(_consistent(members, rejects))
        ratings = [record.margins[0] or 0.0 for record in records]
        pairs, dropped = pairs_by_rating(ratings, options.max_pairs, prompt)
        margins = margins_by_rating(ratings, pairs) if options.rating_margins else (None,) * len(pairs)
        responses = tuple(record.responses[0] for record in records)
        first = records[0]
        row = first.row if len(records) == 1 else {"rows": [record.row for record in records]}
        places = tuple(record.place for record in records)
        labels = (pairs, margins, first.subset, first.weight)
        yield Record(first.place, prompt, responses, *labels, tools, row, places, dropped, kwargs)


def _consistent(records: Sequence[Record], rejects: Rejects) -> Iterator[Record]:
    """Return the first of a prompt's rows, and those with the same weight and subset."""
    first = records[0]
    for record in records:
        if (record.weight, record.subset) == (first.weight, first.subset):
            yield record
            continue
        what = f"weight or subset differs from {first.place}, which has the same prompt"
        found = f"{record.weight:g}, {record.subset} (there: {first.weight:g}, {first.subset})"
        hint = "use the same weight and subset in all rows of a prompt"
        rejects.add(RmtoolError("E0303", what, hint, record.place, found), record.row)
