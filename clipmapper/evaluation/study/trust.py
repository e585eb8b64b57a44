"""Which scores of explanations can be trusted, over the models of a study: what the built-in truth says."""

from collections.abc import Mapping, Sequence

import numpy as np

from clipmapper.evaluation.explanation_scores.judged import LEVEL, RIGHT, WRONG
from clipmapper.evaluation.explanation_scores.values import HIGH

_TRUTH, _BY = "truth", "rank"  # the planted map; and the measure of truth: relevance rank accuracy


def trust_rows(judged: Mapping[str, Mapping], sections: Mapping[str, Mapping]) -> list[dict]:
    """For each section and quantity that ranks methods, over the models whose scores were judged.

    ``judged``: cell → section → score → ``samples`` and ``quantities``
    (:func:`~clipmapper.evaluation.explanation_scores.judged.judge`). ``sections``: of
    :func:`~clipmapper.evaluation.study.tables.section_tables`.

    ``tau_of_methods``, ``tau_within_samples``: mean, lowest and highest over models of Kendall's τ-b with the
    truth (relevance rank accuracy). ``pairs``: verdict → pair of planted maps → in how many models.
    ``truth``: the mean of the planted truth, ``best``: of the method that is best there, and ``above_truth``:
    how many methods score better than the truth, all in the mean over models.
    """
    rows = []
    for section, table in sections.items():
        for full, quantity in table["quantities"].items():
            score, _, name = full.partition("/")
            found = {
                cell: its[section][score]
                for cell, its in judged.items()
                if name in its.get(section, {}).get(score, {}).get("quantities", {})
            }
            if found:
                entries = {cell: its["quantities"][name] for cell, its in found.items()}
                samples = round(np.mean([its["samples"] for its in found.values()]))
                rows.append(
                    {"section": section, "quantity": full, "samples": samples, "models": len(found)}
                    | _row(entries, table["cells"], quantity)
                )
    return rows


def _row(entries: Mapping[str, Mapping], cells: Sequence[str], quantity: Mapping) -> dict:
    pairs: dict[str, dict[str, int]] = {RIGHT: {}, LEVEL: {}, WRONG: {}}
    truths, bests, above = [], [], []
    for cell, entry in entries.items():
        for pair, difference in entry.get("planted", {}).items():
            of_verdict = pairs[difference["verdict"]]
            of_verdict[pair] = of_verdict.get(pair, 0) + 1
        if "maps" in entry:
            sign = 1 if quantity["better"] == HIGH else -1
            place = cells.index(cell)
            own = [sign * its["of_cells"][place] for its in quantity["methods"].values()]
            truth = sign * entry["maps"][_TRUTH]
            truths.append(sign * truth)
            bests.append(sign * max(own))
            above.append(sum(value > truth for value in own))
    return {
        "tau_of_methods": _spread([entry["methods"][_BY]["mean"] for entry in entries.values()]),
        "tau_within_samples": _spread([entry["samples"][_BY]["mean"] for entry in entries.values()]),
        "pairs": pairs,
        "truth": float(np.mean(truths)) if truths else None,
        "best": float(np.mean(bests)) if truths else None,
        "above_truth": float(np.mean(above)) if truths else None,
        "factor": quantity["factor"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
