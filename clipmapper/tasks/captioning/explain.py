"""Why a captioner writes what it writes: a caption, and for each of its words why it is there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.text import Text

from clipmapper.data.images import picture_of
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.clip_score import clip_score
from clipmapper.evaluation.captions.ngram_scores import CiderD, DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.evaluation.captions.scores import WORD_WEIGHTS, loss_weights, mean_weights
from clipmapper.models.tokens import tokenize
from clipmapper.relevance.explained_scalar import check_explained
from clipmapper.tasks.captioning.caption_maps import caption_map, check_word_maps
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.trace import TracedCaption, trace_caption, word_relevance
from clipmapper.visual.caption_strip import plot_caption_strip
from clipmapper.visual.layout import save_figure


@dataclass(frozen=True)
class CaptionExplanation:
    """Why a captioner writes what it writes, word by word.

    Attributes
    ----------
    caption, words : the text and its T words (punctuation marks are words of their own).
    explained : which words are explained, by their place in ``words``: all T, or the chosen one.
    maps : Float[explained, rows, columns], relevance of the image patches for each explained word.
    word_matrix : Float[explained, T], relevance of the words before it. 0 at later words; at the word itself
        what its first token pieces have given its later ones (0 for a word of one token).
    probabilities : of each explained word, given the image and the words before it.
    weights : how much each explained word counts in ``patches``; they sum to 1.
    word_weights : where the weights come from, "mean", "cider" or "clip".
    word_maps : how they are put together there, see
        :func:`~clipmapper.tasks.captioning.caption_maps.caption_map`.
    image : UInt8[height, width, 3], what the model saw of the image, at its own resolution.
    method : name of the explanation method.
    called : "caption", or "explained caption" where it need not be the model's.
    """

    caption: str
    words: tuple[str, ...]
    explained: tuple[int, ...]
    maps: Float[np.ndarray, "explained rows columns"]
    word_matrix: Float[np.ndarray, "explained words"]
    probabilities: Float[np.ndarray, "explained"]
    weights: Float[np.ndarray, "explained"]
    word_weights: str
    image: UInt8[np.ndarray, "height width 3"]
    method: str
    called: str = "caption"
    word_maps: str = "scaled"

    @property
    def patches(self) -> Float[np.ndarray, "rows columns"]:
        """The map of the whole caption."""
        return caption_map(self.maps, self.weights, self.word_maps)

    def earlier_words(self, row: int) -> list[tuple[str, float]]:
        """(word, relevance) of every word before the word that ``maps[row]`` explains."""
        before = self.explained[row]
        return list(zip(self.words[:before], self.word_matrix[row, :before].tolist(), strict=True))

    @property
    def word_scores(self) -> list[tuple[str, float]]:
        """None: a caption has a strip of maps of its own, a map a word."""
        return []

    @property
    def header(self) -> dict[str, str | None]:
        return {"question": self.caption, "answer": None}

    @property
    def names(self) -> tuple[str, ...]:
        one = len(self.words) > len(self.explained) == 1
        return (self.caption, *([self.words[self.explained[0]]] if one else []))

    def lines(self) -> list[tuple[str | Text, ...]]:
        told = zip(self.explained, self.probabilities, strict=True)
        words = "  ".join(f"{self.words[place]} {probability:.2f}" for place, probability in told)
        return [
            (f"{self.called}:", Text(self.caption, style="bold")),
            (f"probability of words: {words}",),
        ]

    def plot(self, path: str | Path) -> Path:
        """Write a picture: a heat map a word (punctuation left out), and the map of the whole caption.

        Returns the path.
        """
        figure = plot_caption_strip(self)
        save_figure(figure, Path(path))
        return Path(path)


def explain_captions(
    model: Captioner,
    image,
    caption: str | None = None,
    methods: Sequence[str] = ("weighted",),
    *,
    word: str | int | None = None,
    word_weights: str = "mean",
    word_maps: str = "scaled",
    explained: str = "logit",
    decoding: Decoding | None = None,
    references: Sequence[str] | None = None,
    frequencies: DocumentFrequencies | None = None,
) -> list[CaptionExplanation]:
    """Explain by several methods on the same forward.

    ``caption`` to explain (default: the one that the model writes, as ``decoding`` says) and ``word``, one
    word of it alone, by name or by place (default: all). ``word_weights``: how the maps of words are averaged
    into one of the caption: "mean" (stop-words count 0), "cider" (by the CIDEr that is lost without the word;
    needs ``references`` and ``frequencies``) or "clip" (by the CLIPScore that is lost). ``word_maps``:
    how (:func:`~clipmapper.tasks.captioning.caption_maps.caption_map`). ``explained``: of each word its
    "logit", "probability" or "log_probability". (The code of WRA, Huang et al. 2023, explains the probability
    and scales.)

    Raises ``UserError`` for an empty caption, words that the model cannot say, a ``word`` that the caption
    does not have or has several times, a value that is none of these, and a probability that is too small to
    have a gradient.
    """
    if isinstance(word, str) and word.lstrip("-").isdigit():
        word = int(word)
    if word_weights not in WORD_WEIGHTS:
        raise UserError(f"word_weights={word_weights!r}: must be one of {', '.join(WORD_WEIGHTS)}")
    check_word_maps(word_maps)
    check_explained(explained)
    if word_weights == "cider" and not (references and frequencies):
        raise UserError(
            "word_weights='cider' needs references=[...] of this image and frequencies=DocumentFrequencies "
            "of a set of images (clipmapper.evaluation.captions.ngram_scores); otherwise use 'mean' or 'clip'"
        )
    if caption is not None and decoding is not None:
        raise UserError(
            "decoding says how a caption is written: it has no effect on caption=..., leave one out"
        )
    pixels = model.load_image(image)
    traced = trace_caption(model, pixels, caption, decoding)
    words = tuple(word for word, _ in traced.words)
    places = tuple(range(len(words))) if word is None else (word_place(words, word),)
    relevance = word_relevance(traced, places, methods, explained=explained)
    if word is not None:
        weights = np.ones(1)
    else:
        cider = None if frequencies is None else CiderD(frequencies)
        weights = caption_word_weights(model, traced, word_weights, references or (), cider)
    seen = picture_of(image, pixels, model.encoder.clip.visual)
    return [
        CaptionExplanation(
            caption=traced.caption,
            words=words,
            explained=places,
            maps=relevance[name].maps,
            word_matrix=relevance[name].matrix,
            probabilities=traced.word_probabilities(places),
            weights=weights,
            word_weights=word_weights,
            image=seen,
            method=name,
            called="caption" if caption is None else "explained caption",
            word_maps=word_maps,
        )
        for name in methods
    ]


def caption_word_weights(
    model: Captioner,
    traced: TracedCaption,
    word_weights: str,
    references: Sequence[str],
    cider: CiderD | None,
) -> Float[np.ndarray, "words"]:
    """How much each word of a traced caption counts; ``references`` and ``cider`` are for "cider" alone."""
    words = [word for word, _ in traced.words]
    if word_weights == "clip":
        return loss_weights(words, clip_scorer(model, traced))
    if word_weights == "cider":
        return loss_weights(words, cider_scorer(references, cider))
    return mean_weights(words)


def word_place(words: Sequence[str], word: str | int) -> int:
    """The place of a chosen word. Raises ``UserError`` for one that is not there, or more than once."""
    said = " ".join(words)
    if isinstance(word, int):
        if not -len(words) <= word < len(words):
            raise UserError(f"word={word}: the caption {said!r} has words 0 to {len(words) - 1}")
        return word % len(words)
    places = [place for place, other in enumerate(words) if other == word.strip().lower()]
    if not places:
        raise UserError(f"word={word!r} is not in the caption {said!r}")
    if len(places) > 1:
        given = ", ".join(f"word={place}" for place in places)
        raise UserError(f"word={word!r} is in the caption {said!r} {len(places)} times; give {given}")
    return places[0]


def cider_scorer(
    references: Sequence[str], cider: CiderD
) -> Callable[[list[str]], Float[np.ndarray, "captions"]]:
    """CIDEr-D of captions of one image against its references."""
    truth = [ptb_tokenise(reference) for reference in references]
    return lambda captions: cider([ptb_tokenise(c) for c in captions], [truth] * len(captions))


def clip_scorer(
    model: Captioner, traced: TracedCaption
) -> Callable[[list[str]], Float[np.ndarray, "captions"]]:
    """CLIPScore of captions of the traced image by the model's own CLIP, without the paper's prompt.

    The image's embedding is pooled from the tokens that are there: its tower does not run again.
    """

    @torch.no_grad()
    def score(captions: list[str]) -> Float[np.ndarray, "captions"]:
        encoder = model.encoder
        # A caption of one word is empty without it: CLIP reads start and end then.
        text = tokenize(encoder.tokenizer, captions, whole_context=encoder.text_tower.padding_matters)
        text = text.to(model.device)
        texts = encoder.pool_text(encoder.text_tokens(text.ids, torch.ones_like(text.valid)), text.ids)
        image = encoder.pool_image(traced.image_tokens)
        return clip_score(image.expand(len(texts), -1), texts).double().cpu().numpy()

    return score
