"""F_syn: do the most relevant patches and words act together? (arXiv 2605.22168)"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.explanation_scores.values import HIGH, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import (
    ModalityRelevance,
    VariantScorer,
    kept_indices,
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
        certainty = _certainties(scorer, batch_size)
        whole_image, whole_text = np.ones_like(top_image), np.broadcast_to(valid[:, None], top_text.shape)
        no_image, no_text = np.zeros_like(top_image), np.broadcast_to(always, top_text.shape)
        less_image, less_text = ~top_image, valid[:, None] & ~top_text
        only_text = always | top_text
        deleted = (
            certainty(less_image, less_text)
            - certainty(less_image, whole_text)
            - certainty(whole_image, less_text)
            + certainty(whole_image, whole_text)
        )
        inserted = (
            certainty(top_image, only_text)
            - certainty(top_image, no_text)
            - certainty(no_image, only_text)
            + certainty(no_image, no_text)
        )
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


def _certainties(scorer: VariantScorer, batch_size: int):
    def certainty(
        image: Bool[np.ndarray, "samples steps patches"], text: Bool[np.ndarray, "samples steps tokens"]
    ) -> Float[np.ndarray, "samples steps"]:
        """Variants that keep equally many patches share a forward."""
        samples, steps, _ = image.shape
        found = np.empty((samples, steps))
        for step in range(steps):  # every sample has the same number of patches left at a step
            for rows in np.split(np.arange(samples), range(batch_size, samples, batch_size)):
                keeps = kept_indices(image[rows, step]), kept_indices(text[rows, step])
                found[rows, step] = scorer.score(rows, *keeps)[:, 0]
        return found

    return certainty
