"""F_syn: do the most relevant patches and words act together? (arXiv 2605.22168)"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clipmapper.evaluation.explanation_scores.subject import Subject, certainties
from clipmapper.evaluation.explanation_scores.values import HIGH, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import (
    ModalityRelevance,
    VariantScorer,
    number_removed,
    removal_order,
)
from clipmapper.evaluation.statistics import trapezoid_area

STEPS = np.linspace(0.0, 1.0, 11)  # the paper's tenths


def synergy(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ScoreValues:
    """F_syn = ½ (AUC S_del + AUC S_ins), over the share k of tokens taken in steps of a tenth, with

    S_del(k) = p(I∖k, T∖k) − p(I∖k, T) − p(I, T∖k) + p(I, T) and
    S_ins(k) = p(I_k, T_k) − p(I_k, ∅) − p(∅, T_k) + p(∅, ∅),

    where p is the model's certainty of what is explained, I∖k and T∖k are the image and the text without
    their k most relevant tokens, I_k and T_k those tokens alone. Tokens are physically removed.
    """
    scorer = subject.certain()
    scorer.unperturbed(batch_size)
    removable, valid = subject.removable_text.cpu().numpy(), subject.text_valid.cpu().numpy()
    columns = []
    for relevance in maps.values():
        if progress is not None:
            progress(0)
        image, text = (getattr(relevance, name).double().cpu().numpy() for name in ("image", "text"))
        patches = np.ones(image.shape, dtype=bool)
        # [samples, steps, tokens]: the k most relevant tokens of each.
        top_image = _most_relevant(image, patches, subject.sample_ids, seed)
        top_text = _most_relevant(text, removable, subject.sample_ids, seed)
        always = (valid & ~removable)[:, None]
        whole_image, whole_text = np.ones_like(top_image), np.broadcast_to(valid[:, None], top_text.shape)
        no_image, no_text = np.zeros_like(top_image), np.broadcast_to(always, top_text.shape)
        less_image, less_text = ~top_image, valid[:, None] & ~top_text
        only_text = always | top_text
        pairs = [
            (less_image, less_text), (less_image, whole_text), (whole_image, less_text),
            (whole_image, whole_text),
            (top_image, only_text), (top_image, no_text), (no_image, only_text), (no_image, no_text),
        ]  # fmt: skip
        both, image_less, text_less, whole, alone, image_alone, text_alone, none = _certainties(
            scorer, pairs, batch_size
        )
        deleted = both - image_less - text_less + whole
        inserted = alone - image_alone - text_alone + none
        areas = trapezoid_area(np.stack([deleted, inserted]), STEPS)
        columns.append(np.stack([areas.mean(axis=0), areas[0], areas[1]]))
    quantities = tuple(Quantity(name, HIGH) for name in ("f_syn", "deletion", "insertion"))
    return ScoreValues(quantities, tuple(maps), subject.sample_ids, np.stack(columns, axis=1))


def _most_relevant(
    relevance: Float[np.ndarray, "samples tokens"],
    removable: Bool[np.ndarray, "samples tokens"],
    sample_ids: Int[np.ndarray, "samples"],
    seed: int,
) -> Bool[np.ndarray, "samples steps tokens"]:
    order = removal_order(relevance, seed=seed, positive=True, removable=removable, sample_ids=sample_ids)
    rank = np.argsort(order, axis=1)
    taken = np.stack([number_removed(k, removable.sum(axis=1)) for k in STEPS], axis=1)
    return removable[:, None] & (rank[:, None] < taken[:, :, None])


def _certainties(
    scorer: VariantScorer,
    pairs: Sequence[
        tuple[Bool[np.ndarray, "samples steps patches"], Bool[np.ndarray, "samples steps tokens"]]
    ],
    batch_size: int,
) -> Float[np.ndarray, "pairs samples steps"]:
    image, text = (np.stack(kept) for kept in zip(*pairs, strict=True))
    sample = np.broadcast_to(np.arange(image.shape[1])[:, None], image.shape[:3])
    flat = [kept.reshape(-1, kept.shape[-1]) for kept in (image, text)]
    return certainties(scorer, sample.reshape(-1), *flat, batch_size).reshape(image.shape[:3])
