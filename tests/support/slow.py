"""Chooses which of many cases the default suite runs; the others are behind ``-m slow``."""

from collections import Counter
from collections.abc import Collection, Iterable

import pytest


def mostly_slow(cases: Iterable, quick: int | Collection) -> list:
    """Mark as slow all cases but ``quick``: these, or one of so many."""
    return [
        _case(case, number % quick == 0 if isinstance(quick, int) else case in quick)
        for number, case in enumerate(cases)
    ]


def once_each(pairs: Iterable[tuple], *, as_one: bool = False) -> list:
    """Mark as slow the pairs that aren't needed for every first and every second value to come once.

    ``as_one``: as the parameter of a fixture, which is a single one.
    """
    pairs, times, chosen = list(pairs), Counter(), set()
    for first in dict.fromkeys(first for first, _ in pairs):
        second = min((b for a, b in pairs if a == first), key=times.__getitem__)
        times[second] += 1
        chosen.add((first, second))
    for pair in pairs:
        if not times[pair[1]]:
            times[pair[1]] += 1
            chosen.add(pair)
    return [_case((pair,) if as_one else pair, pair in chosen) for pair in pairs]


def _case(case: object, is_quick: bool):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=() if is_quick else pytest.mark.slow)
