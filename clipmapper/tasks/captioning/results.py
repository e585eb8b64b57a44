"""Results of a run on captions: shares of true captions and statements, scores by family, samples, tables."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from clipmapper.data.records import Record
from clipmapper.data.world.caption_truth import KINDS
from clipmapper.data.world.captions import WORDINGS
from clipmapper.evaluation.captions.scores import score_captions
from clipmapper.evaluation.perturbation_scores import SCORES
from clipmapper.tasks.captioning.training import SCORES as WRITTEN
from clipmapper.tasks.captioning.training import JudgedCaption

_WAYS = {"greedy": "greedy captions", "drawn": "drawn captions (nucleus, 0.9)"}


def truth_numbers(captions: Sequence[JudgedCaption]) -> dict:
    """Shares of captions and of their statements that hold; None where there is nothing to count."""
    truths = [one.truth for one in captions]
    said = [statement for truth in truths for statement in truth.statements]
    by_kind = {kind: [s.holds for s in said if s.kind == kind] for kind in KINDS}
    by_wording = {
        wording: [truth.correct for truth in truths if truth.wording == wording]
        for wording in (*WORDINGS, "mixed", None)
    }
    return {
        "captions": len(truths),
        "correct": _share([truth.correct for truth in truths]),
        "complete": _share([truth.complete for truth in truths]),
        "statements": {kind: {"said": len(found), "hold": _share(found)} for kind, found in by_kind.items()},
        "wordings": {
            wording or "not understood": {"captions": len(found), "correct": _share(found)}
            for wording, found in by_wording.items()
        },
    }


def family_scores(captions: Sequence[JudgedCaption], records: Sequence[Record]) -> dict[str, dict]:
    """Scores of the captions about each family of images, by its name; without any where there is one family.

    A family is scored as a data set of its own, so CIDEr-D has the document frequencies of its references
    alone: the usual way with nocaps' domains, whose overall score is not the mean of theirs.
    """
    of_family: dict[str, list[JudgedCaption]] = {}
    for one in captions:
        of_family.setdefault(records[one.image].family, []).append(one)
    if len(of_family) < 2:
        return {}
    found = {}
    for family, some in sorted(of_family.items()):
        references = [records[one.image].captions for one in some]
        scores = score_captions([one.caption for one in some], references, WRITTEN).corpus
        found[family] = {"captions": len(some), **scores}
    return found


def sample_rows(captions: Sequence[JudgedCaption], references: Sequence[Sequence[str]]) -> list[dict]:
    """Captions one by one, with what is wrong about them where that is known."""
    return [
        {"image": one.image, "caption": one.caption, "reference": references[one.image][0]}
        if one.truth is None
        else {
            "image": one.image,
            "caption": one.caption,
            "reference": references[one.image][0],
            "correct": one.truth.correct,
            "complete": one.truth.complete,
            "wrong": "not understood"
            if one.truth.wording is None
            else "; ".join(statement.text for statement in one.truth.statements if not statement.holds),
        }
        for one in captions
    ]


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


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
