"""Writing captions: what :class:`clipmapper.training.task.Task` asks of a task."""

from collections.abc import Sequence

from clipmapper.data.records import RecordData
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.ngram_scores import DocumentFrequencies
from clipmapper.evaluation.captions.scores import check_scores
from clipmapper.evaluation.perturbation_scores import LOG_PROBABILITY
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.captioning.build import DescribedCaptioner
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.explain import CaptionExplanation, explain_captions
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.report import CaptionReport, caption_report
from clipmapper.tasks.captioning.run import CaptionRun
from clipmapper.tasks.captioning.samples import CaptionSamples, caption_samples
from clipmapper.training.task import Task


class Captioning(DescribedCaptioner, Task):
    """Image captioning."""

    name = "captioning"
    does = "writes captions"
    records = "captions"
    explain_settings = ("caption", "word", "word_weights")
    perturb_settings = ("word_weights", "caption_scores")

    def run(self, config: TrainConfig, data: RecordData) -> CaptionRun:
        return CaptionRun(config, data)

    def samples(
        self, model: Captioner, data: RecordData, split: str, count: int, seed: int
    ) -> CaptionSamples:
        return caption_samples(model, data, split, count, seed)

    def check_settings(self, **settings) -> None:
        """Raise ``UserError`` for a score that there is not, or that needs a Java that is not there."""
        scores = settings.get("caption_scores", ())
        try:
            check_scores([score for score in scores if score != LOG_PROBABILITY])
        except UserError as error:
            raise UserError(f"caption_scores: {error}") from error

    def report(self, model, samples, methods, *, caption_scores=None, **how) -> CaptionReport:
        if caption_scores is not None:
            how["scores"] = caption_scores
        return caption_report(model, samples, methods, **how)

    def explain(
        self,
        model: Captioner,
        image,
        caption: str | None = None,
        methods: Sequence[str] = ("weighted",),
        *,
        word: str | int | None = None,
        word_weights: str = "mean",
        scalar: str = "logit",
        decoding: Decoding | None = None,
        references: Sequence[str] | None = None,
        frequencies: DocumentFrequencies | None = None,
    ) -> list[CaptionExplanation]:
        """``caption`` to explain (default: the one that the model writes, as ``decoding`` says) and ``word``,
        one word of it alone, by name or by place (default: all). ``word_weights``: how the maps of words are
        averaged into one of the caption: "mean" (stop-words count 0), "cider" (by the CIDEr that is lost
        without the word; needs ``references`` and ``frequencies``) or "clip" (by the CLIPScore that is lost).
        ``scalar``: explain each word's "logit" or "log_probability".

        Raises ``UserError`` for an empty caption, words that the model cannot say, a ``word`` that the
        caption does not have or has several times.
        """
        if isinstance(word, str) and word.lstrip("-").isdigit():
            word = int(word)
        return explain_captions(
            model, image, methods, caption=caption, word=word, word_weights=word_weights, scalar=scalar,
            decoding=decoding, references=references, frequencies=frequencies,
        )  # fmt: skip


TASK = Captioning()
