"""What captions that a model has written speak of, for planted maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from clipmapper.data.record import seen_mask
from clipmapper.data.world.caption_objects import aligned_caption
from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.planted import Deciding, patch_shares
from clipmapper.evaluation.localisation import image_localisation
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.samples import TESTS, CaptionSamples, token_word_places

_Mask = Bool[np.ndarray, "_ _"]


@dataclass(frozen=True)
class SpokenOf:
    """The pixels that decide, by test ("caption", "word") and sample, and whether the words were ``aligned``.

    Of a caption, the visible pixels of all objects that it names or counts; of its word, those of the objects
    that the word speaks of. Where no word (this word) speaks of an object that can be seen, be it that the
    caption is not understood, is wrong, or that the word ("is") speaks of none, of all objects in the image:
    of a caption this is the best guess, while words not ``aligned`` are left out where scores are judged.
    """

    masks: Mapping[str, Sequence[_Mask]]
    aligned: Mapping[str, Bool[np.ndarray, "samples"]]

    def deciding(self, test: str, positions: range, grid: tuple[int, int]) -> Deciding:
        """Of the samples at these positions. Nothing is said of words: patches alone are taken away."""
        shares = patch_shares(self.masks[test][positions.start : positions.stop], grid)
        return Deciding(shares, [()] * len(shares))

    def judged(self, test: str) -> Bool[np.ndarray, "samples"]:
        """The samples of which the truth is known well enough to judge scores by it."""
        return np.ones_like(self.aligned[test]) if test == "caption" else self.aligned[test]

    def truth(
        self, test: str, maps: Mapping[str, Float[np.ndarray, "samples rows columns"]]
    ) -> dict[str, dict[str, Float[np.ndarray, "methods samples"]]]:
        """How much of each method's maps of the samples that are ``judged`` is where it should be."""
        rows = self.judged(test)
        masks = [mask for mask, chosen in zip(self.masks[test], rows, strict=True) if chosen]
        found = [image_localisation(np.maximum(its[rows], 0), masks) for its in maps.values()]
        return {"image": {name: np.stack([getattr(its, name) for its in found]) for name in ("mass", "rank")}}

    @classmethod
    def together(cls, parts: "Sequence[SpokenOf]") -> "SpokenOf":
        """The samples of all parts, in order."""
        return cls(
            {test: [mask for part in parts for mask in part.masks[test]] for test in TESTS},
            {test: np.concatenate([part.aligned[test] for part in parts]) for test in TESTS},
        )


def require_scenes(samples: CaptionSamples) -> None:
    """Raise ``UserError`` where it is not known of every image where its objects are."""
    if unknown := samples.undecided():
        raise UserError(
            f"planted: of {unknown} of {len(samples)} images it is not known which objects are where; the "
            "built-in world knows it"
        )


def spoken_of(
    model: Captioner,
    samples: CaptionSamples,
    captions: Sequence[str],
    words: Sequence[Sequence[str]],
    chosen: Sequence[int],
) -> SpokenOf:
    """``captions`` of all samples, their ``words`` as the tokenizer splits them, and the place of the word
    that is perturbed alone. Errors as of :func:`require_scenes`."""
    require_scenes(samples)
    masks: dict[str, list[_Mask]] = {test: [] for test in TESTS}
    aligned: dict[str, list[bool]] = {test: [] for test in TESTS}
    for truth, caption, spelled, word in zip(samples.known, captions, words, chosen, strict=True):
        told = aligned_caption(caption, truth.scene)
        spoken = {test: set() for test in TESTS}
        if told is not None:
            places = token_word_places([one.text for one in told.words], spelled)
            for place, one in zip(places, told.words, strict=True):
                spoken["caption"] |= set(one.objects)
                if place == word:
                    spoken["word"] |= set(one.objects)
        for test, objects in spoken.items():
            mask = np.isin(truth.instances, [number + 1 for number in objects])
            aligned[test].append(bool(mask.any()))
            seen = mask if mask.any() else truth.instances > 0
            masks[test].append(seen_mask(seen, model.encoder.clip.visual))
    return SpokenOf(masks, {test: np.array(flags, dtype=bool) for test, flags in aligned.items()})
