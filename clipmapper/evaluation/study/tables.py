"""The tables of a study: every method by every quantity, over the models and seeds that it was tried on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from clipmapper.evaluation.explanation_scores.values import HIGH, Quantity
from clipmapper.evaluation.ranking import critical_difference, outcomes, rank_agreement, ranks
from clipmapper.evaluation.study.headline import is_ranked
from clipmapper.evaluation.study.values import StudyValues

RESAMPLES = 2000


@dataclass(frozen=True)
class StudyCell:
    """One model of a study, trained with one seed.

    ``unchanged``: methods whose maps do not depend on what it has learnt. ``seconds``: method → what an
    explanation of a sample takes.
    """

    name: str
    model: str
    values: StudyValues
    unchanged: Sequence[str] = ()
    seconds: Mapping[str, float] | None = None


def section_tables(cells: Sequence[StudyCell], *, confidence: float, seed: int) -> dict[str, dict]:
    """Section → its tables, for ``study.json``; see docs/study.md.

    ``mean_rank`` is over cells and scores, of each the mean over its ranked quantities; wins and losses are
    paired, over cells, quantities and other methods. Raises ValueError where cells of a section differ in
    their methods.
    """
    sections = dict.fromkeys(name for cell in cells for name in cell.values.sections)
    return {
        section: _section(
            [cell for cell in cells if section in cell.values.sections], section, confidence, seed
        )
        for section in sections
    }


def _section(cells: Sequence[StudyCell], section: str, confidence: float, seed: int) -> dict:
    methods = cells[0].values.methods
    if any(cell.values.methods != methods for cell in cells):
        raise ValueError(f"{section}: the cells have other methods")
    of_first = zip(cells[0].values.quantities, cells[0].values.sections, strict=True)
    ranked = [one for one, mine in of_first if mine == section and is_ranked(one)]
    quantities = {one.name: _quantity(cells, section, one, confidence, seed) for one in ranked}
    overall = {}
    for method in methods:
        entries = [found["methods"][method] for found in quantities.values()]
        overall[method] = {
            "mean_rank": _mean_over_scores(
                {name: its["methods"][method]["rank"] for name, its in quantities.items()}
            ),
            "wins": sum(entry["wins"] for entry in entries),
            "losses": sum(entry["losses"] for entry in entries),
            "level": sum(
                len(cells) * (len(methods) - 1) - entry["wins"] - entry["losses"] for entry in entries
            ),
            "unchanged_in": sum(method in cell.unchanged for cell in cells),
            "seconds_a_sample": _mean([cell.seconds[method] for cell in cells if cell.seconds]),
        }
    return {
        "cells": [cell.name for cell in cells],
        "methods": overall,
        "quantities": quantities,
    }


def _quantity(
    cells: Sequence[StudyCell], section: str, quantity: Quantity, confidence: float, seed: int
) -> dict:
    methods, high = cells[0].values.methods, quantity.better == HIGH
    places = [cell.values.place(section, quantity.name) for cell in cells]
    scored = [cell.values.scored(place) for cell, place in zip(cells, places, strict=True)]
    means, drawn = [], []
    for cell, place, chosen in zip(cells, places, scored, strict=True):
        means.append(cell.values.mean(place, chosen))
        drawn.append(cell.values.drawn(place, chosen, resamples=RESAMPLES, seed=seed))
    cell_ranks = ranks(np.stack(means, axis=1), high=high)  # [methods, cells]
    won = [outcomes(sets, high=high, confidence=confidence) for sets in drawn]
    wins = sum((one > 0).astype(int) for one in won)
    sample_ranks, blocks = _sample_ranks(cells, places, scored, high)
    intervals = _interval(means, drawn, confidence)
    groups = _groups(cells, places, scored, confidence, seed)
    table = {}
    for m, method in enumerate(methods):
        table[method] = {
            **_entry(intervals, m),
            "of_cells": [float(mean[m]) for mean in means],
            "deviation": float(np.std([mean[m] for mean in means], ddof=1)) if len(cells) > 1 else None,
            "rank": float(cell_ranks[m].mean()),
            "sample_rank": float(sample_ranks[m]),
            "wins": int(wins[m].sum()),
            "losses": int(wins[:, m].sum()),
            "groups": {
                way: {
                    label: _entry(found, m) | {"samples": count} for label, (found, count) in labels.items()
                }
                for way, labels in groups.items()
            },
        }
    several = len(methods) > 1
    return {
        "better": quantity.better,
        "factor": quantity.factor,
        "samples": int(np.mean([chosen.sum() for chosen in scored])),
        "methods": table,
        # Row over column: in how many cells the row's method is better.
        "wins": wins.tolist(),
        "critical_difference": critical_difference(len(methods), blocks) if several else None,
        "critical_difference_of_cells": critical_difference(len(methods), len(cells)) if several else None,
        "blocks": blocks,
        "tau": [[rank_agreement(a, b) if several else None for b in means] for a in means],
    }


def _sample_ranks(
    cells: Sequence[StudyCell], places: Sequence[int], scored: Sequence[np.ndarray], high: bool
) -> tuple[Float[np.ndarray, "methods"], int]:
    """Mean ranks where every sample is a block, and the number of blocks.

    A sample's values are those of a model's seeds in the mean; ranks of several models are averaged: they
    were asked the same, so that they are no further blocks.
    """
    of_models = []
    for model in dict.fromkeys(cell.model for cell in cells):
        mine = [number for number, cell in enumerate(cells) if cell.model == model]
        common = np.logical_and.reduce([scored[number] for number in mine])
        seeds = [cells[number].values.parts(places[number], common)[0] for number in mine]
        if common.any():
            of_models.append(ranks(np.mean(seeds, axis=0).T, high=high))
    blocks = min((found.shape[1] for found in of_models), default=0)
    return np.mean([found.mean(axis=1) for found in of_models], axis=0), blocks


def _groups(
    cells: Sequence[StudyCell],
    places: Sequence[int],
    scored: Sequence[np.ndarray],
    confidence: float,
    seed: int,
) -> dict[str, dict[str, tuple[tuple, int]]]:
    """Way to group → group → (the means over cells with their intervals, samples of a cell in the mean)."""
    found: dict[tuple[str, str], list[tuple]] = {}
    for cell, place, chosen in zip(cells, places, scored, strict=True):
        for way, label, rows in cell.values.grouped(chosen):
            sets = cell.values.drawn(place, rows, resamples=RESAMPLES // 2, seed=seed)
            entry = (cell.values.mean(place, rows), sets, int(rows.sum()))
            found.setdefault((way, label), []).append(entry)
    tables: dict[str, dict[str, tuple[tuple, int]]] = {}
    for (way, label), entries in sorted(found.items()):
        means, drawn, counts = zip(*entries, strict=True)
        # A group that only some of the cells have (wrong answers) is that of these.
        count = round(sum(counts) / len(counts))
        tables.setdefault(way, {})[label] = (_interval(means, drawn, confidence), count)
    return tables


def _interval(
    means: Sequence[np.ndarray], drawn: Sequence[np.ndarray], confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high end over cells, by method: resamples draw the same samples for every cell."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.mean(drawn, axis=0), [tail, 1 - tail], axis=0)
    return np.mean(means, axis=0), low, high


def _entry(interval: tuple[np.ndarray, np.ndarray, np.ndarray], method: int) -> dict[str, float]:
    return {key: float(ends[method]) for key, ends in zip(("mean", "low", "high"), interval, strict=True)}


def _mean_over_scores(ranks_of: Mapping[str, float]) -> float | None:
    """Every score counts alike, however many quantities it has."""
    by_score: dict[str, list[float]] = {}
    for name, rank in ranks_of.items():
        by_score.setdefault(name.partition("/")[0], []).append(rank)
    return _mean([float(np.mean(found)) for found in by_score.values()])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def agreement(tables: Mapping[str, dict]) -> dict[str, list[list[float | None]]]:
    """Section → Kendall's τ between the orders that two cells give the methods, the mean over quantities."""
    found = {}
    for section, table in tables.items():
        matrices = [one["tau"] for one in table["quantities"].values()]
        size = range(len(table["cells"]))
        found[section] = [
            [_mean([tau[a][b] for tau in matrices if tau[a][b] is not None]) for b in size] for a in size
        ]
    return found
