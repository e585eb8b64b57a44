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
    unique_variants,
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
    images, texts = [], []
    for relevance in maps.values():
        image, text = (getattr(relevance, name).double().cpu().numpy() for name in ("image", "text"))
        patches = np.ones(image.shape, dtype=bool)
        # [samples, steps, tokens]: the k most relevant tokens of each.
        top_image = _most_relevant(image, patches, subject.sample_ids, seed)
        top_text = _most_relevant(text, removable, subject.sample_ids, seed)
        always = (valid & ~removable)[:, None]
        whole_image, whole_text = np.ones_like(top_image), np.broadcast_to(valid[:, None], top_text.shape)
        no_image, no_text = np.zeros_like(top_image), np.broadcast_to(always, top_text.shape)
        less_image, less_text, only_text = ~top_image, valid[:, None] & ~top_text, always | top_text
        # In the order of the terms above.
        images.append(
            [less_image, less_image, whole_image, whole_image, top_image, top_image, no_image, no_image]
        )
        texts.append([less_text, whole_text, less_text, whole_text, only_text, no_text, only_text, no_text])
    found = _certainties(scorer, np.array(images), np.array(texts), valid, batch_size, progress)
    signs = np.array([1.0, -1.0, -1.0, 1.0])[:, None, None]
    deleted, inserted = (signs * found[:, :4]).sum(axis=1), (signs * found[:, 4:]).sum(axis=1)
    areas = trapezoid_area(np.stack([deleted, inserted]), STEPS)  # [2, methods, samples]
    quantities = tuple(Quantity(name, HIGH) for name in ("f_syn", "deletion", "insertion"))
    values = np.stack([areas.mean(axis=0), areas[0], areas[1]])
    return ScoreValues(quantities, tuple(maps), subject.sample_ids, values)


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
    images: Bool[np.ndarray, "*many samples steps patches"],
    texts: Bool[np.ndarray, "*many samples steps tokens"],
    valid: Bool[np.ndarray, "samples tokens"],
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Float[np.ndarray, "*many samples steps"]:
    """Equal variants are scored once, those that keep equally many patches share a forward, and of what is
    whole nothing is encoded again."""
    shape = images.shape[:-1]
    rows = np.broadcast_to(np.arange(shape[-2])[:, None], shape).ravel()
    images, texts = images.reshape(len(rows), -1), texts.reshape(len(rows), -1)
    first, kind = unique_variants(rows, np.concatenate([images, texts], axis=1))
    rows, images, texts = rows[first], images[first], texts[first]
    whole_image, whole_text = images.all(axis=1), (texts == valid[rows]).all(axis=1)
    found = np.empty(len(rows))
    group = images.sum(axis=1) * 2 + whole_text
    for one in np.unique(group):
        same = np.flatnonzero(group == one)
        for part in np.split(same, range(batch_size, len(same), batch_size)):
            if progress is not None:
                progress(0)
            image = None if whole_image[part[0]] else kept_indices(images[part])
            text = None if whole_text[part[0]] else kept_indices(texts[part])
            found[part] = scorer.score(rows[part], image, text)[:, 0]
    return found[kind].reshape(shape)
