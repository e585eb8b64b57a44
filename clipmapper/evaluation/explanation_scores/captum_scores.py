"""Infidelity and sensitivity-max (Yeh et al. 2019, arXiv 1901.09392), as captum computes them.

captum is no dependency of clipmapper: it is the extra ``captum``.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.subject import Subject, certainties
from clipmapper.evaluation.explanation_scores.values import LOW, Quantity, ScoreValues
from clipmapper.evaluation.perturbation import ModalityRelevance

_SUBSETS = 50  # random sets of tokens a sample
_NOISES = 10  # noisy images a sample (captum's and the paper's number)
_RADIUS = 0.02  # of the noise in the tower's normalised pixels (captum's default)


def require_captum():
    """captum's metrics. Raises ``UserError`` where it is not installed."""
    try:
        from captum import metrics
    except ImportError as error:
        raise UserError(
            "scores: infidelity and sensitivity are captum's, which is not installed: "
            "pip install 'clipmapper[captum]'"
        ) from error
    return metrics


def infidelity(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ScoreValues:
    """E[(Σ_{j∈S} R_j − (p(all) − p(without S)))²] per modality, p the certainty, over 50 random sets S of
    tokens that are physically removed, each token with probability ½.

    Each map is scaled by the factor that is best for it (captum's ``normalize``): relevance has no unit.
    """
    metrics = require_captum()
    scorer = subject.certain()
    whole = scorer.unperturbed(batch_size)[:, 0]
    columns = []
    for modality in subject.modalities:
        text = modality == "text"
        valid = subject.text_valid.cpu().numpy() if text else None
        removable = subject.removable_text.cpu() if text else None
        known: list[Tensor] = []  # the same sets for every method, and their certainties

        def forward(
            present: Float[Tensor, "variants tokens"], text=text, valid=valid
        ) -> Float[Tensor, "variants"]:
            if progress is not None:
                progress(0)
            # captum repeats samples one behind the other.
            rows = np.repeat(np.arange(len(whole)), len(present) // len(whole))
            kept = present.bool().numpy() if valid is None else present.bool().numpy() & valid[rows]
            keeps = (None, kept) if text else (kept, None)
            return torch.from_numpy(certainties(scorer, rows, *keeps, batch_size))

        row = []
        for relevance in maps.values():
            found = getattr(relevance, modality).double().cpu()
            generator = torch.Generator().manual_seed(seed)

            def removed(
                present: Float[Tensor, "variants tokens"],
                generator=generator,
                removable=removable,
            ) -> tuple[Tensor, Tensor]:
                gone = torch.rand(present.shape, generator=generator, dtype=torch.float64) < 0.5
                if removable is not None:
                    gone &= removable.repeat_interleave(len(present) // len(removable), dim=0)
                return gone.double(), present * ~gone

            row.append(
                metrics.infidelity(
                    _Remembered(forward, known),
                    removed,
                    torch.ones_like(found),
                    found,
                    n_perturb_samples=_SUBSETS,
                    normalize=True,
                ).numpy()
            )
        columns.append(np.stack(row))
    quantities = tuple(Quantity(modality, LOW) for modality in subject.modalities)
    return ScoreValues(quantities, tuple(maps), subject.sample_ids, np.stack(columns))


class _Remembered:
    """A function whose calls come in the same order for every method: what it gave is not computed again."""

    def __init__(self, function: Callable[[Tensor], Tensor], known: list[tuple[Tensor, Tensor]]) -> None:
        self._function, self._known, self._calls = function, known, 0

    def __call__(self, given: Tensor) -> Tensor:
        place, self._calls = self._calls, self._calls + 1
        if place < len(self._known) and torch.equal(self._known[place][0], given):
            return self._known[place][1]
        found = self._function(given)
        self._known[place:] = [(given.clone(), found)]
        return found


def sensitivity(
    subject: Subject,
    maps: Mapping[str, ModalityRelevance],
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ScoreValues:
    """max over 10 images with uniform noise of ‖R(x + δ) − R(x)‖ / ‖R(x)‖, |δ| ≤ 0.02 in normalised pixels;
    of image maps, in the Euclidean norm. That of a map of zeros counts as 1."""
    metrics = require_captum()
    known: list[Mapping[str, ModalityRelevance]] = []
    row = []
    for method in maps:
        calls = 0

        def explain(images: Tensor | tuple[Tensor], method: str = method) -> tuple[Tensor]:
            nonlocal calls
            place, calls = calls, calls + 1
            if progress is not None:
                progress(0)
            if place == len(known):
                # (captum gives the untouched images as a tuple, and computes without gradients.)
                pixels = images[0] if isinstance(images, tuple) else images
                with torch.enable_grad():
                    known.append(subject.maps(pixels))
            return (known[place][method].image.double().cpu(),)

        # captum draws the noise from torch's own generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = metrics.sensitivity_max(
                explain,
                subject.images,
                perturb_radius=_RADIUS,
                n_perturb_samples=_NOISES,
                max_examples_per_batch=len(subject.sample_ids),
            )
        row.append(found.numpy())
    return ScoreValues((Quantity("max", LOW),), tuple(maps), subject.sample_ids, np.stack(row)[None])
