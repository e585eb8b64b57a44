"""The leaderboard of a study as a page."""

from collections.abc import Iterator, Mapping, Sequence

from clipmapper.evaluation.explanation_scores.judged import LEVEL, RIGHT, WRONG
from clipmapper.evaluation.study.claims import AGAINST, CLAIMED
from clipmapper.host.progress import span
from clipmapper.visual.page import Page

_DAGGER = "†"
_NAMED = 5  # methods in a cell of a table


def study_page(results: Mapping, pictures: Mapping[str, str]) -> Page:
    """``results``: of ``study.json``. ``pictures``: name → path from the page."""
    page = Page("Which explanation method is the best?")
    _told(page, results)
    for section, table in results["sections"].items():
        if not table["quantities"]:
            continue
        page.heading(section)
        _overall(page, table)
        for name, path in pictures.items():
            if name in (f"{section}: ranks", f"{section}: agreement"):
                page.picture(path, name)
        for name, its in table["quantities"].items():
            page.heading(name, 3)
            _quantity(page, name, its, table)
            if f"{section}: {name}" in pictures:
                page.picture(pictures[f"{section}: {name}"], f"critical differences of {name}")
    _winners(page, results["winners"])
    _claims(page, results["claims"])
    _trusted(page, results["trusted"])
    _costs(page, results["cells"])
    return page


def _told(page: Page, results: Mapping) -> None:
    told = results["study"]
    its, settings = told["machine"], told["settings"]
    commit = f"commit {told['commit']}" if told["commit"] else f"version {told['version']}"
    page.text(
        f"Made by {told['command']}, {commit}, on {its['name']} ({its['cores']} cores, {its['device']}), "
        f"{its['when'][:10]}. All models together took {span(told['seconds_of_cells'])}, this call "
        f"{span(told['seconds_of_this_call'])}."
    )
    fewer = "".join(f", {score} of {count}" for score, count in settings["fewer"].items())
    for model, counts in settings["of_model"].items():
        fewer += f"; of {model} " + ", ".join(f"{score} of {count}" for score, count in counts.items())
    page.text(
        f"{len(settings['methods'])} methods, {len(results['cells'])} models "
        f"({', '.join(results['cells'])}), {settings['samples']} samples of split {settings['split']} each"
        f"{fewer}. Intervals are of {100 * settings['confidence']:g} %, by the bootstrap over samples. "
        "A win or a loss is a paired difference whose interval is clear of 0. Ranks are 1 for the best, ties "
        "share. docs/study.md says "
        "how to read this page."
    )


def _overall(page: Page, table: Mapping) -> None:
    count = len(table["cells"])
    page.text(
        f"Over {count} model{'s' * (count > 1)} and {len(table['quantities'])} quantities. The mean "
        "rank is over models and scores, each score the mean of its quantities; wins and losses are over all "
        "quantities; ms: processor time of an explanation of a sample by this method alone."
    )
    rows = []
    order = sorted(table["methods"].items(), key=lambda item: item[1]["mean_rank"])
    for place, (method, its) in enumerate(order, start=1):
        cost = its["seconds_a_sample"]
        rows.append([
            _name(method, table), str(place), f"{its['mean_rank']:.2f}", str(its["wins"]), str(its["losses"]),
            str(its["level"]), "" if cost is None else f"{1000 * cost:.0f}",
        ])  # fmt: skip
    page.table(["method", "place", "mean rank", "wins", "losses", "level", "ms"], rows)
    marked = [m for m, its in table["methods"].items() if its["unchanged_in"]]
    if marked:
        page.text(
            f"{_DAGGER} the maps of {', '.join(marked)} hardly change when all that a model has learnt is "
            "destroyed (sanity): they do not depend on it, whatever else is said of them here."
        )


def _quantity(page: Page, name: str, its: Mapping, table: Mapping) -> None:
    several = len(table["cells"]) > 1
    groups = {
        (way, label): count
        for entry in its["methods"].values()
        for way, labels in entry["groups"].items()
        for label, count in ((label, found["samples"]) for label, found in labels.items())
    }
    note = f"{its['samples']} samples, better is {its['better']}."
    if its["critical_difference"] is not None:
        note += (
            f" Ranks over samples differ from {its['critical_difference']:.2f} on (Nemenyi, 0.05, "
            f"{its['blocks']} samples)"
        )
        note += (
            f"; with the {len(table['cells'])} models as blocks it would be from "
            f"{its['critical_difference_of_cells']:.1f} on."
            if several
            else "."
        )
    page.text(note)
    columns = ["method", "% " * (its["factor"] == 100) + "[interval]"]
    columns += ["± over models"] if several else []
    columns += ["rank", "rank over samples", "wins", "losses"]
    columns += [f"{way}: {label} ({count})" for (way, label), count in groups.items()]
    rows = []
    for method, entry in sorted(its["methods"].items(), key=lambda item: item[1]["rank"]):
        shown = [_number(entry[key], its["factor"]) for key in ("mean", "low", "high")]
        row = [_name(method, table), f"{shown[0]} [{shown[1]}, {shown[2]}]"]
        row += [_number(entry["deviation"], its["factor"])] if several else []
        row += [
            f"{entry['rank']:.1f}",
            f"{entry['sample_rank']:.2f}",
            str(entry["wins"]),
            str(entry["losses"]),
        ]
        for way, label in groups:
            found = entry["groups"].get(way, {}).get(label)
            row.append("" if found is None else _number(found["mean"], its["factor"]))
        rows.append(row)
    page.table(columns, rows)


def _winners(page: Page, rows: Sequence[Mapping]) -> None:
    if not rows:
        return
    page.heading("Who wins on each model?")
    page.text(
        "The best method of each model and quantity, those that it is not clearly better than (the interval "
        "of the paired difference holds 0), and its difference to the paper's rule."
    )
    shown = []
    for row in rows:
        factor, over = row["factor"], row["over_weighted"]
        named, more = row["level"][:_NAMED], len(row["level"]) - _NAMED
        level = ", ".join(named) + (f" and {more} more" if more > 0 else "")
        difference = ""
        if over is not None:
            mean, low, high = (_number(over[key], factor) for key in ("mean", "low", "high"))
            difference = f"{mean} [{low}, {high}]"
        shown.append([
            row["quantity"], row["section"], row["cell"], row["best"], _number(row["value"], factor), level,
            difference,
        ])  # fmt: skip
    shown.sort(key=lambda row: row[:3])
    page.table(["quantity", "section", "model", "best", "value", "level with it", f"over {CLAIMED}"], shown)


def _claims(page: Page, claims: list[Mapping]) -> None:
    if not claims:
        return
    page.heading(f"Is {CLAIMED} better?")
    others = [other for other in AGAINST if any(other in row["against"] for row in claims)]
    page.text(
        f"The difference of {CLAIMED} to each other method, paired over samples, the mean over seeds, where "
        "tokens are removed. Most relevant first (positive), a low area is good; least relevant first "
        "(negative), a high one."
    )
    page.table(["section", "model", "area", *others], [
        [row["section"], row["model"], row["quantity"], *_verdicts(row, others)] for row in claims
    ])  # fmt: skip


def _verdicts(row: Mapping, others: list[str]) -> Iterator[str]:
    for other in others:
        its = row["against"].get(other)
        if its is None:
            yield ""
            continue
        mean, low, high = (_number(its[key], row["factor"]) for key in ("mean", "low", "high"))
        yield f"{its['verdict']}: {mean} [{low}, {high}]"


def _trusted(page: Page, rows: Sequence[Mapping]) -> None:
    if not rows:
        return
    page.heading("Which scores can be trusted?")
    page.text(
        "Kendall's τ between each quantity and the truth (relevance rank accuracy): between the means of all "
        "methods, and within each sample, the mean over models and the lowest and highest of them. Pairs of "
        "planted maps one of which is better: how many are put right, level or wrong, over models. Then what "
        "the truth itself scores, and the best method, and how many methods are put above the truth. A model "
        "may need more than what decides: what is judged is a score on these models."
    )
    shown = []
    for row in rows:
        right, level, wrong = (sum(row["pairs"][verdict].values()) for verdict in (RIGHT, LEVEL, WRONG))
        factor = row["factor"]
        truth, best = (_number(row[key], factor) + " %" * (factor == 100) for key in ("truth", "best"))
        shown.append([
            row["quantity"], row["section"], str(row["samples"]), _tau(row["tau_of_methods"]),
            _tau(row["tau_within_samples"]), str(right), str(level), str(wrong), truth, best,
            f"{row['above_truth']:.1f}",
        ])  # fmt: skip
    page.table(
        ["quantity", "section", "samples", "τ over methods", "τ within samples", "right", "level", "wrong",
         "truth", "best method", "methods above the truth"],
        shown,
    )  # fmt: skip
    page.text(
        "The pairs that are not put right everywhere, and in how many models they are wrong (or level):"
    )
    failing = []
    for row in rows:
        wrong, level = row["pairs"][WRONG], row["pairs"][LEVEL]
        named = [f"{pair}: {wrong.get(pair, 0)} ({level.get(pair, 0)})" for pair in {**wrong, **level}]
        failing.append([row["quantity"], row["section"], "; ".join(named)])
    page.table(["quantity", "section", "pairs"], failing)


def _costs(page: Page, cells: Mapping[str, Mapping]) -> None:
    page.heading("Time")
    rows = [
        [name, what, span(seconds)]
        for name, about in cells.items()
        for what, seconds in about["seconds"].items()
    ]
    page.table(["model", "what", "took"], rows)


def _name(method: str, table: Mapping) -> str:
    return f"{method} {_DAGGER}" if table["methods"][method]["unchanged_in"] else method


def _number(value: float | None, factor: int) -> str:
    if value is None:
        return ""
    digits = 1 if factor == 100 else 3
    return f"{round(factor * value, digits) + 0.0:.{digits}f}"  # + 0.0: of −0.0 it makes 0.0


def _tau(interval: Mapping[str, float]) -> str:
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**interval)
