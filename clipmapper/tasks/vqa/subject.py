"""Questions as the scores of explanations see them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipmapper.evaluation.explanation_scores.subject import OneScore
from clipmapper.evaluation.perturbation import ModalityRelevance
from clipmapper.evaluation.perturbation_scores import MODALITIES
from clipmapper.relevance import method_named, needs_of
from clipmapper.tasks.layers import parameter_groups
from clipmapper.tasks.replaced import replacing
from clipmapper.tasks.vqa.explain import trace_answers
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.tasks.vqa.perturbation import AnswerScorer
from clipmapper.tasks.vqa.samples import QuestionSamples


class AnswerSubject:
    """A :class:`~clipmapper.evaluation.explanation_scores.subject.Subject`: some of the samples, by their
    positions, and the answers that the model gives to them. What is explained stays these answers, whatever
    happens to images and weights."""

    modalities = MODALITIES
    certainty = "probability"

    def __init__(
        self,
        model: CLIPmapper,
        samples: QuestionSamples,
        positions: range,
        methods: Sequence[str],
        *,
        answers: Int[Tensor, "samples"],
        seed: int,
        explained: str = "logit",
    ) -> None:
        self._model, self._samples = model, samples
        self._rows = torch.tensor(list(positions))
        self._methods, self._seed, self._explained = methods, seed, explained
        self._answers = answers
        self.sample_ids = np.array([samples.ids[i] for i in positions])
        self.images, self._text = samples.images[self._rows], samples.text[self._rows]
        self.grid = model.encoder.grid
        self.removable_text, self.text_valid = self._text.removable, self._text.valid

    @property
    def layers(self) -> Sequence[tuple[str, Sequence[nn.Parameter]]]:
        return parameter_groups(self._model)

    def scorer(self, replacement: str | None = None) -> AnswerScorer:
        """The answers' scores: see :class:`~clipmapper.tasks.vqa.perturbation.AnswerScorer`."""
        if replacement is None:
            score_kept = self._model.kept_scorer(self.images, self._text)
        else:
            score_kept = self._replaced(replacement)
        return AnswerScorer(score_kept, self._samples.targets[self._rows])

    def certain(self) -> OneScore:
        return OneScore(self.scorer(), self.certainty)

    def _replaced(self, kind: str):
        """As :meth:`~clipmapper.tasks.vqa.model.CLIPmapper.kept_scorer`, with other patches and words in the
        place of those that are not kept."""
        model = self._model
        others = replacing(kind, model.encoder, self._samples, self._rows, self._text, self._samples.all_text)
        with torch.no_grad():
            image_tokens = model.encoder.image_tokens(others.images)
            text_tokens = model.encoder.text_tokens(others.text.ids, others.text.valid)

        @torch.no_grad()
        def score_kept(
            sample: Int[Tensor, "variants"],
            image_keep: Int[Tensor, "variants kept"] | None,
            text_keep: Int[Tensor, "variants kept_text"] | None,
        ) -> Float[Tensor, "variants answers"]:
            sample = sample.to(model.device)
            image, words = image_tokens[sample], text_tokens[sample]
            if image_keep is not None:
                image = others.image_tokens(sample, image_keep.to(model.device))
            if text_keep is not None:
                words = others.text_tokens(sample, text_keep.to(model.device))
            return model.answer_logits(image, words, others.text.valid[sample])

        return score_kept

    @torch.no_grad()
    def certainty_of(
        self, sample: Int[np.ndarray, "variants"], images: Float[Tensor, "variants 3 height width"]
    ) -> Float[np.ndarray, "variants"]:
        rows = torch.from_numpy(sample)
        model, text = self._model, self._text[rows].to(self._model.device)
        logits = model(images.to(model.device), text).float().cpu()
        chosen = self._answers[rows][:, None]
        return logits.double().softmax(dim=1).gather(1, chosen)[:, 0].numpy()

    def maps(
        self,
        images: Float[Tensor, "samples 3 height width"] | None = None,
        methods: Sequence[str] | None = None,
    ) -> dict[str, ModalityRelevance]:
        images = self.images if images is None else images
        return answer_maps(
            self._model,
            self._samples,
            self._rows,
            images,
            self._methods if methods is None else methods,
            seed=self._seed,
            explained=self._explained,
            answers=self._answers,
        )[0]


def answer_maps(
    model: CLIPmapper,
    samples: QuestionSamples,
    rows: Int[Tensor, "samples"],
    images: Float[Tensor, "samples 3 height width"],
    methods: Sequence[str],
    *,
    seed: int,
    explained: str,
    answers: Int[Tensor, "samples"] | None = None,
) -> tuple[dict[str, ModalityRelevance], Float[Tensor, "samples answers"]]:
    """The maps of every method, on the CPU, of these ``answers`` (None: those that the model gives), and the
    logits of all."""
    traced = trace_answers(
        model,
        images.to(model.device),
        samples.text[rows].to(model.device),
        None if answers is None else answers.tolist(),
        samples=[samples.ids[row] for row in rows.tolist()],
        needs=needs_of(map(method_named, methods)),
        explained=explained,
    )
    longest = samples.text.ids.shape[1]
    maps: Mapping[str, ModalityRelevance] = {}
    for name in methods:
        method = method_named(name)
        found = method(traced.trace, seed=seed) if name == "random" else method(traced.trace)
        # A text tower that reads its padding was given more of it: the words come first.
        image, text = found.image.flatten(1), found.text[:, :longest]
        maps[name] = ModalityRelevance(image.float().cpu(), text.float().cpu())
    return maps, traced.logits.float().cpu()
