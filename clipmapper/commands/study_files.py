"""What a study leaves: its numbers as JSON, every value beside them, pictures and the leaderboard."""

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.table import Table

from clipmapper.commands.explain import chosen_device
from clipmapper.commands.study_cells import KeptCell
from clipmapper.commands.study_page import study_page
from clipmapper.evaluation.ranking import cliques
from clipmapper.evaluation.study.claims import claim_rows
from clipmapper.evaluation.study.tables import agreement, section_tables
from clipmapper.evaluation.study.trust import trust_rows
from clipmapper.evaluation.study.values import StudyValues
from clipmapper.evaluation.study.winners import winner_rows
from clipmapper.host.machine import commit, machine
from clipmapper.host.outputs import whole_file, write_whole
from clipmapper.settings.study import StudyConfig
from clipmapper.shipped import shipped_root
from clipmapper.training.shown import console
from clipmapper.visual.critical_difference import plot_critical_difference
from clipmapper.visual.layout import readable_part, save_figure
from clipmapper.visual.number_map import plot_numbers

RESULTS, VALUES, PAGE = "study.json", "study_values.npz", "leaderboard"
_PICTURES = "pictures"
_SHOWN = 10  # methods on the screen


def write_study(config: StudyConfig, cells: Sequence[KeptCell], seconds: float) -> dict[str, Path]:
    """Gather finished cells; print the best of each section. What was written, by name."""
    folder = Path(config.output)
    studied = [cell.of_study() for cell in cells]
    tables = section_tables(studied, confidence=config.confidence, seed=config.seed)
    judged = {cell.about["name"]: cell.about["judged"] for cell in cells if cell.about["judged"]}
    results = {
        "study": _told(config, cells, seconds),
        "cells": {cell.about["name"]: _without(cell.about, ("name", "settings", "judged")) for cell in cells},
        "sections": tables,
        "agreement": agreement(tables),
        "winners": winner_rows(studied, confidence=config.confidence, seed=config.seed),
        "claims": claim_rows(studied, confidence=config.confidence, seed=config.seed),
        "trusted": trust_rows(judged, tables),
        "judged": judged,
    }
    write_whole(folder / RESULTS, _compact(results))
    write_values(folder / VALUES, {cell.about["name"]: cell.values for cell in cells})
    pictures = _pictures(folder / _PICTURES, tables, results["agreement"])
    page = study_page(results, {name: f"{_PICTURES}/{path.name}" for name, path in pictures.items()})
    write_whole(folder / f"{PAGE}.md", page.markdown())
    write_whole(folder / f"{PAGE}.html", page.html())
    for table in _leaders(tables):
        console().print(table)
    return {
        "numbers": folder / RESULTS,
        "every value": folder / VALUES,
        "leaderboard": folder / f"{PAGE}.html",
        "leaderboard as Markdown": folder / f"{PAGE}.md",
        "pictures": folder / _PICTURES,
    }


def write_values(path: Path, values: Mapping[str, StudyValues]) -> None:
    """All cells in one file; complete or not at all. Names of arrays begin with the cell's."""
    with whole_file(path) as file:
        arrays = {f"{cell}:{name}": a for cell, its in values.items() for name, a in its.to_arrays().items()}
        np.savez_compressed(file, **arrays)


def read_values(path: Path) -> dict[str, StudyValues]:
    """The inverse of :func:`write_values`; no pickled objects are read."""
    cells: dict[str, dict[str, np.ndarray]] = {}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        for full in stored.files:
            cell, _, name = full.rpartition(":")
            cells.setdefault(cell, {})[name] = stored[full]
    return {cell: StudyValues.from_arrays(arrays) for cell, arrays in cells.items()}


def _told(config: StudyConfig, cells: Sequence[KeptCell], seconds: float) -> dict:
    """What the numbers belong to. ``seconds_of_cells``: over all calls, without their waiting."""
    program, *given = sys.argv
    spent = sum(sum(cell.about["seconds"].values()) for cell in cells)
    return {
        "command": shlex.join([Path(program).name if Path(program).is_absolute() else program, *given]),
        "version": version("clipmapper"),
        "commit": commit(shipped_root()),
        "machine": machine(chosen_device(config.device)),
        "seconds_of_this_call": round(seconds, 1),
        "seconds_of_cells": round(spent, 1),
        "settings": asdict(config),
    }


def _without(about: Mapping, keys: Sequence[str]) -> dict:
    return {key: value for key, value in about.items() if key not in keys}


def _compact(results: Mapping) -> str:
    """JSON with every list of numbers on one line, so that a person can look through it."""
    text = json.dumps(results, indent=1, allow_nan=False)
    return re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _pictures(folder: Path, tables: Mapping[str, dict], alike: Mapping[str, list]) -> dict[str, Path]:
    """Of each section the ranks, a diagram for each score, and how alike models are; by their names."""
    found = {}
    for section, table in tables.items():
        slug, quantities = readable_part(section, 60, "_"), table["quantities"]
        if not quantities or len(table["methods"]) < 2:
            continue
        marked = [m for m, entry in table["methods"].items() if entry["unchanged_in"]]
        order = sorted(table["methods"], key=lambda m: table["methods"][m]["mean_rank"])
        ranks = [[one["methods"][m]["rank"] for one in quantities.values()] for m in order]
        overall = [[table["methods"][m]["mean_rank"]] for m in order]
        figure = plot_numbers(
            np.array([[*first, *rest] for first, rest in zip(overall, ranks, strict=True)]),
            [f"{m} †" if m in marked else m for m in order],
            ["all", *quantities],
            limits=(1.0, float(len(order))),
            dark_is_low=True,
            digits=1,
            title=f"{section}: mean ranks over {', '.join(table['cells'])}",
            note="1 is the best; all: every score counts alike."
            + (" † does not depend on what a model has learnt." if marked else ""),
        )
        found[f"{section}: ranks"] = save_figure(figure, folder / f"{slug}_ranks.png")
        for name in _first_of_scores(quantities):
            its = quantities[name]
            mean_ranks = {m: entry["sample_rank"] for m, entry in its["methods"].items()}
            difference = its["critical_difference"]
            figure = plot_critical_difference(
                mean_ranks,
                difference,
                cliques(list(mean_ranks.values()), difference),
                title=f"{section}: {name}",
                note=(
                    f"Mean rank over {its['blocks']} samples; what a bar joins differs by less than the "
                    "critical difference of Nemenyi's test at 0.05 (Demšar 2006)."
                ),
                marked=marked,
            )
            path = folder / f"{slug}_{readable_part(name, 60, '_')}.png"
            found[f"{section}: {name}"] = save_figure(figure, path)
        if len(table["cells"]) > 1:
            values = np.array([[np.nan if v is None else v for v in row] for row in alike[section]], float)
            figure = plot_numbers(
                values,
                table["cells"],
                table["cells"],
                limits=(0.0, 1.0),
                dark_is_low=False,
                digits=2,
                title=f"{section}: how alike the models' orders are",
                note="Kendall's τ-b between the orders of the methods, the mean over the ranked quantities.",
            )
            found[f"{section}: agreement"] = save_figure(figure, folder / f"{slug}_agreement.png")
    return found


def _first_of_scores(quantities: Mapping[str, dict]) -> list[str]:
    """The quantity of each score that says most: the one with the shortest name, of both modalities."""
    by_score: dict[str, list[str]] = {}
    for name in quantities:
        by_score.setdefault(name.partition("/")[0], []).append(name)
    return [min(names, key=lambda name: name.count("/")) for names in by_score.values()]


def _leaders(tables: Mapping[str, dict]) -> list[Table]:
    found = []
    for section, table in tables.items():
        if not table["quantities"]:
            continue
        shown = Table(title=f"{section}: mean ranks over models and scores", title_justify="left")
        for column in ("method", "mean rank", "wins", "losses", "ms a sample"):
            shown.add_column(column, justify="left" if column == "method" else "right")
        order = sorted(table["methods"].items(), key=lambda item: item[1]["mean_rank"])
        for method, its in order[:_SHOWN]:
            name = f"{method} †" if its["unchanged_in"] else method
            cost = its["seconds_a_sample"]
            cells = [f"{its['mean_rank']:.1f}", str(its["wins"]), str(its["losses"])]
            shown.add_row(name, *cells, "" if cost is None else f"{1000 * cost:.0f}")
        found.append(shown)
    return found
