"""A captioner on any images: scores of greedy captions with intervals, and what of them is true."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from clipmapper.data.answer_rule import write_captions_file
from clipmapper.evaluation.captions.ngram_scores import bleu, bleu_counts
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.evaluation.captions.scores import score_captions
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.results import truth_numbers
from clipmapper.tasks.captioning.training import SCORES, JudgedCaption
from clipmapper.training.evaluated import Evaluation
from clipmapper.training.measures import OVERALL, Measure, Measures

_TRUE = ("correct", "complete")


class CaptionEvaluation(Evaluation):
    """What is said of an image: its greedy caption, as in validation.

    Intervals are over images. CIDEr's document frequencies are those of the references that are scored
    against, and stay when images are drawn anew; BLEU is of the whole corpus each time.
    """

    file, noun = "captions", "images"
    titles: ClassVar = {
        "cider": ("CIDEr", 1),
        "bleu_4": ("BLEU-4 (%)", 100),
        "rouge_l": ("ROUGE-L (%)", 100),
        "correct": ("true captions (%)", 100),
        "complete": ("complete captions (%)", 100),
    }

    def batch(self, rows: Sequence[int]) -> dict:
        return self.pictures(rows)

    def said(self, batch: Mapping) -> list:
        images = self.image_tokens(batch)
        with self.second_stage():
            written = write_captions(self.model, images, Decoding("greedy", max_length=self.model.longest))
        return [texts[0] for texts in written.texts]

    def scored(self) -> np.ndarray:
        return np.flatnonzero(self.records.lengths("captions"))

    def write(self, said: Sequence, path: Path) -> Path:
        return write_captions_file(path, zip((record.id for record in self.records), said, strict=True))

    def measures(self, said: Sequence) -> Measures:
        rows, families = self.scored(), self.records.families[self.scored()]
        some = self.records.take(rows)
        found = {}
        if len(numbers := some.family_numbers()) > 1:
            # As in training: a family is scored as a data set of its own.
            found = {some.family_name(n): self._written(rows[families == n], said) for n in numbers}
        overall = self._written(rows, said)
        # Training logs the scores of all captions as float32.
        found[OVERALL] = {
            name: Measure(float(np.float32(one.value)), one.columns, one.score)
            for name, one in overall.items()
        }
        if self._judged(said):
            for name in _TRUE:
                held = np.array([[getattr(one.truth, name)] for one in self._judged(said)], np.float64)
                found[OVERALL][name] = Measure(float(held.mean()), held)
        return found

    def more(self, said: Sequence, confidence: float, seed: int) -> dict:
        judged = self._judged(said)
        return {"truth": truth_numbers(judged)} if judged else {}

    def _judged(self, said: Sequence) -> list[JudgedCaption]:
        """All captions; none where nobody knows whether they are true."""
        rows = self.scored().tolist()
        if not rows or not hasattr(self.records[rows[0]].truth, "judge"):
            return []
        return [JudgedCaption(row, said[row], self.records[row].truth.judge(said[row])) for row in rows]

    def _written(self, rows: np.ndarray, said: Sequence) -> dict[str, Measure]:
        captions = [said[row] for row in rows.tolist()]
        references = [self.records[row].captions for row in rows.tolist()]
        scores = score_captions(captions, references, SCORES)
        found = {
            name: Measure(scores.corpus[name], scores.samples[name][:, None]) for name in ("cider", "rouge_l")
        }
        counts = bleu_counts(
            [ptb_tokenise(caption) for caption in captions],
            [[ptb_tokenise(one) for one in of_image] for of_image in references],
        )
        found["bleu_4"] = Measure(scores.corpus["bleu_4"], counts.astype(np.float64), _bleu_4(len(rows)))
        return {name: found[name] for name in SCORES}


def _bleu_4(samples: int):
    """Of means of counts; its guards against dividing by 0 are made for sums."""
    return lambda means: bleu(means * samples)[..., 3]
