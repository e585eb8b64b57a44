"""The tables that a run on captions ends with."""

from collections.abc import Mapping

from rich.table import Table

from clipmapper.evaluation.perturbation_scores import DIRECTIONS, LOG_PROBABILITY, SCORES, WORD_PROBABILITY
from clipmapper.tasks.captioning.training import SCORES as WRITTEN
from clipmapper.training.tables import Areas, areas_table, interval_name

_WAYS = {"greedy": "greedy captions", "drawn": "drawn captions (nucleus, 0.9)"}


def score_table(splits: Mapping[str, Mapping]) -> Table:
    """Scores of greedy captions, a row a split; ``splits`` as in results.json."""
    table = Table(title="Greedy captions", title_justify="left")
    table.add_column("split")
    known = [key for key in ("correct", "complete") if any(key in row["greedy"] for row in splits.values())]
    shares_named = [f"{key} %" for key in known]
    for column in (
        "captions",
        *shares_named,
        *(SCORES[score].title.removesuffix(" (%)") for score in WRITTEN),
        "loss",
    ):
        table.add_column(column, justify="right")
    for split, row in splits.items():
        found = (row["greedy"].get(key) for key in known)
        shares = ["" if share is None else f"{100 * share:.1f}" for share in found]
        name = {"held_out": "held-out combinations"}.get(split, split)
        counted = str(row["greedy"]["captions"])
        table.add_row(name, counted, *shares, *_score_cells(row), f"{row['loss']:.3f}")
    return table


def family_table(row: Mapping) -> Table:
    """Scores of greedy captions, a row a family; ``row``: of a split, as in results.json."""
    table = Table(title="Greedy captions by family, validation", title_justify="left")
    table.add_column("family")
    for column in ("captions", *(SCORES[score].title.removesuffix(" (%)") for score in WRITTEN)):
        table.add_column(column, justify="right")
    for family, found in row["families"].items():
        table.add_row(family, str(found["captions"]), *_score_cells(found))
    table.add_row("overall", str(row["greedy"]["captions"]), *_score_cells(row), style="bold")
    return table


def truth_table(row: Mapping) -> Table:
    """Shares of the captions of a split that hold, by kind of statement and by wording."""
    table = Table(title="True statements and true captions, validation", title_justify="left")
    table.add_column("of")
    for way in _WAYS.values():
        table.add_column(way, justify="right")
        table.add_column("true %", justify="right")
    for group, key in (("statements", "said"), ("wordings", "captions")):
        for name in row["greedy"][group]:
            cells = []
            for way in _WAYS:
                entry = row[way][group][name]
                share = entry.get("hold", entry.get("correct"))
                cells += [str(entry[key]), "" if share is None else f"{100 * share:.1f}"]
            label = f"statements: {name}" if group == "statements" else f"captions: {name}"
            table.add_row(label, *cells)
    return table


def _score_cells(scores: Mapping) -> list[str]:
    return [f"{scores[score] * (1 if score == 'cider' else 100):.2f}" for score in WRITTEN]


def caption_perturbation_tables(results: Mapping) -> list[Table]:
    """The same of captions: probabilities in one table, the scores of what is written in others."""
    found = results["perturbation"]
    written = [score for score in found["caption"]["positive"] if score != LOG_PROBABILITY]
    chosen = [("caption", LOG_PROBABILITY)] if LOG_PROBABILITY in found["caption"]["positive"] else []
    groups = [[*chosen, ("word", WORD_PROBABILITY)]]
    groups += [[("caption", score) for score in written[i : i + 2]] for i in range(0, len(written), 2)]
    tables = []
    for group in groups:
        columns = [
            Areas(f"{test} {d}", d, found[test][d][score], SCORES[score].factor)
            for test, score in group
            for d in DIRECTIONS
        ]
        names = ", ".join(f"{SCORES[score].title} of the {test}" for test, score in group)
        tables.append(areas_table(f"Perturbation: area under {names}, {interval_name(results)}", columns))
    return tables


def word_localisation_table(results: Mapping) -> Table | None:
    """Share of the relevance of a word's patches that lies on what the word speaks of."""
    found = results["localisation"]
    if not found:
        return None
    title = f"Words against what they speak of: mass on it (%), median in brackets, {interval_name(results)}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("method")
    for kind in found:
        table.add_column(kind, justify="right")
    for method in next(iter(found.values()))["methods"]:
        cells = []
        for kind in found.values():
            value = kind["methods"][method]["mass"]
            half = (value["high"] - value["low"]) / 2
            cells.append(f"{100 * value['mean']:.1f} ± {100 * half:.1f} ({100 * value['median']:.1f})")
        table.add_row(method, *cells)
    baseline = (f"{100 * kind['area_baseline']:.1f}" for kind in found.values())
    table.add_section()
    table.add_row("uniform map", *baseline)
    return table
