"""Results of captioning: shares of true captions and statements, scores by family, and samples."""

from collections.abc import Sequence

from clipmapper.data.records import Record
from clipmapper.data.world.caption_truth import KINDS
from clipmapper.data.world.captions import WORDINGS
from clipmapper.evaluation.captions.scores import score_captions
from clipmapper.tasks.captioning.training import SCORES, JudgedCaption


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
        scores = score_captions([one.caption for one in some], references, SCORES).corpus
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
