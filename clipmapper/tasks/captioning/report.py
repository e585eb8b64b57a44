"""Score explanation methods on captions: relevance, perturbation and localisation in one go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.table import Table

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.chosen import (
    REMOVAL,
    Scored,
    as_scored,
    score_kind,
    score_samples,
)
from clipmapper.evaluation.explanation_scores.judged import judge
from clipmapper.evaluation.explanation_scores.values import ScoreValues
from clipmapper.evaluation.explanation_scores.with_planted import WithPlanted
from clipmapper.evaluation.localisation import Localisation
from clipmapper.evaluation.perturbation import ModalityRelevance, run_in_chunks
from clipmapper.evaluation.perturbation_scores import PerturbationScores, perturbation_numbers
from clipmapper.tasks.captioning.caption_maps import check_word_maps
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.explain import CaptionExplanation
from clipmapper.tasks.captioning.localised import localised_captions, localised_words, located_rows
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.perturbation import CAPTION_SCORES
from clipmapper.tasks.captioning.pictures import (
    caption_perturbation_tables,
    comparison_figure,
    word_localisation_table,
)
from clipmapper.tasks.captioning.planted import SpokenOf, require_scenes, spoken_of
from clipmapper.tasks.captioning.samples import TESTS, CaptionSamples
from clipmapper.tasks.captioning.subject import CaptionSubject, Said
from clipmapper.tasks.captioning.trace import word_relevance
from clipmapper.tasks.captioning.written import written_captions
from clipmapper.training.explained import Report, joined, joined_localisation, joined_scored
from clipmapper.training.shown import Cell, Html, Picture, score_tables
from clipmapper.visual.caption_strip import plot_caption_strip
from clipmapper.visual.heatmap import words_html


@dataclass(frozen=True)
class CaptionReport(Report):
    """Everything that is known about the methods on some captions.

    ``explanations``: of each method, of the model's own caption of every image. ``chosen``: in each caption,
    the word that is perturbed alone (its place). ``tested``: score → "caption" | "word" → what it says of
    the caption's maps, or of that word's. ``localisation``: method → kind of word → one entry for every true
    caption that has such words, the mean over them. ``spoken_of``: what captions
    and chosen words speak of, where planted maps were asked for.
    """

    samples: CaptionSamples
    explanations: Mapping[str, Sequence[CaptionExplanation]]
    chosen: Sequence[int]
    tested: Mapping[str, Mapping[str, Scored]]
    localisation: Mapping[str, Mapping[str, Localisation]]
    spoken_of: SpokenOf | None = None

    curves = "perturbation_log_probability.png"

    columns = ("image", "word by word", "caption", "references")

    @property
    def scored(self) -> dict[str, Scored]:
        """Both tests beside each other; their curves are in ``tests``."""
        return {
            score: Scored(ScoreValues.beside({test: found.values for test, found in by_test.items()}))
            for score, by_test in self.tested.items()
        }

    @property
    def tests(self) -> dict[str, dict[str, PerturbationScores]]:
        how = {"caption": "by the caption's map", "word": "one word a caption, by its map"}
        return {
            score: {
                f"{len(self.samples)} captions ({how[test]})": found.curves for test, found in by_test.items()
            }
            for score, by_test in self.tested.items()
            if by_test["caption"].curves is not None
        }

    @property
    def caption_scores(self) -> PerturbationScores:
        """The curves of captions where patches are removed, if that is one of the scores."""
        return self.tested[REMOVAL]["caption"].curves

    @property
    def word_scores(self) -> PerturbationScores:
        """Likewise of words."""
        return self.tested[REMOVAL]["word"].curves

    @property
    def sampled_score(self) -> str:
        return next(iter(next(iter(self.tests.values())).values())).scores[0]

    def perturbation_numbers(self, confidence: float, seed: int) -> dict:
        return {
            test: perturbation_numbers(found.curves, confidence, seed)["image"]
            for test, found in self.tested.get(REMOVAL, {}).items()
        }

    def judged(self, confidence: float, seed: int) -> dict[str, dict]:
        """What the scores are worth, by test; of single words, those that speak of something that is there,
        and no entry where there are none. ``aligned``: of how many samples it is known by the words."""
        if self.spoken_of is None:
            raise UserError("planted: the report was made without planted maps")
        found = {}
        for test in TESTS:
            rows = self.spoken_of.judged(test)
            if not rows.any():
                continue
            maps = {method: self._maps(test, its) for method, its in self.explanations.items()}
            values = {
                score: by_test[test].values.part(samples=rows) for score, by_test in self.tested.items()
            }
            truth = self.spoken_of.truth(test, maps)
            found[test] = {
                "samples": int(rows.sum()),
                "aligned": int(self.spoken_of.aligned[test].sum()),
                "scores": judge(values, truth, confidence=confidence, seed=seed),
            }
        return found

    def _maps(
        self, test: str, its: Sequence[CaptionExplanation]
    ) -> Float[np.ndarray, "samples rows columns"]:
        if test == "caption":
            return np.stack([one.patches for one in its])
        return np.stack([one.maps[word] for one, word in zip(its, self.chosen, strict=True)])

    def groups(self) -> dict[str, list[str]]:
        """By whether what the caption says is right, where the data can judge any caption."""
        judges = [getattr(truth, "judge", None) for truth in self.samples.spoken]
        if None in judges:
            return {}
        right = [judge(its.caption).correct for judge, its in zip(judges, self._first, strict=True)]
        return {"caption": ["right" if one else "wrong" for one in right]}

    def located(self) -> dict[str, list[int]]:
        return located_rows(self.samples)

    def values_by_test(self) -> dict[str, dict[str, ScoreValues]]:
        """Of captions, and of words: kinds of words are localised, and captions as a whole."""
        found: dict[str, dict[str, ScoreValues]] = {}
        for test in TESTS:
            mine = {
                method: {
                    name: its for name, its in by_name.items() if (name == "caption") == (test == "caption")
                }
                for method, by_name in self.localisation.items()
            }
            scored = {score: by_test[test].values for score, by_test in self.tested.items()}
            found[test] = scored | self.located_values(mine)
        return found

    def scalars(self) -> dict[str, float]:
        scalars = {}
        for test, found in self.tested.get(REMOVAL, {}).items():
            for row in found.curves.summary():
                scalars[f"perturbation/{test}/{row.direction}/{row.method}/{row.score}"] = row.area.mean
        return scalars | self.score_scalars() | self.localisation_scalars()

    @staticmethod
    def tables(numbers: Mapping) -> list[Table]:
        tables = [*caption_perturbation_tables(numbers), *score_tables(numbers)]
        return [*tables, *filter(None, [word_localisation_table(numbers)])]

    def explanation(self, number: int) -> tuple[str, Figure]:
        truth = self.samples.references[number][0]
        return "caption", plot_caption_strip(self._first[number], truth=truth)

    def comparison(self, number: int) -> Figure:
        return comparison_figure(self, number)

    def cells(self, number: int, picture: Path) -> Sequence[Cell]:
        its = self._first[number]
        return (
            Picture(its.image),
            Picture(picture),
            Html(words_html(list(zip(its.words, its.weights.tolist(), strict=True)))),
            "\n".join(self.samples.references[number]),
        )

    @property
    def _first(self) -> Sequence[CaptionExplanation]:
        return next(iter(self.explanations.values()))

    @classmethod
    def together(cls, samples: CaptionSamples, reports: Sequence["CaptionReport"]) -> "CaptionReport":
        return cls(
            samples=samples,
            explanations={
                method: joined([report.explanations[method] for report in reports])
                for method in reports[0].explanations
            },
            chosen=joined([report.chosen for report in reports]),
            tested={
                score: {test: joined_scored([r.tested[score][test] for r in reports]) for test in by_test}
                for score, by_test in reports[0].tested.items()
            },
            localisation=joined_localisation(reports),
            spoken_of=SpokenOf.together([r.spoken_of for r in reports]) if reports[0].spoken_of else None,
        )


def caption_report(
    model: Captioner,
    samples: CaptionSamples,
    methods: Sequence[str],
    *,
    chunk: int,
    batch_size: int,
    seed: int,
    scores: Sequence[str] = (REMOVAL,),
    planted: bool = False,
    explained: str = "logit",
    word_maps: str = "scaled",
    word_weights: str = "mean",
    caption_scores: Sequence[str] = CAPTION_SCORES,
    decoding: Decoding | None = None,
    folder: Path | None = None,
    key: str = "",
    progress: Callable[[int], None] | None = None,
) -> CaptionReport:
    """Caption every image, explain every word by every method, remove patches in that order; and hold the
    maps of true captions' words against what they speak of.

    ``decoding``: how captions are written, whole and perturbed (default: greedy). ``explained``,
    ``word_maps`` and ``word_weights`` as of
    :func:`~clipmapper.tasks.captioning.explain.explain_captions`. Arguments otherwise as of
    :meth:`clipmapper.training.task.Task.report`.
    """
    check_word_maps(word_maps)
    if planted:
        require_scenes(samples)
    decoding = decoding or Decoding("greedy")
    relevance = partial(word_relevance, methods=methods, explained=explained, seed=seed)
    with model.evaluating():
        explanations, said = written_captions(
            model,
            samples,
            methods,
            relevance,
            decoding=decoding,
            word_weights=word_weights,
            word_maps=word_maps,
            seed=seed,
            progress=progress,
        )
        told = _spoken_of(model, samples, explanations, said) if planted else None

        def compute(positions: range, score: str, test: str) -> PerturbationScores | ScoreValues:
            subject = CaptionSubject(
                model,
                samples,
                positions,
                said[positions.start : positions.stop],
                test,
                relevance=relevance,
                word_maps=word_maps,
                caption_scores=caption_scores,
                decoding=decoding,
            )
            maps = {}
            for method, its in explanations.items():
                shown = [its[i].maps[said[i].word] if test == "word" else its[i].patches for i in positions]
                image = torch.from_numpy(np.stack(shown)).flatten(1)
                maps[method] = ModalityRelevance(image, torch.zeros(subject.text_valid.shape))
            if told is not None:
                deciding = told.deciding(test, positions, model.encoder.grid)
                subject = WithPlanted(subject, deciding, seed)
                maps |= subject.planted()
            return score_samples(score, subject, maps, batch_size=batch_size, seed=seed, progress=progress)

        scored = {
            score: {
                test: as_scored(
                    run_in_chunks(
                        len(samples),
                        chunk,
                        partial(compute, score=score, test=test),
                        folder=None if folder is None else folder / score / test,
                        key=f"{key}, planted" if planted else key,
                        kind=score_kind(score),
                    )
                )
                for test in TESTS
            }
            for score in scores
        }
        localisation = localised_words(model, samples, methods, relevance)
        for method, own in localised_captions(samples, explanations).items():
            localisation[method] |= own
    chosen = [one.word for one in said]
    return CaptionReport(samples, explanations, chosen, scored, localisation, told)


def _spoken_of(
    model: Captioner,
    samples: CaptionSamples,
    explanations: Mapping[str, Sequence[CaptionExplanation]],
    said: Sequence[Said],
) -> SpokenOf:
    written = next(iter(explanations.values()))
    captions, words = [its.caption for its in written], [its.words for its in written]
    return spoken_of(model, samples, captions, words, [one.word for one in said])
