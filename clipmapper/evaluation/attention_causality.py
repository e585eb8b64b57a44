"""Does attention explain? The experiment of Naim & Asher 2024 (arXiv 2410.18541).

Attention of chosen layers is replaced by another matrix, and the model is asked again. A matrix with the same
effect (effective, efficient attention) changes no prediction, however far it is from A; a random or uniform
one shows how much the layer's attention matters.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.evaluation.statistics import bootstrap_interval
from clipmapper.relevance.substitution import (
    jensen_shannon,
    substituted_attention,
    substitutes,
    total_variation,
)

# Rows below 0 by rounding alone are distributions still.
_ROUNDING = 1e-6


def attention_causality(
    predict: Sequence[Callable[[], Float[Tensor, "samples classes"]]],
    layers: Collection[int] | None,
    seed: int,
    confidence: float = 0.95,
    progress: Callable[[int], object] = lambda forwards: None,
) -> dict:
    """Results by name, for a JSON file.

    ``predict``: one forward a batch, giving logits. ``layers``: numbers of the model's attention sub-layers
    in the order in which they run (None: all). For every substitute: the share of predictions that change,
    with a bootstrap interval, the largest change of a logit, and the mean over rows of total variation and
    Jensen–Shannon distance to A (None where the substitute is no distribution). ``progress`` is told of every
    forward; there are ``count_forwards(predict)``. Raises ``UserError`` for a layer that the model does not
    have, and where there are no samples or no layers.
    """
    if not predict:
        raise UserError("no samples: at least one is needed")
    if layers is not None and not layers:
        raise UserError("no layers: at least one is needed (None: all)")
    with torch.no_grad():
        with substituted_attention(None) as seen:
            logits = [predict[0]()]
        count = len(seen)
        if not count:
            raise UserError("no attention was seen: the model does not use scaled_dot_product_attention")
        unknown = sorted(set(layers or ()) - set(range(count)))
        if unknown:
            raise UserError(f"layers={unknown}: the model has attention sub-layers 0 to {count - 1}")
        progress(1)
        for forward in predict[1:]:
            logits.append(forward())
            progress(1)
        results = {}
        for name, matrix in substitutes(seed).items():
            changed, largest, distances = [], 0.0, []
            for forward, own in zip(predict, logits, strict=True):
                with substituted_attention(matrix, layers) as seen:
                    other = forward()
                changed.append((other.argmax(dim=1) != own.argmax(dim=1)).double().cpu().numpy())
                largest = max(largest, float((other - own).abs().max()))
                distances += [_distances(a.double(), b.double()) for a, b in seen]
                progress(1)
            share = bootstrap_interval(np.concatenate(changed), confidence=confidence, seed=seed)
            variation, shannon = zip(*distances, strict=True)
            results[name] = {
                "predictions_changed": share.as_dict(),
                "largest_logit_change": largest,
                "total_variation": float(np.mean(variation)),
                "jensen_shannon": None if None in shannon else float(np.mean(shannon)),
            }
    chosen = sorted(range(count) if layers is None else set(layers))
    samples = sum(len(values) for values in logits)
    return {"samples": samples, "sublayers": count, "layers": chosen, "substitutes": results}


def count_forwards(predict: Sequence[Callable[[], Tensor]]) -> int:
    """How many forwards :func:`attention_causality` makes: one as it is, and one a substitute."""
    return len(predict) * (1 + len(substitutes(0)))


def _distances(a: Tensor, b: Tensor) -> tuple[float, float | None]:
    variation = float(total_variation(a, b).mean())
    distribution = bool((b >= -_ROUNDING).all()) and bool(((b.sum(-1) - 1).abs() < _ROUNDING).all())
    return variation, float(jensen_shannon(a, b.clamp(min=0)).mean()) if distribution else None
